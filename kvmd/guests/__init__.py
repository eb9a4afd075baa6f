"""Guests that run: one from its start to its end, and all of them by name.

A room imports, of this wing, only the rooms named with it; * is pure: no asyncio, files, sockets, clock::

    room      |   | what lives there                                     | imports
    vsock     |   | a guest's vsock address, and who listens to it       |
    search    |   | a pattern in what a guest prints, by another process |
    readiness |   | when a guest is ready: by a line of text, by vsock   | vsock search
    handles   |   | what QEMU needs, opened by root: images, taps        | readiness
    nics      |   | one guest's NICs: claimed, told, given up            |
    stall     |   | why a guest that is on stands still                  |
    steering  |   | what is done to a guest that runs, by QMP            | stall
    ending    |   | how a guest ended: result and reason                 |
    machine   |   | one running guest: start, adopt, stop                | readiness handles nics stall steering ending
    recovery  |   | what an earlier daemon left: taken over or cleared   | ending machine
    known     |   | a guest as known from its file and its machine       | machine
    register  |   | all guests by name, by process, by tap               | machine known
    manager   |   | start and stop by name, with systemd's units; reload | machine recovery known register
"""
