"""A guest as typed values: what a file in /etc/kvmd means once it has been read. Nobody parses again."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import Literal, NamedTuple
from uuid import UUID

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
BootDevice = Literal["disk", "cdrom", "network"]

Board = Literal["q35", "pc", "microvm"]

IMAGES = Path("/var/lib/kvmd/images")

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")

# The words a guest file may use; ``qemu`` knows a device for each.
FORMATS = ("qcow2", "raw", "qcow", "qed", "vdi", "vhdx", "vmdk", "vpc")
BACKED_FORMATS = ("qcow2", "qcow", "qed", "vmdk")
BUSES = ("virtio", "sata", "ide", "scsi", "nvme")
BOARD_BUSES: Mapping[Board, tuple[str, ...]] = {
    "q35": ("virtio", "sata", "scsi", "nvme"),
    "pc": ("virtio", "ide", "sata", "scsi", "nvme"),
    "microvm": ("virtio", "scsi"),
}
CD_BUS: Mapping[Board, str] = {"q35": "sata", "pc": "ide", "microvm": "scsi"}
MODELS = ("virtio", "e1000", "e1000e", "rtl8139", "pcnet", "ne2k_pci", "i82551", "i82559er", "tulip", "vmxnet3")


@dataclass(frozen=True, slots=True)
class Boot:
    """``[boot]``: firmware boot order, or a kernel loaded directly by QEMU."""

    order: tuple[BootDevice, ...] = ("disk", "cdrom")
    kernel: Path | None = None
    initrd: Path | None = None
    cmdline: str = ""


@dataclass(frozen=True, slots=True)
class Disk:
    """``[[disk]]``: ``size`` in bytes; paths absolute. ``backing``: what may lie below it, beside ``base``."""

    path: Path
    size: int | None = None
    format: str = "qcow2"
    base: Path | None = None
    base_format: str = "qcow2"
    backing: tuple[Path, ...] = ()
    bus: str = "virtio"
    readonly: bool = False


@dataclass(frozen=True, slots=True)
class Cdrom:
    """``[[cdrom]]``: an ISO image, absolute path; None: an empty drive. ``uid``: who names it, if no administrator."""

    path: Path | None = None
    uid: int = 0


@dataclass(frozen=True, slots=True)
class Nic:
    """``[[network]]``: one network interface of the guest and its tap on the host.

    ``uplink`` None means the interface of the default route, chosen when it is needed. ``kin``: addresses and prefixes
    of the guest's other interfaces.
    """

    tap: str
    mac: str
    uplink: str | None = None
    addresses: tuple[Address, ...] = ()
    routes: tuple[Network, ...] = ()
    model: str = "virtio"
    configure: bool = False
    kin: tuple[Address | Network, ...] = ()

    @property
    def families(self) -> frozenset[int]:
        """IP versions it has addresses or prefixes of."""
        return frozenset(item.version for item in (*self.addresses, *self.routes))


@dataclass(frozen=True, slots=True)
class Serial:
    """``[serial]``: ``ready_timeout`` in seconds.

    ``screen``: what a BIOS shows as text is there, too; None is what the profile says, and true at a start from a CD.
    """

    log: bool = True
    screen: bool | None = None
    ready: re.Pattern[str] | None = None
    ready_timeout: float = 300.0


@dataclass(frozen=True, slots=True)
class Vsock:
    """``[vsock]``: ``ready`` if the guest's systemd says so; ``ready_timeout`` in seconds."""

    ready: bool = False
    ready_timeout: float = 300.0


class Endpoint(NamedTuple):
    """An IP address and a TCP port."""

    address: Address
    port: int

    def __str__(self) -> str:
        return f"{self.address if self.address.version == 4 else f'[{self.address}]'}:{self.port}"


@dataclass(frozen=True, slots=True)
class Display:
    """``[display]``: VNC, at a socket of root's and at ``address``; a kernel loaded by QEMU needs it for a screen."""

    vnc: bool = False
    address: Endpoint | None = None
    password_file: Path | None = None


@dataclass(frozen=True, slots=True)
class Share:
    """``[[share]]``: a directory of the host, by virtiofs; ``user``: whose eyes it is read with; None: anybody's."""

    path: Path
    tag: str
    readonly: bool = True
    user: str | None = None


@dataclass(frozen=True, slots=True)
class CloudInit:
    """``[cloud_init]``: what the file gives of a NoCloud seed; the rest is made. Secret, all of it."""

    user_data: str | None = field(default=None, repr=False)
    meta_data: str | None = field(default=None, repr=False)
    network_config: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Limit:
    """One ``[limits]`` key as org.freedesktop.systemd1 wants it: D-Bus property, signature, value."""

    property: str
    signature: str
    value: object


@dataclass(frozen=True, slots=True)
class StartOptions:
    """What holds for one start only: ``boot`` from this kind of device first; ``cdrom`` lies in the first CD drive.

    ``uid``: who names that, if no administrator.
    """

    boot: BootDevice | None = None
    cdrom: Path | None = None
    uid: int = 0


AS_ALWAYS = StartOptions()


@dataclass(frozen=True, slots=True)
class Guest:
    """One guest. ``memory`` in bytes, ``stop_timeout`` in seconds.

    ``usb``: devices of the host, by port ("1-1.2") or by vendor and product ("046d:c52b"). ``pci``: by full address.
    """

    name: str
    file: Path
    uuid: UUID
    description: str = ""
    memory: int = 512 << 20
    cpus: int = 1
    accelerator: Literal["auto", "kvm", "tcg"] = "auto"
    machine: str = "q35"
    cpu: str | None = None
    firmware: Literal["bios", "uefi"] = "bios"
    secure_boot: bool = False
    profile: str = "linux"
    autostart: bool = False
    restart: Literal["no", "on-failure", "always"] = "no"
    stop_timeout: float = 90.0
    boot: Boot = field(default_factory=Boot)
    disks: tuple[Disk, ...] = ()
    cdroms: tuple[Cdrom, ...] = ()
    nics: tuple[Nic, ...] = ()
    serial: Serial = field(default_factory=Serial)
    vsock: Vsock = field(default_factory=Vsock)
    display: Display = field(default_factory=Display)
    limits: Mapping[str, Limit] = field(default_factory=dict)
    credentials: Mapping[str, str] = field(default_factory=dict, repr=False)
    cloud_init: CloudInit | None = None
    tpm: bool = False
    shares: tuple[Share, ...] = ()
    usb: tuple[str, ...] = ()
    pci: tuple[str, ...] = ()
    agent: bool = False
    qemu_args: tuple[str, ...] = ()

    @property
    def board(self) -> Board:
        """What kind of mainboard the machine is: which buses there are and where the drives go."""
        return board(self.machine)

    @property
    def ready_timeout(self) -> float | None:
        """How many seconds to wait for it to say that it is ready; None where it is ready as soon as it runs."""
        if self.vsock.ready:
            return self.vsock.ready_timeout
        return self.serial.ready_timeout if self.serial.ready else None

    def started_with(self, options: StartOptions) -> Guest:
        """The guest as it is for that start; its CD drive is a new one if it has none."""
        guest = self
        if options.boot:
            guest = replace(guest, boot=Boot(guest.boot.order))
        if options.cdrom:
            guest = replace(guest, cdroms=(Cdrom(options.cdrom, options.uid), *guest.cdroms[1:]))
        if options.boot == "cdrom" and guest.serial.screen is None:
            guest = replace(guest, serial=replace(guest.serial, screen=True))
        return guest

    def lacks(self, device: BootDevice | None) -> bool:
        """Whether there is none of it to boot from."""
        has = {"disk": self.disks, "cdrom": self.cdroms, "network": self.nics}
        return device is not None and not has[device]

    @property
    def unit(self) -> str:
        """The service a person handles."""
        return f"kvmd@{self.name}.service"

    @property
    def scope(self) -> str:
        """The transient scope that holds QEMU."""
        return f"kvmd-{self.name}.scope"

    @property
    def tpm_scope(self) -> str:
        """The transient scope that holds swtpm: by a name that no guest's scope has."""
        return f"kvtpm-{self.name}.scope"

    def share_unit(self, position: int) -> str:
        """The transient service of a shared directory's virtiofsd: by a name that no service of a person's has."""
        return f"kvshare-{position}-{self.name}.service"


def board(machine: str) -> Board:
    """The kind of a QEMU machine; what is not known is taken for an old PC."""
    if machine == "microvm":
        return "microvm"
    return "q35" if "q35" in machine else "pc"
