"""The network as values: what the host looks like, and what follows from it for the guests.

A room imports, of this wing, only the rooms named with it; * is pure: no asyncio, files, sockets, clock::

    room      |   | what lives there                                    | imports
    host      | * | what the host looks like: interfaces, addresses     |
    things    | * | what the kernel can hold for a guest; diff          | host
    survey    | * | the host as last seen                               | host things
    plan      | * | NICs + host → the things wanted                     | host things
    dhcp      | * | what a guest is told: dnsmasq's configuration, unit | host plan
    settings  | * | what is to be set inside: cloud-init's network      | host dhcp
    nicstatus | * | how a NIC is doing: a word and a sentence           | host things dhcp
"""
