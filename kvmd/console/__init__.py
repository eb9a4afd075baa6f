"""What a guest says on its serial port, and who is there to hear it.

A room imports, of this wing, only the rooms named with it; * is pure: no asyncio, files, sockets, clock::

    room     |   | what lives there                                 | imports
    terminal | * | terminal output as text                          |
    serial   |   | a guest's FIFO → journal entries, each line once | terminal
    reader   |   | a person at a guest's serial port                | serial
    streams  |   | what a guest says: logged, shown at consoles     | reader serial
"""
