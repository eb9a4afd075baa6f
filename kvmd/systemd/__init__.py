"""systemd and the bus it is reached by: what a plain host has, arranged and not done again.

A room imports, of this wing, only the rooms named with it; * is pure: no asyncio, files, sockets, clock::

    room      |   | what lives there                                     | imports
    scope     | * | guest → scope properties; names of units and objects |
    journal   |   | entries for journald; kvmd's own events              |
    fdstore   |   | descriptors that PID 1 holds between two daemons     |
    message   |   | D-Bus messages, header before body, by dbus-next     |
    transport |   | the socket to the system bus: messages in and out    | message
    sysbus    |   | calls, signals, and what others call                 | message transport
    polkit    |   | may the caller do this: root, or as polkit says      | sysbus
    units     |   | jobs, scopes and units of systemd                    | sysbus
    watchdog  |   | the daemon itself as a service: well, or in a loop   | sysbus units
"""
