"""Guests as the bus shows them, chosen by names and patterns."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from kvmd.ctl.bus import GUEST, OBJECT_MANAGER, ROOT, Bus
from kvmd.ctl.failure import NO_SUCH_GUEST, Failure

SYSTEMD, UNITS = "org.freedesktop.systemd1", "/org/freedesktop/systemd1/unit"


@dataclass
class Guest:
    """``properties`` are those of org.kvmd1.Guest, without their variants."""

    path: str
    properties: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.properties["Name"])

    @property
    def state(self) -> str:
        return str(self.properties["State"])

    @property
    def on(self) -> bool:
        return bool(self.properties["PID"])

    @property
    def addresses(self) -> list[str]:
        return [address for network in self.properties["Networks"] for address in network["addresses"]]


def plain(value: Any) -> Any:
    """Without variants, as JSON has it."""
    if hasattr(value, "signature") and hasattr(value, "value"):
        return plain(value.value)
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [plain(each) for each in value]
    return value


async def all_guests(bus: Bus) -> list[Guest]:
    """By their names."""
    objects = await bus.call(ROOT, OBJECT_MANAGER, "GetManagedObjects")
    found = [Guest(path, plain(interfaces[GUEST])) for path, interfaces in objects.items() if GUEST in interfaces]
    return sorted(found, key=lambda guest: guest.name)


async def choose(bus: Bus, wanted: Sequence[str]) -> tuple[list[Guest], list[Failure]]:
    """Those of these names and patterns, in their order, each once; and what cannot be found. None wanted is all."""
    there = await all_guests(bus)
    if not wanted:
        return there, []
    found: dict[str, Guest] = {}
    missing: list[Failure] = []
    for word in wanted:
        matching = [guest for guest in there if guest.name == word or fnmatchcase(guest.name, word)]
        found.update((guest.name, guest) for guest in matching)
        if not matching:
            missing.append(await _missing(bus, word))
    return list(found.values()), missing


async def one(bus: Bus, name: str) -> Guest:
    """Raises ``Failure``."""
    found, missing = await choose(bus, [name])
    if missing:
        raise missing[0]
    if len(found) > 1:
        raise Failure(f"{name} is more than one guest: {', '.join(guest.name for guest in found)}")
    return found[0]


async def _missing(bus: Bus, word: str) -> Failure:
    if any(char in word for char in "*?["):
        return Failure(f"no guest is called as {word}", status=NO_SUCH_GUEST)
    try:
        await bus.call(ROOT, "org.kvmd1.Manager", "GetGuest", "s", word)
    except Failure as failure:  # there is none, or its file cannot be used
        return failure
    return Failure(f"there is no guest {word}", status=NO_SUCH_GUEST)


async def usage(bus: Bus, guests: Sequence[Guest]) -> dict[str, tuple[int, int]]:
    """Of those that are on, bytes of memory and nanoseconds of CPU time of their scopes; 0 if not counted."""
    on = [guest for guest in guests if guest.on]

    async def get(guest: Guest, name: str) -> int:
        words = ("Get", "ss", "org.freedesktop.systemd1.Scope", name)  # of two hundred that there are
        path = f"{UNITS}/{label(f'kvmd-{guest.name}.scope')}"
        try:
            value = plain(await bus.call(path, "org.freedesktop.DBus.Properties", *words, destination=SYSTEMD))
        except Failure:
            return 0
        return value if isinstance(value, int) and value < (1 << 64) - 1 else 0

    async def ask(guest: Guest) -> tuple[int, int]:
        memory, cpu = await asyncio.gather(get(guest, "MemoryCurrent"), get(guest, "CPUUsageNSec"))
        return memory, cpu

    return dict(zip((guest.name for guest in on), await asyncio.gather(*map(ask, on)), strict=True))


def label(name: str) -> str:
    """As an element of an object path: systemd's bus_label_escape()."""
    kept = re.compile(r"[A-Za-z]|(?<=.)[0-9]", re.ASCII)
    escaped = (char if kept.match(name, at) else f"_{ord(char):02x}" for at, char in enumerate(name))
    return "".join(escaped) or "_"
