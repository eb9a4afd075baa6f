"""What is known of a host. None, or "", is what could not be seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Device:
    """``mode`` without the kind; ``usable``: whoever asks can open it."""

    mode: int
    group: str
    usable: bool


@dataclass(frozen=True)
class Space:
    """Bytes of a file system; ``where`` is the directory that was there to be asked about."""

    where: str
    free: int
    size: int


@dataclass(frozen=True)
class Guest:
    name: str
    state: str
    on: bool
    reason: str
    changed: bool
    networks: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Bus:
    """``problem``: why there is no bus; ``names`` can be reached; ``daemon``: kvmd answers, by its ``version``."""

    problem: str = ""
    names: frozenset[str] = frozenset()
    silent: str = ""  # why the daemon does not answer
    version: str = ""
    accelerator: str = ""
    problems: tuple[str, ...] = ()
    guests: tuple[Guest, ...] = ()

    @property
    def daemon(self) -> bool:
        return bool(self.version)


@dataclass(frozen=True)
class Link:
    """``lan``: has neighbours, which tunnels have not."""

    name: str
    lan: bool


@dataclass(frozen=True)
class Facts:
    user: str = "root"
    may: str = "yes"  # or "no", "asks": whether it may steer guests, as polkit says
    cpuinfo: str = ""
    firmware_complaint: str | None = ""  # the kernel's
    virtualised: str = "none"  # by systemd-detect-virt(1)
    container: bool = False
    modules: frozenset[str] = frozenset()
    nested: str = ""  # the parameter of kvm_intel or kvm_amd
    devices: Mapping[str, Device] = field(default_factory=dict)
    kernel: str = ""
    systemd: str = ""
    qemu: str = ""
    kvmctl: str = ""
    tools: frozenset[str] = frozenset()  # programs, and what else is looked for
    bus: Bus = Bus()
    uplinks: Mapping[int, Link | None] | None = None  # by IP version: of the default route
    forwarding: Mapping[int, bool | None] = field(default_factory=dict)
    taps: tuple[str, ...] = ()
    tagged: tuple[str, ...] = ()  # routes and neighbours with kvmd's protocol number
    spaces: Mapping[str, Space] = field(default_factory=dict)
    journal_kept: bool | None = True
    ranges: Mapping[str, str] = field(default_factory=dict)  # of kvmd-qemu: file → first number and count
    synchronised: bool | None = True
    year: int = 2026
