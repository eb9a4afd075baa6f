"""KVM or not, and if not, why: the diagnosis a person can act on."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import platform
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kvmd.guest import Guest
from kvmd.systemd.journal import newest_first
from kvmd.systemd.sysbus import BusError
from kvmd.systemd.units import Systemd

KVM_GET_API_VERSION = 0xAE00  # linux/kvm.h
KVM_CREATE_VM = 0xAE01
DEVICE = Path("/dev/kvm")


@dataclass(frozen=True)
class Kvm:
    """``reason`` is empty where KVM works; ``module`` is worth loading where it is set; ``group`` may open it."""

    reason: str
    module: str = ""
    group: int | None = None

    @property
    def usable(self) -> bool:
        return not self.reason


def vendor_module(cpuinfo: str) -> str:
    """The KVM module for this CPU, or nothing where it cannot virtualise."""
    flags = next((line.split() for line in cpuinfo.splitlines() if line.startswith("flags")), [])
    return "kvm_intel" if "vmx" in flags else "kvm_amd" if "svm" in flags else ""


def diagnose(cpuinfo: str, kernel_log: str, module_there: bool) -> str:
    """Why there is no /dev/kvm: no CPU support, disabled in firmware, module missing, or not loaded."""
    module = vendor_module(cpuinfo)
    if "disabled by bios" in kernel_log.lower():
        return "virtualisation is disabled in the firmware (enable VT-x or SVM in its setup)"
    if not module:
        return (
            "the CPU has neither vmx nor svm (if this host is itself a virtual machine, "
            "let its host give it nested virtualisation)"
        )
    if not module_there:
        return f"the kernel module {module} is missing (install the modules of kernel {platform.release()})"
    return f"the kernel module {module} does not load (see journalctl -k)"


def probe() -> Kvm:
    """Try KVM for real: open /dev/kvm and make an empty machine. Blocks for a millisecond."""
    try:
        fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return _absent()
    except OSError as error:
        if error.errno in (errno.ENODEV, errno.ENXIO):  # a static node without its module
            return _absent()
        return Kvm(f"no permission to open /dev/kvm: {error.strerror}")
    try:
        if fcntl.ioctl(fd, KVM_GET_API_VERSION) != 12:
            return Kvm("the KVM of this kernel has an API that QEMU does not know")
        os.close(fcntl.ioctl(fd, KVM_CREATE_VM, 0))
        status = os.fstat(fd)
        if status.st_mode & 0o060 != 0o060:
            return Kvm(f"no permission: {DEVICE} is not open to its group (udev makes it 0660, group kvm)")
        return Kvm("", group=status.st_gid)
    except OSError as error:
        return Kvm(f"KVM does not make a machine: {error.strerror}")
    finally:
        os.close(fd)


def _absent() -> Kvm:
    cpuinfo = Path("/proc/cpuinfo").read_text()
    module = vendor_module(cpuinfo)
    modules = Path("/lib/modules") / platform.release()
    listed = (modules / "modules.dep", modules / "modules.builtin")
    there = any(module.replace("_", "-") in path.read_text() for path in listed if path.exists())
    return Kvm(diagnose(cpuinfo, _firmware_complaint(), there), module if there else "")


def _firmware_complaint() -> str:
    """The kernel's line about the firmware, if it wrote one in this boot."""
    boot = None
    for entry in newest_first(_TRANSPORT="kernel"):
        boot = boot or entry["_BOOT_ID"]
        if entry["_BOOT_ID"] != boot:
            break
        if "disabled by bios" in str(entry.get("MESSAGE", "")).lower():
            return str(entry["MESSAGE"])
    return ""


class Accelerator:
    """What this host has, looked for at the start of the daemon and again while guests are to be emulated."""

    def __init__(self, systemd: Systemd, changed: Callable[[], None]) -> None:
        self._systemd, self._changed = systemd, changed
        self.kvm = Kvm("not looked at yet")

    async def look(self) -> Kvm:
        """Probe KVM, loading its module where that may help."""
        kvm = await asyncio.to_thread(probe)
        if kvm.module:
            with suppress(BusError):
                await self._systemd.start_unit(f"modprobe@{kvm.module}.service")
            kvm = await asyncio.to_thread(probe)
        if kvm != self.kvm:
            self.kvm = kvm
            self._changed()
        return kvm

    async def find(self, guest: Guest) -> Kvm:
        """For the start of ``guest``."""
        if guest.accelerator != "tcg" and not self.kvm.usable and DEVICE.exists():
            return await self.look()
        return self.kvm
