"""Guest files: text → ``Guest``, or every problem of the file with its line and key.

A file is read in three steps: TOML (``toml_lines``), each key by itself by the tables below (``values``, ``limits``),
then what keys say together. kvmd.conf goes the same way; what it says lies underneath every guest's file, ``[disk]``
and ``[network]`` under every entry of that kind.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any
from uuid import UUID, uuid5

from kvmd.config.agreement import Values, disagreements, doubts, settle
from kvmd.config.claims import GuestFile, conflicts, own_conflicts
from kvmd.config.schema import GUEST, HOST, Key, Table
from kvmd.config.toml_lines import Document, KeyPath, show
from kvmd.config.values import Wrong
from kvmd.errors import InvalidConfiguration, Problem
from kvmd.guest import (
    NAME,
    Boot,
    Cdrom,
    CloudInit,
    Disk,
    Display,
    Guest,
    Nic,
    Serial,
    Share,
    Vsock,
)

__all__ = ["GuestFile", "HostIds", "conflicts", "parse", "parse_defaults"]

IFNAME_MAX = 15
DAEMON = "kvmd"  # SYSLOG_IDENTIFIER= of its messages, as a guest's name is of its lines
_UUIDS = UUID("b3d5a9c2-6d0f-4c0e-9f55-6b1a3c8f7e21")  # kvmd's own, so that no one else derives the same


@dataclass(frozen=True)
class HostIds:
    """What makes derived addresses, and UUIDs, differ from host to host."""

    machine_id: str


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
    values = settle(_underlay(GUEST, said, defaults), said)
    reader.problems += (document.problem(*problem) for problem in disagreements(values))
    group = defaults.get("group") or {}  # whose hosts are one and the same to a guest
    host = HostIds(group["identity"]) if group.get("identity") else host
    guest = GuestFile(_build(name, file, values, host), document)
    reader.problems += own_conflicts(guest)
    if reader.problems:
        raise InvalidConfiguration(reader.problems)
    return replace(guest, doubts=tuple(document.problem(*doubt) for doubt in doubts(values)))


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


def _build(name: str, file: Path, values: Values, host: HostIds) -> Guest:
    """The guest, with what the file leaves open filled in. What could not be used counts as left open."""
    plain = {key: value for key, value in values.items() if not isinstance(GUEST.keys.get(key), Table)}
    return Guest(
        **{"name": name, "file": file, "uuid": uuid5(_UUIDS, f"{host.machine_id} {name}"), **_given(plain)},
        boot=Boot(**_given(values["boot"])),
        disks=tuple(Disk(**{"path": Path(), **_given(disk)}) for disk in values["disk"]),
        cdroms=tuple(Cdrom(**_given(cdrom)) for cdrom in values["cdrom"]),
        nics=_related(_nic(name, position, _given(nic), host) for position, nic in enumerate(values["network"])),
        serial=Serial(**_given(values["serial"])),
        vsock=Vsock(**_given(values["vsock"])),
        display=Display(**_given(values["display"])),
        limits=_given(values["limits"]),
        credentials=_given(values["credentials"]),
        cloud_init=CloudInit(**_given(values["cloud_init"])) if values["cloud_init"] is not None else None,
        tpm=values["tpm"].get("enabled") or False,
        shares=tuple(Share(**{"path": Path(), "tag": "", **_given(share)}) for share in values["share"]),
        usb=tuple(entry.get("device") or "" for entry in values["usb"]),
        pci=tuple(entry.get("address") or "" for entry in values["pci"]),
        agent=values["agent"].get("enabled") or False,
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
