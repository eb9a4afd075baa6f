"""A guest on its way here from another tool: what is known of it, what stays behind, and its file.

The limits here are those of the guest file; a test holds them to the daemon's own.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from uuid import UUID

Value = str | int | bool | list[str]

BUSES = {"q35": ("virtio", "sata", "scsi", "nvme"), "pc": ("virtio", "ide", "sata", "scsi", "nvme")}
ROOM = {"sata": 6, "ide": 4}
MODELS = ("virtio", "e1000", "e1000e", "rtl8139", "pcnet", "ne2k_pci", "i82551", "i82559er", "tulip", "vmxnet3")
FORMATS = ("qcow2", "raw", "qcow", "qed", "vdi", "vhdx", "vmdk", "vpc")
SUFFIXES = {"img": "raw", "iso": "raw", "bin": "raw", "vhd": "vpc", **{format: format for format in FORMATS}}

# Beginnings of images; what has none of them is raw. Sources: QEMU's block/*.c.
MAGIC = (
    (b"QFI\xfb\0\0\0\1", "qcow"),
    (b"QFI\xfb", "qcow2"),
    (b"QED\0", "qed"),
    (b"KDMV", "vmdk"),
    (b"# Disk DescriptorFile", "vmdk"),
    (b"vhdxfile", "vhdx"),
    (b"conectix", "vpc"),
)

FRESH, CHOOSE = "the guest gets fresh ones", "if it does not boot, choose its loader in the firmware's menu once"
MOST = 300  # characters of what is named
SEALED = "what BitLocker has in it asks for its recovery key: suspend it there before"


# As kvmd.toml(5) has them.
ORDER = (
    *("description", "memory", "cpus", "accelerator", "machine", "cpu", "firmware", "secure_boot", "profile"),
    *("autostart", "restart", "uuid"),
)
ENTRY = ("path", "size", "format", "backing", "bus", "readonly", "uplink", "address", "mac", "model", "tap")


class NotReadable(ValueError):
    """What is wrong with the source as a whole."""


@dataclass
class Draft:
    """``top`` to ``nics`` are keys of the guest file; ``remarks`` stand beside those of ``top``.

    A disk without ``format`` is one whose source did not say it. ``where``: names of the networks that its interfaces
    were on, by their position. ``shares`` to ``agent``: of the host. ``missed``: lines for the person.
    """

    name: str = ""
    top: dict[str, Value] = field(default_factory=dict)
    boot: dict[str, Value] = field(default_factory=dict)
    disks: list[dict[str, Value]] = field(default_factory=list)
    cdroms: list[dict[str, Value]] = field(default_factory=list)
    nics: list[dict[str, Value]] = field(default_factory=list)
    where: list[str] = field(default_factory=list)
    display: dict[str, Value] = field(default_factory=dict)
    shares: list[dict[str, Value]] = field(default_factory=list)
    usb: list[str] = field(default_factory=list)
    pci: list[str] = field(default_factory=list)
    agent: bool = False
    tpm: bool = False
    remarks: dict[str, str] = field(default_factory=dict)
    missed: list[str] = field(default_factory=list)

    def miss(self, what: str, why: str, todo: str = "") -> None:
        """``what`` is not carried over, ``why`` not, and what to do instead."""
        what = plain(what)
        shown = what if len(what) <= MOST else f"{what[: MOST - 1]}…"
        line = f"{shown}: {why}{f' ({todo})' if todo else ''}"
        if line not in self.missed:
            self.missed.append(line)

    @property
    def machine(self) -> str:
        return str(self.top.get("machine", "q35"))

    def set_machine(self, said: str) -> None:
        """Of QEMU's names, with or without a version."""
        kind = said.split(",")[0]
        if kind in ("q35", "pc"):
            self.top["machine"] = kind
        elif match := re.fullmatch(r"pc-(q35|i440fx)-.*", kind):
            self.top["machine"] = "q35" if match[1] == "q35" else "pc"
            self.remarks["machine"] = f"was {kind}; QEMU's newest of that kind"
        else:
            self.miss(f"machine {kind}", "kvmd's machines are q35 and pc", "the file says q35; check that it boots")

    def set_memory(self, size: int) -> None:
        """Bytes."""
        if 1 << 20 <= size < 1 << 63:
            self.top["memory"] = written_size(size >> 10 << 10)
        else:
            self.miss(f"memory of {size} bytes", "kvmd wants 1M at least", "the file says nothing: 512M")

    def set_cpu(self, said: str) -> None:
        """A model of QEMU's, with its features."""
        if re.fullmatch(r"[!-~]+", said):
            self.top["cpu"] = said
        elif said:
            self.miss(f"CPU {said}", "it is not one word", "set cpu")

    def set_boot(self, key: str, path: str) -> None:
        """``key``: kernel or initrd."""
        if _usable(path):
            self.boot[key] = path
        else:
            self.miss(f"{key} {path}", "it is not the path of a file", f"set boot.{key}")

    def set_uuid(self, said: str) -> None:
        try:
            self.top["uuid"] = str(UUID(said))
        except ValueError:
            self.miss(f"UUID {said}", "it is none", "kvmd derives one from the name")

    def set_description(self, said: str) -> None:
        if said := plain(said):
            self.top["description"] = said

    def add_disk(self, label: str, path: str, bus: str, format: str = "", *, readonly: bool = False) -> None:
        if not _usable(path):
            self.miss(f"{label}, {path}", "it is not the path of a file", "convert it, and write a [[disk]] by hand")
            return
        disk: dict[str, Value] = {"path": path}
        if format and format not in FORMATS:
            self.miss(f"{label}: format {format}", "kvmd does not know it", "qemu-img convert -O qcow2")
        elif format:
            disk["format"] = format
        disk["bus"] = bus
        if readonly:
            disk["readonly"] = True
        self.disks.append(disk)

    def add_cdrom(self, label: str, path: str) -> None:
        if path and not _usable(path):
            self.miss(f"{label}, {path}", "it is not the path of a file", "kvmctl media puts another one in")
            path = ""
        self.cdroms.append({"path": path} if path else {})

    def name_interface(self, key: str, name: str) -> None:
        """``key``: uplink or tap, of the interface that was added last."""
        if re.fullmatch(r"(?!(all|default)$)[A-Za-z0-9][A-Za-z0-9_.-]{0,14}", name):
            self.nics[-1][key] = name
        elif name:
            self.miss(f"network interface {len(self.nics)}: {key} {name}", "it is not the name of an interface")

    def add_nic(self, where: str, model: str, mac: str = "") -> None:
        nic: dict[str, Value] = {}
        label = f"network interface {len(self.nics) + 1}"
        model = {"virtio-net": "virtio", "virtio-net-pci": "virtio"}.get(model, model)
        if model.startswith("e1000-"):
            model = "e1000"
        if model in MODELS:
            nic["model"] = model
        elif model:
            self.miss(f"{label}: model {model}", "kvmd has none of these", "it gets that of the profile")
        if mac and _is_mac(mac):
            nic["mac"] = mac.lower()
        elif mac:
            self.miss(f"{label}: MAC address {mac}", "it cannot be that of a machine", "kvmd derives one")
        self.nics.append(nic)
        self.where.append(where)

    def local_time(self) -> None:
        """The clock comes with the profile; where nothing else tells the system, the machine does."""
        self.top["profile"] = profile = "legacy" if self.machine == "pc" else "windows"
        why = f'it comes with a profile: profile = "{profile}" here'
        self.miss("clock in local time", why, "remove it for Linux, whose clock is UTC")

    def set_vnc(self, address: str, port: int) -> None:
        """At an address of the host itself; elsewhere a password would have to be there."""
        if port < 5900:
            self.miss("VNC", f"it cannot listen at port {port}", "kvmctl view shows the screen")
        elif address in ("127.0.0.1", "localhost", "::1", "[::1]"):
            host = "[::1]" if "::1" in address else "127.0.0.1"
            self.display.update({"vnc": True, "address": f"{host}:{port}"})
        else:
            todo = "kvmctl view shows it, also with -H; or set display.address and password_file"
            self.miss(f"VNC at {address or 'all addresses'}, port {port}", "it would be open to the network", todo)


def plain(text: str) -> str:
    """One printable line."""
    return "".join(char if char.isprintable() else " " for char in " ".join(text.split()))


def written_size(size: int) -> str | int:
    """Bytes as a guest file has them."""
    for power, unit in ((40, "T"), (30, "G"), (20, "M"), (10, "K")):
        if size and size % (1 << power) == 0:
            return f"{size >> power}{unit}"
    return size


def format_of(beginning: bytes) -> str:
    """Of an image that begins so."""
    if beginning[64:68] == b"\x7f\x10\xda\xbe":
        return "vdi"
    return next((format for magic, format in MAGIC if beginning.startswith(magic)), "raw")


def backing_of(beginning: bytes) -> str:
    """The backing file that a qcow or qcow2 image names, if it lies within these bytes."""
    if not beginning.startswith(b"QFI\xfb"):
        return ""
    at, length = int.from_bytes(beginning[8:16], "big"), int.from_bytes(beginning[16:20], "big")
    return beginning[at : at + length].decode(errors="replace") if at and length <= 1023 else ""


def _usable(path: str) -> bool:
    parts = path.split("/")
    return len(path) < 4096 and bool(path) and parts[-1] not in ("", ".") and ".." not in parts and path.isprintable()


def _is_mac(said: str) -> bool:
    digits = re.fullmatch(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", said.lower())
    return bool(digits) and not int(said[:2], 16) & 1 and bool(said.strip("0:"))


def name_of(said: str, draft: Draft) -> str:
    """A guest's name that is as near to it as can be."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", said).lstrip("_.-").rstrip("-")[:63] or "guest"
    name = "guest-kvmd" if name == "kvmd" else name
    if said and name != said:
        draft.miss(f"name {said}", "guests are named by letters, digits and _ . -", f"it is {name} here; or --name")
    return name


def settle(draft: Draft) -> None:
    """Make it one that kvmd can have: buses of the machine, room on them, Secure Boot's conditions, what is said."""
    machine = draft.machine
    buses = BUSES.get(machine, ("virtio",))
    drives: Counter[str] = Counter()
    cds = "ide" if machine == "pc" else "sata"
    for cd in draft.cdroms[ROOM[cds] :]:
        draft.miss(f"CD drive {cd.get('path', '')}".rstrip(), f"{machine} takes {ROOM[cds]} of them")
    del draft.cdroms[ROOM[cds] :]
    drives[cds] = len(draft.cdroms)
    for disk in draft.disks:
        bus = str(disk["bus"])
        wanted = bus if bus in buses else {"ide": "sata", "sata": "ide"}.get(bus, "virtio")
        why = "" if bus in buses or {bus, wanted} == {"ide", "sata"} else f"kvmd's {machine} has none"
        if disk.get("readonly") and wanted in ROOM:
            wanted, why = "scsi", "a read-only disk cannot be on it"
        elif drives[wanted] >= ROOM.get(wanted, drives[wanted] + 1):
            wanted, why = "scsi", f"{machine} takes {ROOM[wanted]} drives on it"
        drives[wanted] += 1
        if why:
            draft.miss(f"{disk['path']}: bus {bus}", why, f"it is on {wanted} here")
        disk["bus"] = wanted
    if draft.top.get("secure_boot") and (machine != "q35" or "kernel" in draft.boot):
        del draft.top["secure_boot"]
        why = "a kernel loaded by QEMU is not signed" if machine == "q35" else "it needs machine q35"
        draft.miss("Secure Boot", why, "UEFI without it")
    if draft.boot.get("order") == ["disk", "cdrom"]:
        del draft.boot["order"]
    for key in ("initrd", "cmdline"):
        if key in draft.boot and "kernel" not in draft.boot:
            draft.miss(f"{key} {draft.boot.pop(key)}", "there is no kernel to go with it")
    for number, (nic, where) in enumerate(zip(draft.nics, draft.where, strict=True), 1):
        if "address" in nic:
            continue
        which = f"network interface {number}{f' ({where})' if where else ''}"
        why = "the guest is on the LAN without a bridge, and the DHCP there does not reach it"
        draft.miss(f"{which}: addresses", why, 'write them into the file: address = ["192.0.2.42"]')


def render(draft: Draft, origin: str) -> str:
    """The guest file."""
    head = [f"# {draft.name}, as {origin} had it: man kvmd.toml has all keys.", ""]
    lines = head + _keys({key: draft.top[key] for key in ORDER if key in draft.top}, draft.remarks)
    tables: list[tuple[str, Mapping[str, Value]]] = [("[boot]", draft.boot), ("[display]", draft.display)]
    tables += [(name, {"enabled": True}) for name, on in (("[agent]", draft.agent), ("[tpm]", draft.tpm)) if on]
    for title, values in tables:
        lines += ["", title, *_keys(values)] if values else []
    for title, entries in (("[[disk]]", draft.disks), ("[[cdrom]]", draft.cdroms), ("[[network]]", draft.nics)):
        for said in entries:
            values = {key: said[key] for key in sorted(said, key=ENTRY.index)}
            lines += ["", title, *_keys(values)]
            if title == "[[network]]" and "address" not in values:
                lines += ['# address = ["192.0.2.42"]      # of the LAN; without one the guest reaches nothing']
    for share in draft.shares:
        lines += ["", "[[share]]", *_keys(share)]
    for title, key, devices in (("[[usb]]", "device", draft.usb), ("[[pci]]", "address", draft.pci)):
        for device in devices:
            lines += ["", title, *_keys({key: device})]
    return "\n".join(lines) + "\n"


def _keys(values: Mapping[str, Value], remarks: Mapping[str, str] | None = None) -> list[str]:
    beside = {key: f"      # {remark}" for key, remark in (remarks or {}).items()}
    return [f"{key} = {json.dumps(value, ensure_ascii=False)}{beside.get(key, '')}" for key, value in values.items()]
