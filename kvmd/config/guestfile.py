"""Guest files: text → ``Guest``, or every problem of the file with its line and key.

A file is read in three steps: TOML (``toml_lines``), each key by itself by the tables below (``values``, ``limits``),
then what keys say together. kvmd.conf goes the same way; what it says lies underneath every guest's file, ``[disk]``
and ``[network]`` under every entry of that kind.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any
from uuid import UUID, uuid5

from kvmd.config.claims import GuestFile, conflicts, own_conflicts
from kvmd.config.schema import GUEST, HOST, WORKING, Key, Table
from kvmd.config.toml_lines import Document, KeyPath, show
from kvmd.config.values import Wrong, either
from kvmd.errors import InvalidConfiguration, Problem
from kvmd.guest import (
    BACKED_FORMATS,
    BOARD_BUSES,
    CD_BUS,
    NAME,
    Board,
    Boot,
    Cdrom,
    Disk,
    Guest,
    Nic,
    Serial,
    Vsock,
    board,
)

__all__ = ["GuestFile", "HostIds", "conflicts", "parse", "parse_defaults"]

Values = Mapping[str, Any]

IFNAME_MAX = 15
DAEMON = "kvmd"  # SYSLOG_IDENTIFIER= of its messages, as a guest's name is of its lines
_UUIDS = UUID("b3d5a9c2-6d0f-4c0e-9f55-6b1a3c8f7e21")  # kvmd's own, so that no one else derives the same


@dataclass(frozen=True)
class HostIds:
    """What makes derived addresses differ from host to host."""

    machine_id: str


# How many drives a bus takes; of the others there is one for each drive.
ROOM = {"sata": 6, "ide": 4}

# What a system from before virtio has drivers for.
LEGACY_BUS: Mapping[Board, str] = {"q35": "sata", "pc": "ide", "microvm": "virtio"}
LEGACY_MODEL: Mapping[Board, str] = {"q35": "rtl8139", "pc": "rtl8139", "microvm": "virtio"}


def parse(text: str | bytes, file: Path, host: HostIds, defaults: Values = {}) -> GuestFile:  # noqa: B006
    """The guest of a file named after it. Raises ``InvalidConfiguration`` with every problem of the file."""
    document = Document(text, file)
    reader = _Reader(document)
    name = file.stem
    if not NAME.fullmatch(name) or name == DAEMON:
        hint = "name the file with letters, digits and _ . - only, a letter or digit first, at most 63 characters"
        hint = "the daemon logs by that name" if name == DAEMON else hint
        reader.problems.append(Problem(str(file), 1, "", f"{show(name)} cannot be the name of a guest", hint))
        name = "unnamed"
    said = reader.table(GUEST, document.values)
    values = _settle(_underlay(GUEST, said, defaults), said)
    reader.problems += (document.problem(*problem) for problem in _disagreements(values))
    guest = GuestFile(_build(name, file, values, host), document)
    reader.problems += own_conflicts(guest)
    if reader.problems:
        raise InvalidConfiguration(reader.problems)
    return guest


def parse_defaults(text: str | bytes, file: Path) -> Values:
    """What kvmd.conf says, for every guest and of the host, for ``parse``. Raises ``InvalidConfiguration``."""
    document = Document(text, file)
    reader = _Reader(document, host=True)
    defaults = reader.table(Table({**GUEST.keys, **HOST.keys}), document.values)
    if reader.problems:
        raise InvalidConfiguration(reader.problems)
    return defaults


class _Reader:
    """Reads tables by their ``Key``s. A key that cannot be used is None in what ``table`` returns."""

    def __init__(self, document: Document, *, host: bool = False) -> None:
        self.problems: list[Problem] = []
        self._document = document
        self._host = host

    def table(self, table: Table, said: Mapping[str, Any], path: KeyPath = ()) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, value in said.items():
            here = (*path, name)
            try:
                values[name] = self._value(table, name, value, here)
                self._refuse_unsupported(values[name], value, here)
            except* Wrong as group:
                values[name] = None
                wrongs = [error for error in group.exceptions if isinstance(error, Wrong)]
                self.problems += (self._document.problem(here, wrong.what, wrong.hint) for wrong in wrongs)
        for name, key in table.keys.items():
            if isinstance(key, Key) and key.required and not self._host and name not in said:
                self.problems.append(self._document.problem((*path, name), "is missing", "every entry needs it"))
        return values

    def _value(self, table: Table, name: str, value: object, path: KeyPath) -> Any:
        key = table.keys.get(name, table.other)
        match key:
            case None:
                raise Wrong(*_unknown(name, table))
            case Key() if self._host and not key.host:
                raise Wrong("belongs to one guest", "set it in the guest's own file")
            case Key():
                return key.parse(value)
            case Table(entries=True) if not self._host:
                if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
                    raise Wrong(f"{show(value)} is not a list of tables", f"write [[{name}]]")
                return [self.table(key, entry, (*path, position)) for position, entry in enumerate(value)]
        if not isinstance(value, dict):
            raise Wrong(f"{show(value)} is not a table", f"write [{name}]")
        return self.table(key, value, path)

    def _refuse_unsupported(self, value: object, said: object, path: KeyPath) -> None:
        working = WORKING.get(tuple(part for part in path if isinstance(part, str)))
        if working is not None and value not in working:
            shown = f"{show(said)} is " if isinstance(value, str | bool) else ""
            raise Wrong(f"{shown}not supported by this version of kvmd", "remove it")


def _unknown(name: str, table: Table) -> tuple[str, str]:
    """An unknown key, and what was meant perhaps."""
    if table is GUEST and name in HOST.keys:
        return "belongs to the host", "set it in /etc/kvmd/kvmd.conf"
    close = difflib.get_close_matches(name, table.keys, n=1)
    if close:
        return "unknown key", f"did you mean {close[0]}?"
    home = next((table for table, keys in GUEST.keys.items() if isinstance(keys, Table) and name in keys.keys), None)
    return "unknown key", f"does it belong under {home}?" if home else "remove it"


def _underlay(table: Table, said: Values, defaults: Values) -> dict[str, Any]:
    """What the file says, and below it what the defaults say."""
    merged = {**{name: value for name, value in defaults.items() if name in table.keys}, **said}
    for name, key in table.keys.items():
        if isinstance(key, Table):
            below, above = defaults.get(name) or {}, said.get(name)
            if key.entries:
                merged[name] = [{**below, **entry} for entry in above or ()]
            else:
                merged[name] = {**below, **(above or {})}
    return merged


def _settle(values: dict[str, Any], said: Values) -> dict[str, Any]:
    """Fill in what depends on the machine and the profile, and drop what is inherited but of no use here."""
    values["machine"] = values.get("machine") or "q35"
    kind = board(values["machine"])
    legacy = values.get("profile") == "legacy"
    if "kernel" not in values["boot"]:
        _drop(values["boot"], said.get("boot") or {}, "initrd", "cmdline")
    for disk, own in zip(values["disk"], said.get("disk") or (), strict=True):
        disk["bus"] = disk.get("bus") or (LEGACY_BUS[kind] if legacy else "virtio")
        if disk.get("readonly"):
            _drop(disk, own, "size", "base")
        if disk.get("format", "qcow2") not in BACKED_FORMATS:
            _drop(disk, own, "base", "backing")
        if not disk.get("base"):
            _drop(disk, own, "base_format")
    for nic, own in zip(values["network"], said.get("network") or (), strict=True):
        nic["model"] = nic.get("model") or (LEGACY_MODEL[kind] if legacy else "virtio")
        if not own.get("address"):
            _drop(nic, own, "configure")
    serial, vsock = said.get("serial") or {}, said.get("vsock") or {}
    if vsock.get("ready"):
        _drop(values["serial"], serial, "ready")
    if serial.get("ready") or kind == "microvm":
        _drop(values["vsock"], vsock, "ready")
    return values


def _drop(values: dict[str, Any], own: Values, *names: str) -> None:
    for name in names:
        if name not in own:
            values.pop(name, None)


def _disagreements(values: Values) -> Iterator[tuple[KeyPath, str, str]]:
    """What keys say that cannot be true together: path, what is wrong, what to do."""
    for name in ("initrd", "cmdline"):
        if name in values["boot"] and "kernel" not in values["boot"]:
            yield ("boot", name), "there is no kernel to go with it", "set boot.kernel, or remove it"

    machine, kind = values["machine"], board(values["machine"])
    drives: Counter[str] = Counter()
    for position, disk in enumerate(values["disk"]):
        path: KeyPath = ("disk", position)
        if disk.get("readonly"):
            for name in ("size", "base"):
                if disk.get(name):
                    yield (*path, name), "a read-only disk is not created", f"remove {name} or readonly"
        for name in ("base", "backing"):
            if disk.get(name) and disk.get("format") not in (None, *BACKED_FORMATS):
                yield (*path, name), f"{disk['format']} has no backing images", 'set format = "qcow2"'
        if disk.get("base_format") and "base" not in disk:
            yield (*path, "base_format"), "there is no base to be of that format", "set base, or remove it"
        bus = disk["bus"]
        drives[bus] += 1
        if bus not in BOARD_BUSES[kind]:
            yield (*path, "bus"), f"{machine} has no {bus}", f"write {either(BOARD_BUSES[kind])}"
        elif drives[bus] > ROOM.get(bus, drives[bus]):
            yield path, f"{machine} takes only {ROOM[bus]} {bus} drives", 'set bus = "virtio" or "scsi"'
        if disk.get("readonly") and bus in ("sata", "ide"):
            yield (*path, "readonly"), f"a {bus} disk cannot be read-only", 'set bus = "virtio" or "scsi"'
    for position in range(len(values["cdrom"])):
        drives[CD_BUS[kind]] += 1
        if drives[CD_BUS[kind]] > ROOM.get(CD_BUS[kind], drives[CD_BUS[kind]]):
            yield ("cdrom", position), f"{machine} takes only {ROOM[CD_BUS[kind]]} {CD_BUS[kind]} drives", "remove one"

    for position, nic in enumerate(values["network"]):
        if kind == "microvm" and nic["model"] != "virtio":
            yield ("network", position, "model"), f"microvm has no {nic['model']}", 'write "virtio"'
        if nic.get("tap") and nic["tap"] == nic.get("uplink"):
            yield ("network", position, "tap"), f"{show(nic['tap'])} is the uplink", "give the tap a name of its own"
        if nic.get("configure") and nic.get("address", ()) == ():
            yield ("network", position, "configure"), "there is no address to configure", "set address, or remove it"
        if nic.get("configure") and not re.fullmatch(r"[A-Za-z0-9_.-]+", nic.get("tap") or "tap"):
            what = f"{show(nic['tap'])} cannot be the name where configure is true"
            yield ("network", position, "tap"), what, 'use letters, digits and "_.-"'

    if values["vsock"].get("ready"):
        if values["serial"].get("ready"):
            yield ("vsock", "ready"), "serial.ready is set, too", "a guest says it in one way: remove one of them"
        if kind == "microvm":
            yield ("vsock", "ready"), "microvm has no SMBIOS to tell the guest how", "use serial.ready"


def _build(name: str, file: Path, values: Values, host: HostIds) -> Guest:
    """The guest, with what the file leaves open filled in. What could not be used counts as left open."""
    plain = {key: value for key, value in values.items() if not isinstance(GUEST.keys.get(key), Table)}
    return Guest(
        **{"name": name, "file": file, "uuid": uuid5(_UUIDS, f"{host.machine_id} {name}"), **_given(plain)},
        boot=Boot(**_given(values["boot"])),
        disks=tuple(Disk(**{"path": Path(), **_given(disk)}) for disk in values["disk"]),
        cdroms=tuple(Cdrom(**{"path": Path(), **_given(cdrom)}) for cdrom in values["cdrom"]),
        nics=_related(_nic(name, position, _given(nic), host) for position, nic in enumerate(values["network"])),
        serial=Serial(**_given(values["serial"])),
        vsock=Vsock(**_given(values["vsock"])),
        limits=_given(values["limits"]),
        qemu_args=values["qemu"].get("args") or (),
    )


def _given(values: Values) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _nic(name: str, position: int, values: dict[str, Any], host: HostIds) -> Nic:
    digest = hashlib.sha256(f"{host.machine_id} {name} {position}".encode()).hexdigest()
    return Nic(
        tap=values.pop("tap", derived_tap(name, position)),
        mac=values.pop("mac", f"52:54:00:{digest[:2]}:{digest[2:4]}:{digest[4:6]}"),
        addresses=values.pop("address", ()),
        routes=values.pop("route", ()),
        **values,
    )


def _related(nics: Iterable[Nic]) -> tuple[Nic, ...]:
    """Of one guest: each knows what the others have."""
    given = [(nic, (*nic.addresses, *nic.routes)) for nic in nics]
    return tuple(replace(nic, kin=tuple(chain(*(has for other, has in given if other is not nic)))) for nic, _ in given)


def derived_tap(name: str, position: int) -> str:
    """``kv-NAME``, of the second interface ``kv2-NAME``; where that is too long its beginning and a hash."""
    tap = f"kv{position + 1 if position else ''}-{name}"
    if len(tap) <= IFNAME_MAX:
        return tap
    return f"{tap[:8]}-{hashlib.sha256(tap.encode()).hexdigest()[:6]}"
