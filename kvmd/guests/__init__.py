"""Guests that run: one from its start to its end, and all of them by name.

A room imports, of this wing, only the rooms named with it; * is pure: no asyncio, files, sockets, clock::

    room      |   | what lives there                                   | imports
    vsock     |   | a guest's vsock address, and who listens to it     |
    readiness |   | when a guest is ready: by a line of text, by vsock | vsock
    handles   |   | what QEMU needs, opened by root: images, taps      | readiness
    nics      |   | one guest's NICs: claimed, told, given up          |
    machine   |   | one running guest: start, adopt, steer, stop       | readiness handles nics
    recovery  |   | what an earlier daemon left: taken over or cleared | machine
    known     |   | a guest as known from its file and its machine     | machine
    manager   |   | all guests: reconciled, start and stop by name     | machine recovery known
"""
