"""What a host has for guests, and what it lacks: facts → findings.

A room imports, of this wing, only the rooms named with it; * is pure: no asyncio, files, sockets, clock::

    room      |   | what lives there                            | imports
    finding   | * | one line: fine, a warning, or what stops    |
    facts     | * | what is known of a host                     |
    processor | * | KVM, and why not                            | finding facts
    software  | * | versions, tools, kernel's devices           | finding facts
    service   | * | the daemon and its guests                   | finding facts
    network   | * | uplinks, forwarding, leftovers              | finding facts
    host      | * | disks, clock, journal, users                | finding facts
    gather    |   | a host → its facts; nothing is changed      | facts software
"""
