"""File descriptors that PID 1 holds while there is no daemon (sd_pid_notify_with_fds(3), FDSTORE=1).

Between two daemons a guest may write and end; as long as somebody holds its FIFOs, what it wrote stays in them.
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


def release_inherited(guests: Collection[str | None]) -> None:
    """Close our copies of what was held, since every FIFO is opened again by its name; only for ``guests`` go on."""
    for fd, name in daemon.listen_fds_with_names(unset_environment=True).items():
        os.close(fd)
        if name.rpartition(".")[0] not in guests:
            drop(name)
