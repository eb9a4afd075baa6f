"""All guests by name: those that have a file, and those that run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from kvmd.config import directory
from kvmd.config.directory import Entry
from kvmd.config.guestfile import HostIds
from kvmd.errors import Busy, NoSuchGuest, NotRunning, Problem
from kvmd.guest import IMAGES, Guest, Nic
from kvmd.guests.known import Known
from kvmd.guests.machine import Machine, State


class Register:
    """Empty until ``read``."""

    def __init__(self, ids: HostIds) -> None:
        self._ids = ids
        self._known: dict[str, Known] = {}
        self.problems: list[Problem] = []
        self.open_firewalls = False

    def __iter__(self) -> Iterator[Known]:
        return iter(self._known.values())

    def read(self) -> tuple[list[str], list[Problem]]:
        """Read the files. Returns the names of all guests that were known or are now, and the problems that are new."""
        found = directory.read(self._ids)
        for name in found.guests:
            self._known.setdefault(name, Known(name))
        names = list(self._known)
        for known in self:
            known.file = found.guests.get(known.name, Entry())
        self._known = {name: known for name, known in self._known.items() if name in found.guests or known.on}
        if found.open_firewalls is not None:
            self.open_firewalls = found.open_firewalls
        news = sorted(set(found.problems) - set(self.problems))
        self.problems = found.problems
        return names, news

    def names(self) -> set[str]:
        """Of guests with a file, usable or not, and of those that run."""
        return set(self._known)

    def add(self, name: str, machine: Machine) -> None:
        """One that an earlier daemon started."""
        self._known.setdefault(name, Known(name)).run = machine

    def find(self, name: str) -> Known | None:
        return self._known.get(name)

    def get(self, name: str) -> Known:
        """Raises ``NoSuchGuest``."""
        known = self._known.get(name)
        if known is None:
            raise NoSuchGuest(f"there is no guest {name} (it would be {directory.DIRECTORY / name}.toml)")
        return known

    def running(self, name: str) -> Machine:
        """The guest's machine. Raises ``NoSuchGuest``, ``NotRunning`` or, while it starts, ``Busy``."""
        known = self.get(name)
        if not known.on or known.run is None:
            raise NotRunning(f"guest {name} is not running")
        if known.state is State.STARTING:
            raise Busy(f"guest {name} is just being started")
        return known.run

    def by_pid(self, pid: int) -> Known:
        """Raises ``NoSuchGuest``."""
        for known in self:
            if pid and known.on and known.run and known.run.pid == pid:
                return known
        raise NoSuchGuest(f"no guest has the process {pid}")

    def by_tap(self, tap: str) -> Known | None:
        for known in self:
            if known.current and any(nic.tap == tap for nic in known.current.nics):
                return known
        return None

    def images(self) -> dict[tuple[int, int], tuple[str, str, bool]]:
        """Those that running guests use, by device and inode: guest, path, whether it is written to."""
        return {
            (device, inode): (known.name, path, write)
            for known in self
            if known.run and known.on
            for device, inode, path, write in (*known.run.steering.media.uses, *known.run.uses)
        }

    def nics(self) -> list[Nic]:
        """Those of running guests as they were started, else as in the files."""
        guests = (known.current for known in self)
        return [nic for guest in guests if guest for nic in guest.nics]

    def said_to_systemd(self) -> dict[str, tuple[bool, str, frozenset[Path]]]:
        """What kvmd-generator makes units of."""
        guests = (known.file.guest for known in self if known.file.guest)
        said = {guest.name: (guest.autostart, guest.restart, _elsewhere(guest)) for guest in guests}
        return {name: about for name, about in said.items() if about != (False, "no", frozenset())}


def _elsewhere(guest: Guest) -> frozenset[Path]:
    """Its images that do not lie where images lie."""
    paths = {guest.boot.kernel, guest.boot.initrd, *(cdrom.path for cdrom in guest.cdroms), guest.display.password_file}
    for disk in guest.disks:
        paths |= {disk.path, disk.base, *disk.backing}
    return frozenset(path for path in paths if path and not path.is_relative_to(IMAGES))
