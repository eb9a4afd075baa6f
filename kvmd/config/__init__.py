"""The files below /etc/kvmd: text → guests, or every problem with file, line and key.

A room imports, of this wing, only the rooms named with it; * is pure: no asyncio, files, sockets, clock::

    room       |   | what lives there                                     | imports
    toml_lines | * | TOML with line numbers                               |
    values     | * | one value of a guest file: text → what is meant      | toml_lines
    limits     | * | [limits]: systemd's resource settings                | toml_lines values
    schema     | * | the keys of a guest file                             | limits values
    claims     | * | what two guests cannot both have                     | toml_lines
    agreement  | * | what keys say together: what follows, what cannot be | toml_lines values
    guestfile  | * | text → guest, or every problem with line and key     | toml_lines values schema agreement claims
    options    | * | what StartWith is given                              | toml_lines values
    watch      |   | the files of a directory: read, watched              | toml_lines
    directory  |   | all of /etc/kvmd, read at once                       | guestfile watch
"""
