"""QEMU: what it is told on its command line, by descriptor and by QMP.

A room imports, of this wing, only the rooms named with it; * is pure: no asyncio, files, sockets, clock::

    room        |   | what lives there                                   | imports
    argv        | * | guest → QEMU's arguments                           |
    accelerator |   | KVM or not, and why not                            |
    images      |   | disk images: created, opened                       |
    process     |   | QEMU spawned: its user, its descriptors, its pidfd |
    qmp         |   | the few QMP commands and events                    |
"""
