"""What the keys of a guest file say together: what follows from them, and what cannot be true at once."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from kvmd.config.toml_lines import KeyPath, show
from kvmd.config.values import either
from kvmd.guest import BACKED_FORMATS, BOARD_BUSES, CD_BUS, Board, board
from kvmd.profile import PROFILES

Values = Mapping[str, Any]

# How many drives a bus takes; of the others there is one for each drive.
ROOM = {"sata": 6, "ide": 4}

SMBIOS = 32 << 10  # bytes: its table may have 64 KiB, and QEMU's own are in it


def settle(values: dict[str, Any], said: Values) -> dict[str, Any]:
    """Fill in what depends on the machine and the profile, and drop what is inherited but of no use here."""
    profile = PROFILES[values.get("profile") or "linux"]
    values["machine"] = values.get("machine") or profile.machine
    kind = board(values["machine"])
    if kind == "microvm":
        _drop(values, said, "firmware")
        _drop(values["tpm"], said.get("tpm") or {}, "enabled")
        _drop(values["agent"], said.get("agent") or {}, "enabled")
    if kind != "q35" or values.get("firmware") != "uefi" or "kernel" in values["boot"]:
        _drop(values, said, "secure_boot")
    if "kernel" not in values["boot"]:
        _drop(values["boot"], said.get("boot") or {}, "initrd", "cmdline")
    for disk, own in zip(values["disk"], said.get("disk") or (), strict=True):
        disk["bus"] = disk.get("bus") or profile.default_disk(kind)
        if disk.get("readonly"):
            _drop(disk, own, "size", "base")
        if disk.get("format", "qcow2") not in BACKED_FORMATS:
            _drop(disk, own, "base", "backing")
        if not disk.get("base"):
            _drop(disk, own, "base_format")
    for nic, own in zip(values["network"], said.get("network") or (), strict=True):
        nic["model"] = nic.get("model") or profile.default_nic(kind)
        if not own.get("address"):
            _drop(nic, own, "configure")
    serial, vsock = said.get("serial") or {}, said.get("vsock") or {}
    if vsock.get("ready"):
        _drop(values["serial"], serial, "ready")
    if "cloud_init" not in said:
        values["cloud_init"] = None
    if kind == "microvm" or values.get("firmware") == "uefi":
        _drop(values["serial"], serial, "screen")
    if serial.get("ready") or kind == "microvm":
        _drop(values["vsock"], vsock, "ready")
    display = said.get("display") or {}
    if kind == "microvm":
        _drop(values["display"], display, "vnc")
    if not values["display"].get("vnc"):
        _drop(values["display"], display, "address", "password_file")
    if not values["display"].get("address"):
        _drop(values["display"], display, "password_file")
    return values


def _drop(values: dict[str, Any], own: Values, *names: str) -> None:
    for name in names:
        if name not in own:
            values.pop(name, None)


def disagreements(values: Values) -> Iterator[tuple[KeyPath, str, str]]:
    """What keys say that cannot be true together: path, what is wrong, what to do."""
    for name in ("initrd", "cmdline"):
        if name in values["boot"] and "kernel" not in values["boot"]:
            yield ("boot", name), "there is no kernel to go with it", "set boot.kernel, or remove it"

    machine, kind = values["machine"], board(values["machine"])
    if kind == "microvm" and values.get("profile") == "windows":
        yield ("machine",), "Windows does not run on it", "remove it"
    if values["serial"].get("screen"):
        if kind == "microvm":
            yield ("serial", "screen"), "microvm has no screen", "remove it"
        elif values.get("firmware") == "uefi":
            yield ("serial", "screen"), "UEFI is on the serial port in any case", "remove it"
    if kind == "microvm" and values.get("firmware") == "uefi":
        yield ("firmware",), "microvm has no UEFI", 'write "bios", or set machine = "q35"'
    if kind == "microvm" and values["tpm"].get("enabled"):
        yield ("tpm", "enabled"), "microvm has no TPM", 'set machine = "q35"'
    yield from _devices(values, kind)
    if values.get("secure_boot"):
        if values.get("firmware") != "uefi":
            yield ("secure_boot",), "Secure Boot is UEFI's", 'set firmware = "uefi"'
        if kind != "q35":
            yield ("secure_boot",), f"{machine} has not what Secure Boot needs, SMM", 'set machine = "q35"'
        if "kernel" in values["boot"]:
            hint = "remove boot.kernel, and let the boot loader on a disk start it"
            yield ("secure_boot",), "a kernel that does not come from a signed boot loader is not started", hint
    drives: Counter[str] = Counter()
    for position, disk in enumerate(values["disk"]):
        path: KeyPath = ("disk", position)
        if disk.get("readonly"):
            for name in ("size", "base"):
                if disk.get(name):
                    yield (*path, name), "a read-only disk is not created", f"remove {name} or readonly"
        for name in ("base", "backing"):
            if disk.get(name) and disk.get("format") not in (None, *BACKED_FORMATS):
                yield (*path, name), f"{disk['format']} has no backing images", 'set format = "qcow2"'
        if disk.get("base_format") and "base" not in disk:
            yield (*path, "base_format"), "there is no base to be of that format", "set base, or remove it"
        bus = disk["bus"]
        drives[bus] += 1
        if bus not in BOARD_BUSES[kind]:
            yield (*path, "bus"), f"{machine} has no {bus}", f"write {either(BOARD_BUSES[kind])}"
        elif drives[bus] > ROOM.get(bus, drives[bus]):
            yield path, f"{machine} takes only {ROOM[bus]} {bus} drives", 'set bus = "virtio" or "scsi"'
        if disk.get("readonly") and bus in ("sata", "ide"):
            yield (*path, "readonly"), f"a {bus} disk cannot be read-only", 'set bus = "virtio" or "scsi"'
    if values["cloud_init"] is not None and not PROFILES[values.get("profile") or "linux"].virtio:
        drives[CD_BUS[kind]] += 1  # where the seed is a CD
    for position in range(len(values["cdrom"])):
        drives[CD_BUS[kind]] += 1
        if drives[CD_BUS[kind]] > ROOM.get(CD_BUS[kind], drives[CD_BUS[kind]]):
            yield ("cdrom", position), f"{machine} takes only {ROOM[CD_BUS[kind]]} {CD_BUS[kind]} drives", "remove one"

    for position, nic in enumerate(values["network"]):
        if kind == "microvm" and nic["model"] != "virtio":
            yield ("network", position, "model"), f"microvm has no {nic['model']}", 'write "virtio"'
        if nic.get("tap") and nic["tap"] == nic.get("uplink"):
            yield ("network", position, "tap"), f"{show(nic['tap'])} is the uplink", "give the tap a name of its own"
        if nic.get("configure") and nic.get("address", ()) == ():
            yield ("network", position, "configure"), "there is no address to configure", "set address, or remove it"
        if nic.get("configure") and not re.fullmatch(r"[A-Za-z0-9_.-]+", nic.get("tap") or "tap"):
            what = f"{show(nic['tap'])} cannot be the name where configure is true"
            yield ("network", position, "tap"), what, 'use letters, digits and "_.-"'

    for name in values["credentials"]:
        if not re.fullmatch(r"(?!\.\.?$)[!-.0-<>-~]{1,255}", name):
            what = f"{show(name)} cannot be the name of a credential"
            yield ("credentials", name), what, 'use letters, digits and "_.-"'
    if sum(len(name) + 4 * len((value or "").encode()) // 3 for name, value in values["credentials"].items()) > SMBIOS:
        yield ("credentials",), f"they have more than {SMBIOS >> 10} KiB together", "use [cloud_init] for what is large"
    if values["credentials"] and kind == "microvm":
        yield ("credentials",), "microvm has no SMBIOS to hand them over", "remove them"

    yield from _display(values["display"], kind)
    if values["vsock"].get("ready"):
        if values["serial"].get("ready"):
            yield ("vsock", "ready"), "serial.ready is set, too", "a guest says it in one way: remove one of them"
        if kind == "microvm":
            yield ("vsock", "ready"), "microvm has no SMBIOS to tell the guest how", "use serial.ready"


def doubts(values: Values) -> Iterator[tuple[KeyPath, str, str]]:
    """What the installer of the profile's system cannot see, or cannot live in: path, what, what to do."""
    name = values.get("profile") or "linux"
    profile, kind = PROFILES[name], board(values["machine"])
    system = {"windows": "Windows", "legacy": "a system of old", "bsd": "a BSD"}.get(name, "Linux")
    drivers = name == "windows" and len(values["cdrom"]) > 1  # a second CD is there for them
    for position, disk in enumerate(values["disk"]):
        if disk["bus"] in profile.unseen and not drivers:
            hint = f'set bus = "{profile.default_disk(kind)}"'
            hint += ", or add a [[cdrom]] with drivers" if name == "windows" else ""
            yield ("disk", position, "bus"), f"the installer of {system} sees no disk on {disk['bus']}", hint
    for position, nic in enumerate(values["network"]):
        if nic["model"] in profile.unseen and not drivers:
            hint = f'set model = "{profile.default_nic(kind)}"'
            what = f"{system} has no driver for {nic['model']} of its own"
            yield ("network", position, "model"), what, hint
    if (values.get("memory") or profile.least) < profile.least or ("memory" not in values and profile.least):
        what = f"the installer of {system} wants {profile.least >> 30} GiB at least"
        yield ("memory",), what, f'set memory = "{profile.least >> 29}G"'
    user_data = (values["cloud_init"] or {}).get("user_data")
    if user_data and not re.match(r"#|Content-Type:|MIME-Version:", user_data, re.IGNORECASE):
        yield (
            ("cloud_init", "user_data"),
            "cloud-init cannot tell what it is",
            'begin it with "#cloud-config" or "#!"',
        )
    if name == "legacy" and values.get("firmware") == "uefi":
        yield ("firmware",), "a system of old boots by BIOS", 'set firmware = "bios"'


def _devices(values: Values, kind: Board) -> Iterator[tuple[KeyPath, str, str]]:
    """Of the host, and the agent's channel to it."""
    for name in ("share", "usb", "pci") if kind == "microvm" else ():
        if values[name]:
            yield (name, 0), "microvm has no PCI bus for it", 'set machine = "q35"'
    if kind == "microvm" and values["agent"].get("enabled"):
        yield ("agent", "enabled"), "microvm has no PCI bus for its channel", 'set machine = "q35"'
    tags: set[str] = set()
    for position, share in enumerate(values["share"]):
        if (tag := share.get("tag")) and tag in tags:
            yield ("share", position, "tag"), f"{show(tag)} is another share's, too", "choose another"
        tags.add(tag)
        if share.get("user") == "root":
            yield ("share", position, "user"), "root would let the guest at all of it", "name another user"
        elif share.get("readonly") is False and "user" not in share:
            hint = "set user: who owns on the host what the guest writes"
            yield ("share", position, "readonly"), "nobody is there to write in the guest's name", hint


def _display(display: Values, kind: Board) -> Iterator[tuple[KeyPath, str, str]]:
    vnc, address = display.get("vnc"), display.get("address")
    if vnc and kind == "microvm":
        yield ("display", "vnc"), "microvm has no screen", "remove it"
    if address and not vnc:
        yield ("display", "address"), "there is no screen to be shown there", "set vnc = true, or remove it"
    if address and not address.address.is_loopback and "password_file" not in display:
        what = f"{address} would show the screen to the network, and let everybody type"
        yield ("display", "address"), what, 'set password_file, or an address of the host itself: "127.0.0.1:5901"'
    if display.get("password_file") and "address" not in display:
        yield ("display", "password_file"), "there is no address to guard", "set address, or remove it"
