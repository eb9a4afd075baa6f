"""Drives of a QEMU command line: -hda, -drive, -blockdev, and the -device that belongs to one."""

from __future__ import annotations

import re
from posixpath import join, normpath

from kvmd.ctl.foreign.draft import Draft
from kvmd.ctl.foreign.options import key_values, on

DISKS = {
    **dict.fromkeys(("virtio-blk", "virtio-blk-pci", "virtio-blk-device", "vhost-user-blk-pci"), "virtio"),
    **dict.fromkeys(("ide-hd", "ide-drive"), "ide"),
    **dict.fromkeys(("scsi-hd", "scsi-disk", "scsi-block"), "scsi"),
    "nvme": "nvme",
    "usb-storage": "usb",
}
CDS = ("ide-cd", "scsi-cd")

# Devices that kvmd has of its own, or has no need of.
OURS = re.compile(
    r"virtio-(rng|balloon|scsi|serial|vga|gpu|keyboard|tablet|mouse|net).*|(qemu|nec-usb)-?(xhci|uhci|ehci).*|ich9-.*|ahci"
    r"|piix3?-usb-uhci|usb-(ehci|tablet|kbd|mouse|hub)|pcie?-(root-port|pci-bridge|bridge)|ioh3420|VGA|qxl(-vga)?|bochs-display"
    r"|vmware-svga|isa-serial|pvpanic.*|vmgenid|vhost-vsock-pci|tpm-(tis|crb)|secondary-vga|lsi.*|megasas.*|isa-debug-exit"
)


class Drives:
    """Paths become absolute: they are relative to ``directory``."""

    def __init__(self, draft: Draft, directory: str) -> None:
        self._draft = draft
        self._directory = directory
        self._drives: list[dict[str, str]] = []
        self._nodes: dict[str, dict[str, str]] = {}
        self._devices: list[tuple[str, dict[str, str]]] = []
        self.pflash = ""

    def absolute(self, path: str) -> str:
        return normpath(join(self._directory, path.removeprefix("file:"))) if path else ""

    def option(self, option: str, value: str) -> bool:
        """Whether it is one of a drive's."""
        match option:
            case "hda" | "hdb" | "hdc" | "hdd":
                self._drives.append({"file": value, "if": "ide", "option": f"-{option}"})
            case "cdrom":
                self._drives.append({"file": value, "if": "ide", "media": "cdrom", "option": "-cdrom"})
            case "drive":
                self._drives.append({"option": "-drive", **key_values(value, "file")})
            case "blockdev":
                given = key_values(value, "driver")
                self._nodes[given.get("node-name", "")] = given
            case "pflash":
                self.pflash = self.pflash or value
            case _:
                return False
        return True

    def device(self, driver: str, given: dict[str, str]) -> bool:
        """Whether it is one of a drive's, or one of no account."""
        if driver in DISKS or driver in CDS:
            self._devices.append((driver, given))
            return True
        return bool(OURS.fullmatch(driver))

    def finish(self) -> None:
        named = {given.get("id", ""): given for given in self._drives if "id" in given}
        for given in self._drives:
            kind = given.get("if", "ide")
            if kind == "pflash":
                self.pflash = self.pflash or given.get("file", "")
            elif kind == "floppy" or given.get("media") == "floppy":
                self._draft.miss(f"floppy {given.get('file', '')}", "a guest has none")
            elif kind != "none":
                self._add(given, {"ide": "ide"}.get(kind, kind))
        for driver, device in self._devices:
            wanted = device.get("drive", "")
            drive = named.get(wanted) or self._node(wanted)
            if drive is None and driver in CDS:
                self._draft.add_cdrom(driver, "")
            elif drive is None:
                self._draft.miss(f"-device {driver}", f"there is no drive {wanted}".rstrip())
            else:
                media = {"media": "cdrom"} if driver in CDS else {}
                self._add({**drive, **media}, DISKS.get(driver, "ide"))

    def _node(self, name: str) -> dict[str, str] | None:
        """The drive of a -blockdev: the file lies in it, or is a node of its own below."""
        if name not in self._nodes:
            return None
        node, format = self._nodes[name], ""
        for _depth in range(8):
            driver = node.get("driver", "")
            format = format or ("" if driver in ("file", "host_device") else driver)
            path = node.get("filename") or node.get("file.filename")
            if path or node.get("file") not in self._nodes:
                read_only = self._nodes[name].get("read-only", "off")
                return {
                    "file": path or "",
                    "format": format or "raw",
                    "readonly": read_only,
                    "option": f"-blockdev {name}",
                }
            node = self._nodes[node["file"]]
        return None

    def _add(self, given: dict[str, str], bus: str) -> None:
        path, label = given.get("file", ""), given["option"]
        if re.match(r"[a-z+]+:", path) and not path.startswith("file:"):
            todo = "make it one, and write a [[disk]] by hand"
            self._draft.miss(f"{label} {path}", "kvmd has files and block devices", todo)
        elif given.get("media") == "cdrom":
            self._draft.add_cdrom(label, self.absolute(path))
        else:
            readonly = on(given.get("readonly", given.get("read-only", "off")))
            self._draft.add_disk(label, self.absolute(path), bus, given.get("format", ""), readonly=readonly)
        if on(given.get("snapshot", "off")):
            todo = "lay a disk over it: base = the image, path = a new one"
            self._draft.miss(f"{label} {path}: snapshot", "kvmd writes to the image", todo)
        for key in ("iops", "bps", "throttling.iops-total", "throttling.bps-total"):
            if key in given:
                self._draft.miss(f"{label} {path}: {key}", "kvmd does not know it", "[limits] has IOReadBandwidthMax …")
