"""What guests want for themselves, and what two of them cannot both have."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_network
from pathlib import Path
from typing import Any

from kvmd.config.toml_lines import Document, KeyPath, show
from kvmd.errors import Problem
from kvmd.guest import Guest


@dataclass(frozen=True)
class GuestFile:
    """A guest and the file it came from, which knows the lines. ``doubts``: what may not be as it was meant."""

    guest: Guest
    document: Document
    doubts: tuple[Problem, ...] = ()


def conflicts(files: Iterable[GuestFile], same: Callable[[Path], Path] = lambda path: path) -> list[Problem]:
    """What guests cannot have at the same time; the blame is on the later one by name.

    ``same``: what an image's path stands for, where that can be known.
    """
    in_order = sorted(files, key=lambda file: (file.guest.name, str(file.guest.file)))
    claims = [claim for file in in_order for claim in _claims(file)]
    real = [replace(claim, value=same(claim.value)) if isinstance(claim.value, Path) else claim for claim in claims]
    return sorted(_clashes(real))


def own_conflicts(file: GuestFile) -> list[Problem]:
    """What one guest wants twice."""
    return _clashes(list(_claims(file)))


@dataclass(frozen=True)
class _Claim:
    """Something a guest wants for itself; with ``shared`` others that say so too may have it."""

    owner: GuestFile
    path: KeyPath
    value: Any
    shared: bool = False

    @property
    def key(self) -> str:
        return str(self.path[-1])

    @property
    def overlaps(self) -> bool:
        """Whether it is a network, which others may lie in."""
        return self.path[0] == "network" and self.key in ("address", "route")


def _claims(file: GuestFile) -> Iterator[_Claim]:
    guest = file.guest
    yield _Claim(file, ("uuid",), guest.uuid)
    for position, disk in enumerate(guest.disks):
        yield _Claim(file, ("disk", position, "path"), disk.path, shared=disk.readonly)
        if disk.base:
            yield _Claim(file, ("disk", position, "base"), disk.base, shared=True)
        yield from (_Claim(file, ("disk", position, "backing"), below, shared=True) for below in disk.backing)
    for position, cdrom in enumerate(guest.cdroms):
        if cdrom.path:
            yield _Claim(file, ("cdrom", position, "path"), cdrom.path, shared=True)
    if guest.display.address:
        yield _Claim(file, ("display", "address"), guest.display.address)
    for position, device in enumerate(guest.usb):
        if device:
            yield _Claim(file, ("usb", position, "device"), device)
    for position, device in enumerate(guest.pci):
        if device:
            yield _Claim(file, ("pci", position, "address"), device)
    for position, nic in enumerate(guest.nics):
        path: KeyPath = ("network", position)
        yield _Claim(file, (*path, "tap"), nic.tap)
        yield _Claim(file, (*path, "mac"), nic.mac)
        yield from (_Claim(file, (*path, "address"), ip_network(address)) for address in nic.addresses)
        yield from (_Claim(file, (*path, "route"), route) for route in nic.routes)


def _clashes(claims: Sequence[_Claim]) -> list[Problem]:
    """One problem for each claim that comes too late, naming the earliest it clashes with."""
    earliest: dict[int, int] = {}
    for pair in itertools.chain(_same(claims), _overlapping(claims)):
        first, later = sorted(pair)
        earliest[later] = min(first, earliest.get(later, first))
    return [_clash(claims[first], claims[later]) for later, first in sorted(earliest.items())]


def _clash(first: _Claim, later: _Claim) -> Problem:
    value = show(_written(later))
    if first.value == later.value:
        what = f"{value} is already used by"
    else:
        what = f"{value} overlaps {show(_written(first))} of"
    whose = "this guest" if first.owner is later.owner else f"guest {first.owner.guest.name}"
    hint = "images can be shared only read-only" if isinstance(later.value, Path) else "choose another"
    return later.owner.document.problem(later.path, f"{what} {whose}", hint)


def _written(claim: _Claim) -> str:
    return str(claim.value.network_address if claim.overlaps and claim.key == "address" else claim.value)


def _same(claims: Sequence[_Claim]) -> Iterator[tuple[int, int]]:
    """Pairs that want the very same tap, MAC, UUID or image."""
    groups: dict[object, list[int]] = {}
    for index, claim in enumerate(claims):
        if not claim.overlaps and claim.value != Path():
            groups.setdefault(claim.value, []).append(index)
    for first, *rest in groups.values():
        exclusive = None if claims[first].shared else first
        for index in rest:
            other = exclusive if claims[index].shared else first
            if other is not None:
                yield other, index
            if exclusive is None and not claims[index].shared:
                exclusive = index


def _overlapping(claims: Sequence[_Claim]) -> Iterator[tuple[int, int]]:
    """Pairs of addresses and prefixes, of different interfaces, one of which is within the other.

    In order of address prefixes nest like brackets, so only those still open can contain the next one.
    """
    indexes = [index for index, claim in enumerate(claims) if claim.overlaps]
    open_: list[int] = []
    for index in sorted(indexes, key=lambda index: (claims[index].value.version, claims[index].value)):
        network = claims[index].value
        while open_ and not claims[open_[-1]].value.overlaps(network):
            open_.pop()
        yield from ((other, index) for other in open_ if not _same_interface(claims[other], claims[index]))
        open_.append(index)


def _same_interface(one: _Claim, other: _Claim) -> bool:
    return one.owner is other.owner and one.path[:2] == other.path[:2]
