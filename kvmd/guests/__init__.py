"""Guests that run: one from its start to its end, and all of them by name.

A room imports, of this wing, only the rooms named with it; * is pure: no asyncio, files, sockets, clock::

    room      |   | what lives there                         | imports
    vsock     |   | a vsock address, and who listens there   |
    search    |   | a pattern in what a guest prints         |
    readiness |   | ready by a line, or by vsock             | vsock search
    helper    |   | a process beside QEMU, from start to end |
    tpm       |   | a guest's TPM, swtpm                     | helper
    share     |   | a directory of the host, virtiofsd       | helper
    borrowed  |   | what a guest has of the host: opened     | share
    handles   |   | what QEMU needs, opened by root          | readiness tpm borrowed
    nics      |   | one guest's NICs: claimed, told          |
    stall     |   | why a guest that is on stands still      |
    media     |   | what is in a guest's CD drives           | stall
    screen    |   | a guest's screen: viewers, pictures      |
    agent     |   | the QEMU guest agent, never believed     |
    steering  |   | what is done to a guest that runs        | stall media screen agent
    ending    |   | how a guest ended: result and reason     |
    machine   |   | one running guest: start, adopt, stop    | readiness tpm borrowed handles nics stall steering ending
    recovery  |   | what an earlier daemon left              | ending machine
    known     |   | known of a guest: its file, its run      | machine
    register  |   | all guests by name, process, tap         | machine known
    manager   |   | start and stop by name; reload           | machine recovery known register
"""
