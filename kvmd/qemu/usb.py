"""USB devices of the host for a guest: found by port or by what they are, and opened by root."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from kvmd.errors import StartFailed, plain

SYS = Path("/sys/bus/usb/devices")
NODES = Path("/dev/bus/usb")
LISTED = 10  # devices of a sentence
HUB = "09"  # bDeviceClass


@dataclass(frozen=True, slots=True)
class Device:
    """As the kernel shows it (Documentation/ABI/stable/sysfs-bus-usb)."""

    port: str
    id: str  # vendor:product
    node: str  # BUS/DEVICE below /dev/bus/usb
    name: str

    def __str__(self) -> str:
        return f"{self.port} is {self.id} {self.name}".rstrip()


def devices(sys: Path = SYS) -> list[Device]:
    """All but hubs; what is being unplugged just now is not there."""
    found = []
    for path in sorted(sys.iterdir()) if sys.is_dir() else ():
        try:
            if ":" in path.name or _read(path, "bDeviceClass") == HUB:
                continue
            node = f"{int(_read(path, 'busnum')):03}/{int(_read(path, 'devnum')):03}"
            ids = f"{_read(path, 'idVendor')}:{_read(path, 'idProduct')}"
        except (OSError, ValueError):
            continue
        name = _read(path, "product") if (path / "product").exists() else ""
        found.append(Device(path.name, ids, node, name))
    return found


def _read(path: Path, name: str) -> str:
    return plain((path / name).read_text(errors="replace").strip()[:100])


def open_device(word: str, sys: Path = SYS, nodes: Path = NODES) -> int:
    """Open for QEMU to speak with it, by port or by vendor and product. Raises ``StartFailed``."""
    here = devices(sys)
    matching = [device for device in here if word in (device.port, device.id)]
    if not matching:
        listed = "; ".join(map(str, here[:LISTED])) + ("; …" if len(here) > LISTED else "")
        hint = f"plugged in: {listed}" if here else "there is none on this host"
        raise StartFailed(f"there is no USB device {word} ({hint})")
    if len(matching) > 1:
        ports = " or ".join(f'"{device.port}"' for device in matching)
        raise StartFailed(f"there are {len(matching)} USB devices {word} (say which by its port: {ports})")
    path = nodes / matching[0].node
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise StartFailed(f"cannot open the USB device {matching[0]} ({path}): {error.strerror}") from error
