"""What an unmodified system expects of its machine, by the ``profile`` of its guest file: one table.

Sources: the systems' hardware notes (FreeBSD 7.0 and 14, OpenBSD's amd64 list, NetBSD's virtio(4)); Windows 11's
requirements and libosinfo's win10 and win11 (SATA, e1000e, tablet, VGA); QEMU's docs/system/i386/hyperv.rst and what
virt-manager and quickemu write for Windows (local time, no HPET, Hyper-V's interfaces, no S3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from kvmd.guest import Board


@dataclass(frozen=True, slots=True)
class Profile:
    """``disk`` and ``nic`` are what a file that names neither gets, on each board but microvm, which has virtio only.

    ``unseen`` are buses and NIC models that the system's installer has no driver for.
    """

    machine: str
    disk: Mapping[Board, str]
    nic: Mapping[Board, str]
    clock: Literal["utc", "localtime"]
    hpet: bool = True
    sleep: bool = True  # ACPI S3
    screen: bool = False  # what a BIOS shows as text goes to the serial port, too
    tablet: bool = False  # an absolute pointer; else PS/2
    virtio: bool = False  # devices that only virtio's and QEMU's own drivers know: entropy, panics
    scsi: str = "virtio-scsi-pci"
    hyperv: tuple[str, ...] = ()  # flags of the CPU, under KVM
    least: int = 0  # bytes of memory
    unseen: tuple[str, ...] = ()

    def default_disk(self, board: Board) -> str:
        return self.disk.get(board, "virtio")

    def default_nic(self, board: Board) -> str:
        return self.nic.get(board, "virtio")


PROFILES: Mapping[str, Profile] = {
    "linux": Profile("q35", {}, {}, "utc", virtio=True),
    "bsd": Profile("q35", {}, {}, "utc", virtio=True, screen=True),
    "windows": Profile(
        "q35",
        {"q35": "sata", "pc": "ide"},
        {"q35": "e1000e", "pc": "e1000"},
        "localtime",
        hpet=False,
        sleep=False,
        tablet=True,
        hyperv=(
            *("hv_relaxed", "hv_vapic", "hv_spinlocks=8191", "hv_vpindex", "hv_runtime", "hv_time", "hv_synic"),
            *("hv_stimer", "hv_frequencies", "hv_tlbflush", "hv_ipi"),
        ),
        least=2 << 30,
        unseen=("virtio", "scsi", "pcnet", "ne2k_pci", "tulip", "i82551", "i82559er"),
    ),
    "legacy": Profile(
        "pc",
        {"q35": "sata", "pc": "ide"},
        {"q35": "rtl8139", "pc": "rtl8139"},
        "localtime",
        screen=True,
        scsi="lsi53c895a",
        unseen=("virtio", "nvme", "e1000e", "vmxnet3"),
    ),
}
