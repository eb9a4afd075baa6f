"""A quickemu .conf → draft: assignments of a shell. Source: quickemu_conf(5)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from posixpath import join, normpath

from kvmd.ctl.foreign import shell
from kvmd.ctl.foreign.borrowed import add_share, add_usb
from kvmd.ctl.foreign.draft import CHOOSE, FRESH, SEALED, Draft
from kvmd.ctl.foreign.options import on, size

KNOWN = re.compile(r"^\s*(guest_os|disk_img)=", re.MULTILINE)
OLD = ("freedos", "reactos", "kolibrios", "windows-98", "windows-xp")
BSD = ("freebsd", "ghostbsd", "openbsd", "netbsd", "dragonflybsd", "truenas-core")

# Windows and sound of the viewer, and what quickemu runs its processes by.
OURS = {
    *("display", "gl", "width", "height", "screen", "screenpct", "fullscreen", "braille", "viewer", "keyboard"),
    *("mouse", "usb_controller", "sound_card", "sound_duplex", "keyboard_layout", "preallocation", "monitor"),
    *("monitor_telnet_port", "monitor_telnet_host", "serial", "serial_telnet_port", "serial_telnet_host"),
    *("spice_port", "access", "disk_cache"),
}
READ = {
    *("guest_os", "disk_img", "disk_size", "disk_format", "iso", "fixed_iso", "img", "floppy", "ram", "cpu_cores"),
    *("boot", "secureboot", "tpm", "network", "macaddr", "macos_release", "public_dir", "usb_devices"),
}
BY_HAND = {
    "port_forwards": ("no ports are forwarded", "the guest has addresses of its own"),
    "ssh_port": ("no ports are forwarded", "the guest has addresses of its own"),
    "extra_args": ("what they name is not there for kvmd's QEMU", "try them in [qemu] args"),
    "arch": ("kvmd has x86 only", ""),
}


def read(text: str, directory: str, environment: Mapping[str, str]) -> Draft:
    """``directory``: what paths are relative to. Raises ``NotReadable``."""
    _commands, values = shell.read(text, environment)
    draft = Draft()
    system = values.get("guest_os", "linux").lower()
    _system(draft, system, values)
    if found := size(values.get("ram", ""), 1):
        draft.set_memory(found)
    else:
        draft.miss("memory", "quickemu takes it by the size of the host", "set memory; the file says nothing: 512M")
    if re.fullmatch(r"[1-9][0-9]{0,2}", values.get("cpu_cores", "")):
        draft.top["cpus"] = int(values["cpu_cores"])
    else:
        draft.miss("cpus", "quickemu takes them by those of the host", "set cpus; the file says nothing: 1")

    def absolute(key: str) -> str:
        return normpath(join(directory, values[key])) if values.get(key) else ""

    if values.get("disk_img"):
        draft.add_disk("disk_img", absolute("disk_img"), _bus(draft, system), values.get("disk_format", "qcow2"))
        least = size(values.get("disk_size", ""), 1)
        if least and least >= 1 << 20 and draft.disks:
            draft.disks[0]["size"] = values["disk_size"].upper().removesuffix("B").removesuffix("I")
    for key in ("iso", "fixed_iso"):
        if values.get(key):
            draft.add_cdrom(key, absolute(key))
    for key in ("img", "floppy"):
        if values.get(key):
            draft.miss(f"{key} {values[key]}", "it is an installer for one start", "kvmctl install takes a CD image")
    _network(draft, values)
    if values.get("public_dir", "none") != "none":
        tag = "-".join(filter(None, ("Public", environment.get("USER", "").lower())))
        add_share(draft, absolute("public_dir"), tag, "SMB" if system.startswith("windows") else "9p", readonly=False)
    for device in re.findall(r"[^()\s]+", values.get("usb_devices", "")):
        add_usb(draft, f"usb_devices {device}", device)
    for key, value in values.items():
        if value and key not in READ and key not in OURS:
            draft.miss(f"{key} {value}", *BY_HAND.get(key, ("kvmd does not know it",)))
    return draft


def _system(draft: Draft, system: str, values: Mapping[str, str]) -> None:
    draft.set_machine("pc" if system in OLD else "q35")
    if system in OLD:
        draft.top["profile"] = "legacy"
    elif system.startswith("windows"):
        draft.top["profile"] = "windows"
    elif system in BSD:
        draft.top["profile"] = "bsd"
    elif system == "macos":
        draft.miss("macOS", "it wants a boot loader and a CPU of its own", "kvmd does not start it; stay with quickemu")
    if values.get("boot", "efi") != "legacy" and system not in OLD:
        draft.top["firmware"] = "uefi"
        if on(values.get("secureboot", "off")):
            draft.top["secure_boot"] = True
        draft.miss("UEFI's variables", FRESH, CHOOSE)
    if on(values.get("tpm", "off")):
        draft.tpm = True
        draft.miss("the TPM's state", "the guest gets an empty one", SEALED)


def _bus(draft: Draft, system: str) -> str:
    """quickemu installs Windows with virtio's drivers."""
    return "ide" if draft.machine == "pc" else "sata" if system == "macos" else "virtio"


def _network(draft: Draft, values: Mapping[str, str]) -> None:
    kind = values.get("network", "user")
    if kind not in ("none", "restrict"):
        model = "rtl8139" if draft.machine == "pc" else "virtio"
        draft.add_nic("quickemu's own" if kind == "user" else f"bridge {kind}", model, values.get("macaddr", ""))
