"""The things kvmd has the kernel hold, each a value with a key: two with the same key cannot be there at once. Pure.

Those that can carry it have protocol number 171 (RTA_PROTOCOL, NDA_PROTOCOL, IFA_PROTO), so that they can be told from
all others.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from kvmd.guest import Address, Network
from kvmd.network.model.host import Interface

PROTOCOL = 171
ALL = 0  # net.ipvX.conf.all, where a Setting wants an interface index


@dataclass(frozen=True, slots=True)
class Setting:
    """``/proc/sys/net/TABLE/INTERFACE/NAME`` (ip-sysctl.rst); ``device`` an interface index or ``ALL``."""

    table: str
    device: int
    name: str
    value: int

    @property
    def key(self) -> tuple[object, ...]:
        return ("setting", self.table, self.device, self.name)

    def __str__(self) -> str:
        return describe(self, f"interface {self.device}")


@dataclass(frozen=True, slots=True)
class LinkState:
    """MAC, MTU and administrative state of a tap."""

    device: int
    mac: str
    mtu: int
    up: bool = True

    @property
    def key(self) -> tuple[object, ...]:
        return ("link", self.device)

    def __str__(self) -> str:
        return f"tap up, MAC {self.mac}, MTU {self.mtu}"


@dataclass(frozen=True, slots=True)
class TapAddress:
    """An address of the host's on a tap, for a server there and nothing else: no route, never chosen as source."""

    device: int
    interface: Interface

    @property
    def key(self) -> tuple[object, ...]:
        return ("address", self.device, self.interface)

    def __str__(self) -> str:
        return f"address {self.interface} on the tap"


@dataclass(frozen=True, slots=True)
class Route:
    """A route to a guest; ``source`` is the address the host itself uses towards it (RTA_PREFSRC)."""

    device: int
    prefix: Network
    via: Address | None = None
    source: Address | None = None
    metric: int = 0

    @property
    def key(self) -> tuple[object, ...]:
        return ("route", self.prefix, self.metric, self.device)

    def __str__(self) -> str:
        return f"route to {self.prefix}" + (f" with source {self.source}" if self.source else "")


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A permanent neighbour on a tap: the host never asks for the guest's MAC, with whatever source address."""

    device: int
    address: Address
    mac: str

    @property
    def key(self) -> tuple[object, ...]:
        return ("neighbour", self.device, self.address)

    def __str__(self) -> str:
        return f"neighbour {self.address} with MAC {self.mac}"


@dataclass(frozen=True, slots=True)
class Proxy:
    """The kernel answers ARP and neighbour solicitations on ``device`` for ``address`` (NTF_PROXY)."""

    device: int
    address: Address
    router: bool = False

    @property
    def key(self) -> tuple[object, ...]:
        return ("proxy", self.device, self.address)

    def __str__(self) -> str:
        return f"proxy entry for {self.address}"


def describe(thing: Thing, interface: str) -> str:
    """In words, with the name of its interface; a setting as sysctl(8) takes it."""
    match thing:
        case Setting():
            where = interface if thing.device != ALL else "all"
            return f"net/{thing.table}/{where}/{thing.name}={thing.value}"
        case Neighbour() | Proxy() | Route():
            return f"{thing} on {interface}"
    return str(thing)


Thing = Setting | LinkState | TapAddress | Route | Neighbour | Proxy


@dataclass(frozen=True, slots=True)
class Operation:
    """``add``: must not exist; ``replace``: exists with our tag, as ``was``; ``remove`` a Setting: put it back."""

    action: Literal["add", "replace", "remove"]
    thing: Thing
    was: Thing | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Failure:
    """An operation the kernel refused: errno(3), and why in words."""

    operation: Operation
    code: int
    text: str


def diff(wanted: Iterable[Thing], present: Iterable[Thing]) -> list[Operation]:
    """What to do, in order: first remove what is not wanted, last made first; then what is missing or different."""
    target = {thing.key: thing for thing in wanted}
    held = {thing.key: thing for thing in present}
    surplus = [Operation("remove", held[key]) for key in reversed(held) if key not in target]
    missing = [
        Operation("replace" if key in held else "add", thing, held.get(key))
        for key, thing in target.items()
        if held.get(key) != thing
    ]
    return surplus + missing
