"""The kernel's own protocols, and nothing of what is wanted of it.

A room imports, of this wing, only the rooms named with it; * is pure: no asyncio, files, sockets, clock::

    room      |   | what lives there                                  | imports
    codec     | * | netlink messages by pyroute2: as bytes, and read  |
    rtnetlink | * | requests out of operations, values out of answers | codec
    netlink   |   | the kernel's network: dump, apply, events; taps   | rtnetlink
    nftables  |   | libnftables: commands, listings, word of changes  | rtnetlink
    sysctl    |   | /proc/sys/net, and what it was before             |
"""
