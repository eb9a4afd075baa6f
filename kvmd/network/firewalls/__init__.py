"""What is dropped: by us, and by others.

A room imports, of this wing, only the rooms named with it; * is pure: no asyncio, files, sockets, clock::

    room       |   | what lives there                                     | imports
    barriers   | * | others' firewalls: which drops what is forwarded     |
    firewall   |   | what a guest may not send                            |
    forwarding |   | the way through others' firewalls, opened if allowed | barriers
"""
