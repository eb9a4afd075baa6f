"""PCI devices of the host for a guest, by VFIO: what is in the way, each in one sentence, and the group's node.

A device and its group, those that the IOMMU cannot tell from it, must be bound to vfio-pci: an administrator does
that, as their drivers may hold the host's own disk. See the kernel's Documentation/driver-api/vfio.rst.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from kvmd.errors import StartFailed
from kvmd.qemu.process import User

SYS = Path("/sys")
NODES = Path("/dev/vfio")
BRIDGE = "0x06"  # the class of what need not be bound to vfio-pci: bridges of the group


def find_group(address: str, sys: Path = SYS) -> str:
    """The number of the device's IOMMU group, where all of it is ready for a guest. Raises ``StartFailed``."""
    device = sys / "bus/pci/devices" / address
    if not device.is_dir():
        raise StartFailed(f"there is no PCI device {address} (lspci -D lists them)")
    groups = sys / "kernel/iommu_groups"
    if not groups.is_dir() or not any(groups.iterdir()):
        hint = "switch it on in the firmware, VT-d or AMD-Vi, and with intel_iommu=on on the kernel's command line"
        raise StartFailed(f"PCI device {address} cannot be handed over: this host has no IOMMU in use ({hint})")
    group = device / "iommu_group"
    if not group.exists():
        raise StartFailed(f"PCI device {address} cannot be handed over: the IOMMU does not cover it (use another slot)")
    number = group.resolve().name
    for member in sorted((path.name for path in (groups / number / "devices").iterdir()), key=lambda it: it != address):
        driver = _driver(sys, member)
        if driver == "vfio-pci" or (member != address and _is_bridge(sys, member)):
            continue
        which = "it" if member == address else f"{member}, of the same IOMMU group {number},"
        state = f"is in the hands of the host's driver {driver}" if driver else "is not bound to vfio-pci"
        hint = f"driverctl set-override {member} vfio-pci" + ("" if member == address else ", or use another slot")
        raise StartFailed(f"PCI device {address} cannot be handed over: {which} {state} ({hint})")
    return number


def _driver(sys: Path, address: str) -> str:
    driver = sys / "bus/pci/devices" / address / "driver"
    return driver.resolve().name if driver.exists() else ""


def _is_bridge(sys: Path, address: str) -> bool:
    try:
        return (sys / "bus/pci/devices" / address / "class").read_text().startswith(BRIDGE)
    except OSError:
        return False


def lend(address: str, user: User, sys: Path = SYS, nodes: Path = NODES) -> Path:
    """The node of the device's group is ``user``'s from now on. Raises ``StartFailed``."""
    node = nodes / find_group(address, sys)
    try:
        os.chown(node, user.uid, user.gid, follow_symlinks=False)
    except OSError as error:
        raise StartFailed(f"cannot hand {node} of PCI device {address} to the guest: {error.strerror}") from error
    return node


def take_back(addresses: Iterable[str], sys: Path = SYS, nodes: Path = NODES) -> None:
    """The nodes of these devices' groups, as far as they are still there, are root's again."""
    for address in addresses:
        group = sys / "bus/pci/devices" / address / "iommu_group"
        with suppress(OSError):
            os.chown(nodes / group.resolve().name, 0, 0, follow_symlinks=False)
