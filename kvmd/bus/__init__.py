"""What others reach on the system bus: ``org.kvmd1``, as the XML below dbus/ states it.

A room imports, of this wing, only the rooms named with it; * is pure: no asyncio, files, sockets, clock::

    room      |   | what lives there                                       | imports
    interface |   | a D-Bus interface as its XML states it: signatures     |
    callers   |   | who calls, and how much of the daemon's time is theirs |
    service   |   | the objects: authorise, one call of the manager, reply | interface callers
"""
