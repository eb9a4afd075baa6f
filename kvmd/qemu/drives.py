"""Disks and CDs as QEMU's arguments: of each the nodes of its image, and its device."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Literal, NamedTuple

from kvmd.guest import BACKED_FORMATS, CD_BUS, Guest
from kvmd.profile import PROFILES


class Layer(NamedTuple):
    """One image of a chain: its descriptor, its format, and the descriptors of a VMDK's extents in other files."""

    fd: int
    format: str
    extents: Sequence[int] = ()


Image = Sequence[Layer]


# How a drive attaches to its bus; ``n`` counts the drives of that bus.
_ATTACH = {
    "virtio": "virtio-blk-{virtio}",
    "nvme": "nvme,serial={id}",
    "scsi": "scsi-{kind},bus=scsi0.0",
    "sata": "ide-{kind},bus={ahci}.{n}",
    "ide": "ide-{kind},bus=ide.{channel},unit={unit}",
}


@dataclass(frozen=True, slots=True)
class _Drive:
    id: str
    kind: Literal["hd", "cd"]
    bus: str
    path: Path | None
    readonly: bool
    image: Image


MEDIA = 1_000_000  # the first descriptor set of what is in CD drives; each has two, which take turns
TURNS = (0, 1)


def medium_set(cdrom: str, turn: int) -> int:
    """The number of the descriptor set of what is in a CD drive, or comes into it next."""
    return MEDIA + len(TURNS) * int(cdrom.removeprefix("cdrom")) + turn


def medium_name(cdrom: str, turn: int) -> str:
    """The node of what is in a CD drive, or comes into it next; its file has ``-file`` behind it."""
    return f"{cdrom}-{turn}" if turn else cdrom


def medium_nodes(cdrom: str, turn: int, path: Path) -> list[dict[str, object]]:
    """What ``blockdev-add`` takes of it, the lower node first."""
    name = medium_name(cdrom, turn)
    return [
        _file_node(f"{name}-file", path, medium_set(cdrom, turn), readonly=True),
        {"driver": "raw", "node-name": name, "file": f"{name}-file", "read-only": True, "discard": "unmap"},
    ]


def bootindex(indexes: Mapping[str, int], id: str) -> str:
    return f",bootindex={indexes[id]}" if id in indexes else ""


def drive_args(guest: Guest, images: Sequence[Image], indexes: Mapping[str, int]) -> list[str]:
    """Disks and CDs: the controllers they need, then of each its layers and its device."""
    virtio = "device" if guest.board == "microvm" else "pci"
    drives = _plan_drives(guest, images)
    buses = {drive.bus for drive in drives}

    args = []
    if "scsi" in buses:
        scsi = "virtio-scsi-device" if guest.board == "microvm" else PROFILES[guest.profile].scsi
        args += ["-device", f"{scsi},id=scsi0"]
    if "sata" in buses and guest.board == "pc":
        args += ["-device", "ahci,id=sata0"]
    on_bus: Counter[str] = Counter()
    sets = count(1)
    for drive in drives:
        args += _layers(drive, count(medium_set(drive.id, 0)) if drive.id.startswith("cdrom") else sets)
        n = on_bus[drive.bus]
        on_bus[drive.bus] += 1
        device = _ATTACH[drive.bus].format(
            id=drive.id,
            kind=drive.kind,
            virtio=virtio,
            ahci="ide" if guest.board == "q35" else "sata0",
            n=n,
            channel=n // 2,
            unit=n % 2,
        )
        device += f",drive={drive.id}" if drive.image else ""
        args += ["-device", f"{device},id={drive.id}" + bootindex(indexes, drive.id)]
    return args


def _plan_drives(guest: Guest, images: Sequence[Image]) -> list[_Drive]:
    disks, rest = images[: len(guest.disks)], images[len(guest.disks) :]
    cds, seeds = rest[: len(guest.cdroms)], rest[len(guest.cdroms) :]
    known = PROFILES[guest.profile].virtio  # the kernels of cloud images may have drivers for nothing else
    kind: Literal["hd", "cd"] = "hd" if known else "cd"
    bus = "virtio" if known else CD_BUS[guest.board]
    return [
        *(
            _Drive(f"disk{number}", "hd", disk.bus, disk.path, disk.readonly, image)
            for number, (disk, image) in enumerate(zip(guest.disks, disks, strict=True))
        ),
        *(
            _Drive(f"cdrom{number}", "cd", CD_BUS[guest.board], cdrom.path, True, image)
            for number, (cdrom, image) in enumerate(zip(guest.cdroms, cds, strict=True))
        ),
        *(_Drive("seed", kind, bus, Path("seed"), True, seed) for seed in seeds),
    ]


def _layers(drive: _Drive, sets: Iterator[int]) -> list[str]:
    """The nodes of an image, the lowest first, each on the descriptor set it may open and reopen.

    The chain is spelled out: left to itself QEMU would look for the backing file beside /dev/fdset.
    """
    args: list[str] = []
    below = None
    for depth, layer in reversed(list(enumerate(drive.image))):
        name = drive.id if depth == 0 else f"{drive.id}-{depth}"
        readonly = drive.readonly or depth > 0
        files = {"file": layer.fd} | {f"extents.{number}": fd for number, fd in enumerate(layer.extents)}
        node: dict[str, object] = {"driver": layer.format, "node-name": name}
        for child, fd in files.items():
            number = next(sets)
            node[child] = f"{name}-{child}"
            path = drive.path if depth == 0 else None
            file = _file_node(f"{name}-{child}", path, number, readonly=readonly)
            args += ["-add-fd", f"set={number},fd={fd}", "-blockdev", json.dumps(file)]
        node |= {"read-only": readonly, "discard": "unmap"}
        if layer.format in BACKED_FORMATS:
            node["backing"] = below
        args += ["-blockdev", json.dumps(node)]
        below = name
    return args


def _file_node(name: str, path: Path | None, number: int, *, readonly: bool) -> dict[str, object]:
    return {
        "driver": _protocol(path),
        "node-name": name,
        "filename": f"/dev/fdset/{number}",
        "read-only": readonly,
        "discard": "unmap",
    }


def _protocol(path: Path | None) -> str:
    """QEMU wants to know what it reads: a block device lies in /dev, a regular file anywhere else."""
    return "host_device" if path and path.is_relative_to("/dev") and not path.is_relative_to("/dev/shm") else "file"
