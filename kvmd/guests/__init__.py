"""Guests that run: one from its start to its end, and all of them by name.

A room imports, of this wing, only the rooms named with it; * is pure: no asyncio, files, sockets, clock::

    room      |   | what lives there                                | imports
    vsock     |   | a guest's vsock address, and who listens to it  |
    search    |   | a pattern in what a guest prints                |
    readiness |   | when a guest is ready: by a line, or by vsock   | vsock search
    tpm       |   | a guest's TPM: started, watched, adopted        |
    handles   |   | what QEMU needs, opened by root                 | readiness tpm
    nics      |   | one guest's NICs: claimed, told, given up       |
    stall     |   | why a guest that is on stands still             |
    media     |   | what is in a guest's CD drives                  | stall
    screen    |   | a guest's screen: viewers, and pictures of it   |
    steering  |   | what is done to a guest that runs, by QMP       | stall media screen
    ending    |   | how a guest ended: result and reason            |
    machine   |   | one running guest: start, adopt, stop           | readiness tpm handles nics stall steering ending
    recovery  |   | what an earlier daemon left: adopted or cleared | ending machine
    known     |   | a guest as known from its file and its run      | machine
    register  |   | all guests by name, by process, by tap          | machine known
    manager   |   | start and stop by name, with its unit; reload   | machine recovery known register
"""
