"""QEMU: what it is told on its command line, by descriptor and by QMP.

A room imports, of this wing, only the rooms named with it; * is pure: no asyncio, files, sockets, clock::

    room        |   | what lives there                                   | imports
    drives      | * | disks and CDs as QEMU's arguments                  |
    display     | * | a screen as QEMU's arguments                       |
    firmware    | * | UEFI firmware and TPM as QEMU's arguments          |
    passthrough | * | what a guest has of the host, as arguments         |
    argv        | * | guest → QEMU's arguments                           | drives display firmware passthrough
    accelerator |   | KVM or not, and why not                            |
    headers     | * | what an image's header names, and says of itself   |
    files       |   | opened by root: no stranger's link, nothing blocks |
    password    |   | VNC's password, by descriptor                      | files
    usb         |   | USB devices of the host: found, opened             |
    process     |   | QEMU spawned: its user, its descriptors, its pidfd |
    pci         |   | PCI devices of the host: what is in the way        | process
    users       |   | a user of its own for each guest                   | process
    used        |   | the images a guest has used: none is made anew     | drives
    seed        |   | cloud-init's seed, systemd's credentials           |
    nvram       |   | UEFI's code, and variables of the guest's own      | files firmware process used
    tpm         |   | swtpm: its arguments, and its state                | process used
    share       |   | virtiofsd: its arguments, and its directory        | files
    images      |   | disk images: created, opened, none believed        | drives headers files process used
    qmp         |   | the few QMP commands and events                    |
"""
