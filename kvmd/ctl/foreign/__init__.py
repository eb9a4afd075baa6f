"""Guests of other tools: what they have written → a draft of a guest file, and what stays behind.

A room imports, of this wing, only the rooms named with it; * is pure: no asyncio, files, sockets, clock::

    room     |   | what lives there                        | imports
    draft    | * | a guest from another tool, and its file |
    options  | * | QEMU's way of writing options           |
    shell    | * | words and variables of a script         | draft
    borrowed | * | what is of the host → draft             | draft
    devices  | * | devices of a libvirt domain → draft     | draft borrowed
    libvirt  | * | a domain's XML → draft                  | draft devices
    drives   | * | drives of a QEMU command line           | draft options
    passed   | * | what of the host a command line has     | draft options borrowed
    command  | * | a QEMU command line → draft             | draft options shell drives passed
    proxmox  | * | a Proxmox .conf → draft                 | draft options borrowed
    quickemu | * | a quickemu .conf → draft                | draft options shell borrowed
"""
