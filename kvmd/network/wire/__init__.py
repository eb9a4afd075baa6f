"""What is said on taps and uplinks in the guests' name.

A room imports, of this wing, only the rooms named with it; * is pure: no asyncio, files, sockets, clock::

    room          |   | what lives there                                   | imports
    frames        | * | ARP and neighbour discovery as bytes               |
    vicinity      | * | what a guest may be told of its IPv6 neighbours    |
    neighbours    |   | packets on taps and uplinks: questions and answers | frames vicinity
    announcements |   | when an address is announced, and again            |
    presence      |   | guests' addresses on the LAN: announced, defended  | vicinity neighbours announcements
"""
