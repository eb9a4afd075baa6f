"""What the keys of a guest file say together: what follows from them, and what cannot be true at once."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from kvmd.config.toml_lines import KeyPath, show
from kvmd.config.values import either
from kvmd.guest import BACKED_FORMATS, BOARD_BUSES, CD_BUS, Board, board

Values = Mapping[str, Any]

# How many drives a bus takes; of the others there is one for each drive.
ROOM = {"sata": 6, "ide": 4}

# What a system from before virtio has drivers for.
LEGACY_BUS: Mapping[Board, str] = {"q35": "sata", "pc": "ide", "microvm": "virtio"}
LEGACY_MODEL: Mapping[Board, str] = {"q35": "rtl8139", "pc": "rtl8139", "microvm": "virtio"}


def settle(values: dict[str, Any], said: Values) -> dict[str, Any]:
    """Fill in what depends on the machine and the profile, and drop what is inherited but of no use here."""
    values["machine"] = values.get("machine") or "q35"
    kind = board(values["machine"])
    legacy = values.get("profile") == "legacy"
    if "kernel" not in values["boot"]:
        _drop(values["boot"], said.get("boot") or {}, "initrd", "cmdline")
    for disk, own in zip(values["disk"], said.get("disk") or (), strict=True):
        disk["bus"] = disk.get("bus") or (LEGACY_BUS[kind] if legacy else "virtio")
        if disk.get("readonly"):
            _drop(disk, own, "size", "base")
        if disk.get("format", "qcow2") not in BACKED_FORMATS:
            _drop(disk, own, "base", "backing")
        if not disk.get("base"):
            _drop(disk, own, "base_format")
    for nic, own in zip(values["network"], said.get("network") or (), strict=True):
        nic["model"] = nic.get("model") or (LEGACY_MODEL[kind] if legacy else "virtio")
        if not own.get("address"):
            _drop(nic, own, "configure")
    serial, vsock = said.get("serial") or {}, said.get("vsock") or {}
    if vsock.get("ready"):
        _drop(values["serial"], serial, "ready")
    if serial.get("ready") or kind == "microvm":
        _drop(values["vsock"], vsock, "ready")
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

    if values["vsock"].get("ready"):
        if values["serial"].get("ready"):
            yield ("vsock", "ready"), "serial.ready is set, too", "a guest says it in one way: remove one of them"
        if kind == "microvm":
            yield ("vsock", "ready"), "microvm has no SMBIOS to tell the guest how", "use serial.ready"
