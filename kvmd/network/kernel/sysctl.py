"""The kernel's settings below /proc/sys/net, and the journal of what they were before.

The journal is written before the first setting is, atomically: a daemon killed in between finds it at its next start.
It lies in /run: a reboot forgets both. A setting goes back only if it still has the value given here; whoever changed
it since meant it.
"""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from kvmd.network.model.things import ALL, Failure, Operation, Setting

ROOT = "/proc/sys/net"
DEFAULT = -1  # net.ipvX.conf.default, where a Setting has an interface index
_FIXED = {ALL: "all", DEFAULT: "default"}

Key = tuple[str, int, str]
FORWARDING: Key = ("ipv6/conf", ALL, "forwarding")


class Sysctls:
    """Settings of this network namespace. Every call blocks, for some 10 µs per setting: procfs answers at once."""

    def __init__(self, journal: Path, name: Callable[[int], str | None]) -> None:
        """``journal``: a file that survives the daemon, its directory is made. ``name``: of an interface by index."""
        self._name = name
        self._journal = journal
        self._before: dict[Key, tuple[int, int | None]] = {}  # value before, value given (None: copied by the kernel)
        with suppress(FileNotFoundError, ValueError, TypeError):  # none yet, or none of ours
            entries = json.loads(journal.read_text())
            self._before = {(table, device, name): (before, given) for table, device, name, before, given in entries}

    def present(self, wanted: Iterable[Setting]) -> list[Setting]:
        """What ``wanted`` are now; without those this kernel has not."""
        values = ((setting, self._read(*_key(setting))) for setting in wanted)
        return [replace(setting, value=value) for setting, value in values if value is not None]

    def remembered(self) -> list[Setting]:
        """What has been changed and not been put back, in the order of change; forgets interfaces that are gone."""
        present = []
        for key, (_before, given) in list(self._before.items()):
            value = self._read(*key)
            if value is None:
                del self._before[key]
            elif given is not None:
                present.append(Setting(*key, value))
        return present

    def learners(self, indices: Iterable[int]) -> tuple[int, ...]:
        """Of these interfaces, those that take router advertisements only while not forwarding.

        An interface born while kvmd has made the host forward would have taken them too, had it not.
        """
        ours = FORWARDING in self._before

        def learns(index: int) -> bool:
            if ("ipv6/conf", index, "accept_ra") in self._before:
                return True
            if self._read("ipv6/conf", index, "accept_ra") != 1:
                return False
            return ours or not self._read("ipv6/conf", index, "forwarding")

        return tuple(index for index in indices if learns(index))

    def four_only(self, indices: Iterable[int]) -> tuple[int, ...]:
        """Of these interfaces, those on which IPv6 is switched off."""
        return tuple(index for index in indices if self._read("ipv6/conf", index, "disable_ipv6"))

    def apply(self, operations: Sequence[Operation], volatile: Iterable[int] = ()) -> list[Failure]:
        """In order; to remove is to put back. ``volatile``: interfaces that end with their guest, not journaled."""
        settings = {item: item.thing for item in operations if isinstance(item.thing, Setting)}
        forget = set(volatile)
        try:
            self._remember(
                thing for item, thing in settings.items() if item.action != "remove" and thing.device not in forget
            )
        except OSError as error:
            text = f"cannot write {self._journal}: {error.strerror}"
            return [Failure(operation, error.errno or errno.EIO, text) for operation in operations]
        failures = []
        for operation, setting in settings.items():
            try:
                if operation.action == "remove":
                    self._restore(_key(setting))
                else:
                    self._write(_key(setting), setting.value)
            except OSError as error:
                failures.append(Failure(operation, error.errno or errno.EIO, error.strerror or str(error)))
        if any(operation.action == "remove" for operation in operations):
            with suppress(OSError):  # an entry too many does no harm: it goes back only where it still is ours
                self._save()
        return failures

    def _remember(self, settings: Iterable[Setting]) -> None:
        """Note what ``settings`` are now, in the journal, before they are written."""
        size = len(self._before)
        for setting in settings:
            key = _key(setting)
            if key in self._before or (value := self._read(*key)) is None:
                continue
            if key == FORWARDING:
                self._remember_copies(value)
            self._before[key] = (value, setting.value)
        if len(self._before) != size:
            self._save()

    def _restore(self, key: Key) -> None:
        before, given = self._before.pop(key, (0, None))
        if given is None or self._read(*key) != given:
            return
        if key[0] == "ipv4/conf" and key[2] == "forwarding" and self._read("ipv4/conf", ALL, "forwarding"):
            return  # kvmd never sets ip_forward: somebody else made this host a router meanwhile
        self._write(key, before)
        if key == FORWARDING:
            for copy, (value, by_us) in list(self._before.items()):
                if by_us is None:
                    del self._before[copy]
                    self._write(copy, value)

    def _remember_copies(self, value: int) -> None:
        """Writing `all` writes every interface and `default` (net/ipv6/addrconf.c, addrconf_forward_change)."""
        for index in (DEFAULT, *(index for index, _name in socket.if_nameindex())):
            own = self._read("ipv6/conf", index, "forwarding")
            if own is not None and own != value:
                self._before.setdefault(("ipv6/conf", index, "forwarding"), (own, None))

    def _read(self, table: str, device: int, name: str) -> int | None:
        """None where there is no such setting, or no such interface any more."""
        try:
            fd = os.open(self._path(table, device, name), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            return int(os.read(fd, 64))
        except (OSError, ValueError):
            return None
        finally:
            os.close(fd)

    def _write(self, key: Key, value: int) -> None:
        """Raises OSError; not for an interface that has just gone."""
        if key[2] == "forwarding" and self._read(*key) == value:
            return  # `all` has just set it; and to write 1 once more would purge learnt default routes
        try:
            fd = os.open(self._path(*key), os.O_WRONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            os.write(fd, b"%d" % value)
        finally:
            os.close(fd)

    def _path(self, table: str, device: int, name: str) -> str:
        """Interfaces are renamed, so paths are made when they are needed. Raises FileNotFoundError: it has gone."""
        interface = _FIXED.get(device) or self._name(device)
        if interface is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{ROOT}/{table}/{device}")
        return f"{ROOT}/{table}/{interface}/{name}"

    def _save(self) -> None:
        if not self._before:
            self._journal.unlink(missing_ok=True)
            return
        new = self._journal.with_suffix(".new")
        self._journal.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        new.write_text(json.dumps([[*key, *values] for key, values in self._before.items()]))
        new.replace(self._journal)


def _key(setting: Setting) -> Key:
    return setting.table, setting.device, setting.name
