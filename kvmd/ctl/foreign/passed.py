"""What a QEMU command line has of the host → draft: -virtfs, -fsdev, -usbdevice, -pcidevice, and their -device."""

from __future__ import annotations

import re
from collections.abc import Callable
from posixpath import basename

from kvmd.ctl.foreign.borrowed import add_pci, add_share, add_usb, add_usb_numbers
from kvmd.ctl.foreign.draft import Draft
from kvmd.ctl.foreign.options import key_values, on

ASSIGNED = ("pci-assign", "kvm-pci-assign")  # before there was VFIO
OF_THE_GPU = ("x-vga", "romfile", "x-igd-opregion")


class Passed:
    """Directories are known when all options are: one is of a -fsdev and of a -device. ``absolute`` makes paths so."""

    def __init__(self, draft: Draft, absolute: Callable[[str], str]) -> None:
        self._draft = draft
        self._absolute = absolute
        self._directories: dict[str, dict[str, str]] = {}
        self._shares: list[tuple[str, dict[str, str]]] = []  # tag, what its -fsdev has
        self._devices: list[tuple[str, str]] = []  # tag, id of a -fsdev
        self._user = ""

    def option(self, option: str, value: str) -> bool:
        """Whether it is one of these."""
        match option:
            case "virtfs":
                given = key_values(value, "driver")
                self._shares.append((given.get("mount_tag", ""), given))
            case "fsdev":
                given = key_values(value, "driver")
                self._directories[given.get("id", "")] = given
            case "usbdevice":
                self._usb(value)
            case "pcidevice":
                add_pci(self._draft, f"-pcidevice {value}", key_values(value, "host").get("host", ""))
            case "runas" | "run-with":
                self._user = key_values(value, "user").get("user", self._user)
            case _:
                return False
        return True

    def device(self, driver: str, given: dict[str, str], said: str) -> bool:
        """Whether it is one of these."""
        label = f"-device {said}"
        if driver.startswith("vfio-pci") or driver in ASSIGNED:
            bound = driver not in ASSIGNED
            add_pci(self._draft, label, given.get("host") or basename(given.get("sysfsdev", "")), bound=bound)
            for key in OF_THE_GPU:
                if key in given:
                    self._draft.miss(f"{label}: {key}", "kvmd does not know it")
        elif driver == "usb-host" and "vendorid" in given:
            add_usb_numbers(self._draft, label, given["vendorid"], given.get("productid", ""))
        elif driver == "usb-host":
            add_usb(self._draft, label, f"{given.get('hostbus', '?')}-{given.get('hostport', '?')}")
        elif driver.startswith("virtio-9p"):
            self._devices.append((given.get("mount_tag", ""), given.get("fsdev", "")))
        elif driver.startswith("vhost-user-fs"):
            todo = "write a [[share]] by hand, with the path that virtiofsd was started with"
            self._draft.miss(f"directory {given.get('tag', '')} by virtiofs", "its path is not in this line", todo)
        else:
            return False
        return True

    def finish(self) -> None:
        for tag, given in [*self._shares, *((tag, self._directories.get(id, {})) for tag, id in self._devices)]:
            if given.get("driver") == "local":
                path, readonly = self._absolute(given.get("path", "")), on(given.get("readonly", "off"))
                add_share(self._draft, path, tag, "9p", readonly=readonly, user=self._user)
            else:
                what = f"directory {tag} by 9p of {given.get('driver', 'nothing')}"
                self._draft.miss(what, "kvmd shares directories by their paths", "write a [[share]] by hand")

    def _usb(self, said: str) -> None:
        """The old way: host:VENDOR:PRODUCT, host:BUS.NUMBER."""
        if match := re.fullmatch(r"host:(.*)", said):
            add_usb(self._draft, f"-usbdevice {said}", match[1])
        elif said not in ("tablet", "mouse", "keyboard"):
            self._draft.miss(f"-usbdevice {said}", "a guest has none of these")
