"""QEMU's arguments for a guest: right for QEMU 7.2 (Debian 12) and 10 (Debian 13)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from kvmd.guest import BootDevice, Guest, Nic
from kvmd.profile import PROFILES, Profile
from kvmd.qemu.display import display_args
from kvmd.qemu.drives import Image, bootindex, drive_args
from kvmd.qemu.firmware import Firmware, firmware_args, tpm_args
from kvmd.qemu.passthrough import OfTheHost, passthrough_args

MAX_QUEUES = 8  # of a NIC: each costs memory, interrupts and a vhost thread


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
    ``images``: of each disk, each CD and of cloud-init's seed its layers, the top one first and what backs it after;
    an empty drive has none. The top one of a disk that is not read-only must be open for writing, all others read-only.
    ``kernel``, ``initrd``: QEMU opens these again through /proc/self/fd, so its user must be able to read the file;
    a copy in a memfd always is readable.
    ``credentials``: SMBIOS strings, which QEMU opens again, too.
    ``firmware``: where it is not QEMU's own BIOS. ``tpm``: a stream to swtpm's control channel.
    ``vnc_password``: as these, what is in ``display.password_file``.
    ``boot_once``: boot from this kind of device first, until ``after_boot_once`` is set.
    """

    accelerator: Literal["kvm", "tcg"]
    qmp_fd: int
    spare_qmp_fd: int
    serial: Path
    images: Sequence[Image] = ()
    taps: Sequence[Tap] = ()
    kernel: int | None = None
    initrd: int | None = None
    credentials: Sequence[int] = ()
    boot_once: BootDevice | None = None
    vsock: Vsock | None = None
    firmware: Firmware | None = None
    tpm: int | None = None
    vnc_password: int | None = None
    of_the_host: OfTheHost = field(default_factory=OfTheHost)


def argv(guest: Guest, handles: Handles) -> list[str]:
    """All arguments, without the program's name."""
    profile = PROFILES[guest.profile]
    kernel = handles.kernel
    microvm = guest.board == "microvm"
    screen = not microvm and (kernel is None or guest.display.vnc)
    indexes = boot_indexes(guest, handles.boot_once)
    virtio = "device" if microvm else "pci"

    args = [
        "-no-user-config",
        "-nodefaults",
        "-name", f"guest={guest.name}",
        "-uuid", str(guest.uuid),
        "-machine", _machine(guest, profile, screen),
        "-accel", handles.accelerator,
        "-cpu", _cpu(guest, profile, handles.accelerator),
        "-smp", f"cpus={guest.cpus}",
        "-m", f"size={guest.memory}B",
        "-rtc", f"base={profile.clock}",
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

    if handles.firmware:
        args += firmware_args(guest, handles.firmware)
    if handles.tpm is not None:
        args += tpm_args(handles.tpm)

    if kernel is not None:
        args += ["-kernel", f"/proc/self/fd/{kernel}"]
        if handles.initrd is not None:
            args += ["-initrd", f"/proc/self/fd/{handles.initrd}"]
        if guest.boot.cmdline:
            args += ["-append", guest.boot.cmdline]
    if screen:
        args += display_args(guest.display, handles.vnc_password)
    if not (profile.sleep or microvm):
        args += ["-global", f"{'ICH9-LPC' if guest.board == 'q35' else 'PIIX4_PM'}.disable_s3=1"]
    if profile.virtio and not microvm:
        args += ["-device", "pvpanic-pci"]
    booted = {*guest.boot.order, handles.boot_once}
    if profile.virtio or (handles.firmware and "network" in booted):  # OVMF of 2025 does that only with it
        args += ["-device", f"virtio-rng-{virtio}"]
    if profile.tablet and not microvm:
        args += [
            "-device", f"{'qemu-xhci' if guest.board == 'q35' else 'piix3-usb-uhci'},id=usb0",
            "-device", "usb-tablet,bus=usb0.0",
        ]  # fmt: skip

    args += drive_args(guest, handles.images, indexes)
    for number, (nic, tap) in enumerate(zip(guest.nics, handles.taps, strict=True)):
        device = f"virtio-net-{virtio}" if nic.model == "virtio" else nic.model
        device += f",netdev=net{number},id=nic{number},mac={nic.mac}"
        device += ",mq=on" if len(tap.queues) > 1 else ""
        device += f",host_mtu={tap.mtu}" if nic.model == "virtio" and tap.mtu else ""
        device += "" if f"nic{number}" in indexes or virtio == "device" else ",romfile="
        args += [
            "-netdev", f"tap,id=net{number}" + _fds("", tap.queues) + _fds("vhost", tap.vhosts),
            "-device", device + bootindex(indexes, f"nic{number}"),
        ]  # fmt: skip
    if vsock := handles.vsock:  # the credential is systemd's, see systemd.system-credentials(7)
        args += [
            "-device", f"vhost-vsock-pci,guest-cid={vsock.cid},vhostfd={vsock.fd}",
            "-smbios", f"type=11,value=io.systemd.credential:vmm.notify_socket=vsock-stream:2:{vsock.port}",
        ]  # fmt: skip
    shared = "usb0.0" if profile.tablet and guest.board == "q35" else None
    args += passthrough_args(guest, handles.of_the_host, shared)
    for fd in handles.credentials:
        args += ["-smbios", f"type=11,path=/proc/self/fd/{fd}"]
    return [*args, *guest.qemu_args]


def _machine(guest: Guest, profile: Profile, screen: bool) -> str:
    """``graphics=off`` makes SeaBIOS show text on the serial port, too (its file etc/sercon-port)."""
    words = [guest.machine]
    if guest.board != "microvm" and not profile.hpet:
        words.append("hpet=off")
    text = profile.screen if guest.serial.screen is None else guest.serial.screen
    if screen and text and guest.firmware == "bios":
        words.append("graphics=off")
    return ",".join(words)


def _cpu(guest: Guest, profile: Profile, accelerator: str) -> str:
    cpu = guest.cpu or ("host" if accelerator == "kvm" else "max")
    named = "hv_" in cpu or "hv-" in cpu  # by somebody who knows better
    return ",".join([cpu, *(profile.hyperv if accelerator == "kvm" and not named else ())])


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
