"""kvmctl: the command line, a client of the D-Bus API. It loads nothing of the daemon, and each verb only its own room.

A room imports, of this wing, only the rooms named with it; * is pure: no asyncio, files, sockets, clock::

    room     |   | what lives there                                 | imports
    failure  | * | what a person is told, and the exit status       |
    table    | * | columns, spans of time, sizes, colours           |
    parser   |   | the verbs and their options                      |
    bus      |   | the system bus: calls, changes, who may do it    | failure
    guests   |   | guests as the bus shows them, by their names     | failure bus
    progress |   | what goes on, for whoever waits at a terminal    | table
    hosts    |   | other hosts, by ssh                              | failure
    listing  |   | list, status, top                                | failure table bus guests progress hosts
    console  |   | console                                          | failure bus guests
    steering |   | start, stop, restart, reset, pause, resume       | failure table bus guests progress console
    screen   |   | media, screenshot, view                          | failure table bus guests progress
    files    |   | new, edit, check                                 | failure
    foreign  | * | what other tools write → a guest file            |
    health   |   | facts of a host → findings                       | failure table bus guests
    doctor   |   | doctor                                           | failure table progress health
    imports  |   | import                                           | failure files foreign
    install  |   | install                                          | failure bus guests progress console screen files
    log      |   | log                                              | failure bus guests
    main     |   | arguments, exit status, other hosts              | failure parser hosts
"""
