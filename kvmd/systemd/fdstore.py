"""File descriptors that PID 1 holds while there is no daemon (sd_pid_notify_with_fds(3), FDSTORE=1).

Between two daemons a guest may write and end; as long as somebody holds its FIFOs, what it wrote stays in them. And it
may say that it is ready, to a socket that must be there.
"""

from __future__ import annotations

import os
from collections.abc import Collection

from systemd import daemon


def keep(name: str, fd: int) -> None:
    """Have PID 1 hold ``fd`` too, until ``drop``. Where nobody listens nothing happens."""
    daemon.notify(f"FDSTORE=1\nFDNAME={name}", fds=[fd])


def drop(name: str) -> None:
    daemon.notify(f"FDSTOREREMOVE=1\nFDNAME={name}")


def find(name: str) -> int | None:
    """What an earlier daemon had held as ``name``, until ``release_inherited``; the caller closes it."""
    for fd, held in daemon.listen_fds_with_names(unset_environment=False).items():
        if held == name:
            return os.dup(fd)
    return None


def release_inherited(guests: Collection[str | None]) -> None:
    """Close our copies of what was held, as a FIFO is opened again by its name; only for ``guests`` go on."""
    for fd, name in daemon.listen_fds_with_names(unset_environment=True).items():
        os.close(fd)
        if name.rpartition(".")[0] not in guests:
            drop(name)
