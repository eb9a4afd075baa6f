"""QEMU's arguments for a guest: right for QEMU 7.2 (Debian 12) and 10 (Debian 13)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Literal, NamedTuple

from kvmd.guest import BACKED_FORMATS, CD_BUS, BootDevice, Guest, Nic

MAX_QUEUES = 8  # of a NIC: each costs memory, interrupts and a vhost thread


class Layer(NamedTuple):
    """One image of a chain: its descriptor, its format, and the descriptors of a VMDK's extents in other files."""

    fd: int
    format: str
    extents: Sequence[int] = ()


Image = Sequence[Layer]


@dataclass(frozen=True, slots=True)
class Tap:
    """A NIC's tap: a descriptor for each queue, and of /dev/vhost-net as many or none. ``mtu``: 0 if not known."""

    queues: Sequence[int]
    vhosts: Sequence[int] = ()
    mtu: int = 0


@dataclass(frozen=True, slots=True)
class Vsock:
    """/dev/vhost-vsock with the guest's address, and the port of the host to which its systemd says READY=1."""

    fd: int
    cid: int
    port: int


@dataclass(frozen=True, slots=True)
class Handles:
    """What QEMU gets from the host: everything that root has opened for it. All numbers are inherited descriptors.

    ``qmp_fd``, ``spare_qmp_fd``: listening unix sockets, one for the daemon and one for the stop helper.
    ``serial``: two FIFOs, this path with ``.in`` and ``.out`` behind it.
    ``images``: of each disk and then of each CD its layers, the top one first and what backs it after. The top one
    of a disk that is not read-only must be open for writing, all others read-only.
    ``kernel``, ``initrd``: QEMU opens these again through /proc/self/fd, so its user must be able to read the file;
    a copy in a memfd always is readable.
    ``boot_once``: boot from this kind of device first, without ``boot.kernel``, until ``boot_indexes`` is put back.
    """

    accelerator: Literal["kvm", "tcg"]
    qmp_fd: int
    spare_qmp_fd: int
    serial: Path
    images: Sequence[Image] = ()
    taps: Sequence[Tap] = ()
    kernel: int | None = None
    initrd: int | None = None
    boot_once: BootDevice | None = None
    vsock: Vsock | None = None


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
    path: Path
    readonly: bool
    image: Image


def argv(guest: Guest, handles: Handles) -> list[str]:
    """All arguments, without the program's name."""
    kernel = None if handles.boot_once else handles.kernel
    indexes = boot_indexes(guest, handles.boot_once)
    virtio = "device" if guest.board == "microvm" else "pci"

    args = [
        "-no-user-config",
        "-nodefaults",
        "-name", f"guest={guest.name}",
        "-uuid", str(guest.uuid),
        "-machine", guest.machine,
        "-accel", handles.accelerator,
        "-cpu", guest.cpu or ("host" if handles.accelerator == "kvm" else "max"),
        "-smp", f"cpus={guest.cpus}",
        "-m", f"size={guest.memory}B",
        "-rtc", "base=localtime" if guest.profile in ("windows", "legacy") else "base=utc",
        "-boot", "strict=on",
        "-action", "panic=exit-failure",
        "-display", "none",
        "-msg", "timestamp=off",
        "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
    ]  # fmt: skip
    for name, fd in (("qmp", handles.qmp_fd), ("qmp-spare", handles.spare_qmp_fd)):
        args += [
            "-chardev", f"socket,id={name},fd={fd},server=on,wait=off",
            "-mon", f"chardev={name},mode=control",
        ]  # fmt: skip
    args += [
        "-chardev", f"pipe,id=serial0,path={handles.serial}",
        "-serial", "chardev:serial0",
    ]  # fmt: skip

    if kernel is not None:
        args += ["-kernel", f"/proc/self/fd/{kernel}"]
        if handles.initrd is not None:
            args += ["-initrd", f"/proc/self/fd/{handles.initrd}"]
        if guest.boot.cmdline:
            args += ["-append", guest.boot.cmdline]
    elif guest.board != "microvm":  # boot loaders and installers want a screen, even if nobody looks
        args += ["-device", "VGA"]
    if guest.board != "microvm":
        args += ["-device", "pvpanic-pci"]
    if guest.profile in ("linux", "bsd"):
        args += ["-device", f"virtio-rng-{virtio}"]

    args += _drives(guest, handles, indexes)
    for number, (nic, tap) in enumerate(zip(guest.nics, handles.taps, strict=True)):
        device = f"virtio-net-{virtio}" if nic.model == "virtio" else nic.model
        device += f",netdev=net{number},id=nic{number},mac={nic.mac}"
        device += ",mq=on" if len(tap.queues) > 1 else ""
        device += f",host_mtu={tap.mtu}" if nic.model == "virtio" and tap.mtu else ""
        device += "" if f"nic{number}" in indexes or virtio == "device" else ",romfile="
        args += [
            "-netdev", f"tap,id=net{number}" + _fds("", tap.queues) + _fds("vhost", tap.vhosts),
            "-device", device + _bootindex(indexes, f"nic{number}"),
        ]  # fmt: skip
    if vsock := handles.vsock:  # the credential is systemd's, see systemd.system-credentials(7)
        args += [
            "-device", f"vhost-vsock-pci,guest-cid={vsock.cid},vhostfd={vsock.fd}",
            "-smbios", f"type=11,value=io.systemd.credential:vmm.notify_socket=vsock-stream:2:{vsock.port}",
        ]  # fmt: skip
    return [*args, *guest.qemu_args]


def queues(guest: Guest, nic: Nic) -> int:
    """How many its tap should have: one for each CPU, where the guest can use them."""
    return min(guest.cpus, MAX_QUEUES) if nic.model == "virtio" and guest.board != "microvm" else 1


def _fds(prefix: str, fds: Sequence[int]) -> str:
    if not fds:
        return ""
    option = f",{prefix}fd{'s' if len(fds) > 1 else ''}={':'.join(map(str, fds))}"
    return f",{prefix}=on{option}" if prefix else option


def boot_indexes(guest: Guest, once: BootDevice | None = None) -> dict[str, int]:
    """The place of each device, by its id, in the order of booting."""
    ids = {
        "disk": [f"disk{number}" for number in range(len(guest.disks))],
        "cdrom": [f"cdrom{number}" for number in range(len(guest.cdroms))],
        "network": [f"nic{number}" for number in range(len(guest.nics))],
    }
    indexes = {id: index for index, id in enumerate((id for kind in guest.boot.order for id in ids[kind]), 1)}
    return indexes | dict.fromkeys(ids[once][:1] if once else (), 0)


def after_boot_once(guest: Guest, once: BootDevice) -> dict[str, int]:
    """What to set back by ``qom-set`` once QMP answers: device id and ``bootindex``.

    The firmware sees it from the guest's next reset on, so an installer that reboots comes up from the disk.
    """
    normal = boot_indexes(guest)
    return {id: normal.get(id, -1) for id, index in boot_indexes(guest, once).items() if index != normal.get(id)}


def _bootindex(indexes: Mapping[str, int], id: str) -> str:
    return f",bootindex={indexes[id]}" if id in indexes else ""


def _drives(guest: Guest, handles: Handles, indexes: Mapping[str, int]) -> list[str]:
    """Disks and CDs: the controllers they need, then of each its layers and its device."""
    virtio = "device" if guest.board == "microvm" else "pci"
    drives = _plan_drives(guest, handles.images)
    buses = {drive.bus for drive in drives}

    args = []
    if "scsi" in buses:
        old = guest.profile == "legacy" and guest.board != "microvm"
        args += ["-device", f"{'lsi53c895a' if old else f'virtio-scsi-{virtio}'},id=scsi0"]
    if "sata" in buses and guest.board == "pc":
        args += ["-device", "ahci,id=sata0"]
    on_bus: Counter[str] = Counter()
    sets = count(1)
    for drive in drives:
        args += _layers(drive, sets)
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
        args += ["-device", f"{device},drive={drive.id},id={drive.id}" + _bootindex(indexes, drive.id)]
    return args


def _plan_drives(guest: Guest, images: Sequence[Image]) -> list[_Drive]:
    disks, cds = images[: len(guest.disks)], images[len(guest.disks) :]
    return [
        *(
            _Drive(f"disk{number}", "hd", disk.bus, disk.path, disk.readonly, image)
            for number, (disk, image) in enumerate(zip(guest.disks, disks, strict=True))
        ),
        *(
            _Drive(f"cdrom{number}", "cd", CD_BUS[guest.board], cdrom.path, True, image)
            for number, (cdrom, image) in enumerate(zip(guest.cdroms, cds, strict=True))
        ),
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
            file = {
                "driver": _protocol(drive.path) if depth == 0 else "file",
                "node-name": node[child],
                "filename": f"/dev/fdset/{number}",
                "read-only": readonly,
                "discard": "unmap",
            }
            args += ["-add-fd", f"set={number},fd={fd}", "-blockdev", json.dumps(file)]
        node |= {"read-only": readonly, "discard": "unmap"}
        if layer.format in BACKED_FORMATS:
            node["backing"] = below
        args += ["-blockdev", json.dumps(node)]
        below = name
    return args


def _protocol(path: Path) -> str:
    """QEMU wants to know what it reads: a block device lies in /dev, a regular file anywhere else."""
    return "host_device" if path.is_relative_to("/dev") and not path.is_relative_to("/dev/shm") else "file"
