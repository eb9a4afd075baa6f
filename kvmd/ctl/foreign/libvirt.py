"""A libvirt domain XML → draft. Source: libvirt's formatdomain page and its RELAX NG schema, domaincommon.rng."""

from __future__ import annotations

import re
from collections.abc import Callable
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from kvmd.ctl.foreign import devices
from kvmd.ctl.foreign.draft import CHOOSE, FRESH, Draft, NotReadable, plain

UNITS = {
    **{"b": 1, "bytes": 1, "KB": 1000, "k": 1 << 10, "KiB": 1 << 10, "MB": 10**6, "M": 1 << 20, "MiB": 1 << 20},
    **{"GB": 10**9, "G": 1 << 30, "GiB": 1 << 30, "TB": 10**12, "T": 1 << 40, "TiB": 1 << 40},
}
BOOT = {"hd": "disk", "cdrom": "cdrom", "network": "network"}
BSD = ("freebsd", "openbsd", "netbsd", "dragonflybsd")
QEMU = "{http://libvirt.org/schemas/domain/qemu/1.0}"

# What kvmd has its own of, or has no need of: nothing is lost.
OURS = {
    *(
        "name",
        "metadata",
        "currentMemory",
        "resource",
        "pm",
        "iothreads",
        "on_poweroff",
        "on_reboot",
        "genid",
        "seclabel",
    ),
}


def read(text: str) -> Draft:
    """Raises ``NotReadable``."""
    if re.search(r"<!(DOCTYPE|ENTITY)", text, re.IGNORECASE):
        raise NotReadable("it has a DOCTYPE, which libvirt does not write (remove it)")
    try:
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError, RecursionError) as error:
        raise NotReadable(f"it is not XML: {error}") from error
    if root.tag == "domstatus" or root.tag == "domainsnapshot":
        inner = root.find("domain")
        root = inner if inner is not None else root
    if root.tag != "domain":
        raise NotReadable(f"it is the XML of a {root.tag}, not of a domain (virsh dumpxml --inactive NAME)")
    draft = Draft(name=_text(root, "name"))
    if root.get("type") not in ("kvm", "qemu", None):
        draft.miss(f"domain type {root.get('type')}", "kvmd has QEMU", "check that the system boots")
    for child in root:
        handler = _TOP.get(child.tag)
        if handler:
            handler(draft, child)
        elif child.tag not in OURS:
            draft.miss(f"<{child.tag}>", "kvmd does not know it", _instead(child.tag))
    _boot_order(draft, root)
    _profile(draft, root)
    return draft


def _instead(tag: str) -> str:
    limits = {"cputune", "memtune", "blkiotune", "numatune", "memoryBacking"}
    return "[limits] has systemd's settings: CPUQuota, MemoryMax …" if tag in limits else ""


def _text(element: Element, path: str) -> str:
    return plain(element.findtext(path) or "")


def _description(draft: Draft, element: Element) -> None:
    """A title goes before a description."""
    if element.tag == "title" or "description" not in draft.top:
        draft.set_description(element.text or "")


def _uuid(draft: Draft, element: Element) -> None:
    draft.set_uuid(plain(element.text or ""))


def _memory(draft: Draft, element: Element) -> None:
    said, unit = plain(element.text or ""), element.get("unit", "KiB")
    if not re.fullmatch(r"[0-9]{1,15}", said) or unit not in UNITS:
        draft.miss(f"memory {said} {unit}", "it is no size", "the file says nothing: 512M")
    else:
        draft.set_memory(int(said) * UNITS[unit])


def _vcpu(draft: Draft, element: Element) -> None:
    said = plain(element.text or "")
    now = element.get("current", said)
    if now.isdecimal() and 1 <= int(now) <= 1024:
        draft.top["cpus"] = int(now)
    if now != said:
        draft.miss(f"{said} CPUs at most", f"kvmd plugs none in while a guest runs: it has {now}", "set cpus")
    if element.get("cpuset"):
        draft.miss(f"CPUs {element.get('cpuset')}", "pinning is systemd's", "AllowedCPUs under [limits]")


def _os(draft: Draft, element: Element) -> None:
    kind = element.find("type")
    if kind is not None:
        if kind.get("arch", "x86_64") not in ("x86_64", "i686"):
            draft.miss(f"architecture {kind.get('arch')}", "kvmd has x86 only", "the guest will not run")
        draft.set_machine(kind.get("machine", "pc"))
    loader, secure = element.find("loader"), element.find("firmware/feature[@name='secure-boot']")
    if element.get("firmware") == "efi" or (loader is not None and loader.get("type") == "pflash"):
        draft.top["firmware"] = "uefi"
        if (loader is not None and loader.get("secure") == "yes") or (
            secure is not None and secure.get("enabled") == "yes"
        ):
            draft.top["secure_boot"] = True
        where = _text(element, "nvram")
        what = f"UEFI's variables{f', {where}' if where else ''}"
        draft.miss(what, FRESH, CHOOSE)
    elif loader is not None and loader.text:
        draft.miss(f"firmware {loader.text}", "kvmd has SeaBIOS and OVMF", 'firmware = "uefi" is OVMF')
    for key in ("kernel", "initrd"):
        if said := _text(element, key):
            draft.set_boot(key, said)
    if said := _text(element, "cmdline"):
        draft.boot["cmdline"] = said
    for tag in ("acpi/table", "smbios", "dtb", "init"):
        if element.find(tag) is not None:
            draft.miss(f"<os><{tag}>", "kvmd does not know it")


def _boot_order(draft: Draft, root: Element) -> None:
    listed = [boot.get("dev", "") for boot in root.iterfind("os/boot")]
    if not listed:
        each = [
            (boot.get("order", "99"), device)
            for device in root.iterfind("devices/*")
            for boot in device.iterfind("boot")
        ]
        each.sort(key=lambda pair: int(pair[0]) if pair[0].isdecimal() else 99)
        kinds = {"interface": "network", "disk": "hd"}
        listed = [
            "cdrom" if device.get("device") == "cdrom" else kinds.get(device.tag, device.tag) for _order, device in each
        ]
    if "fd" in listed:
        draft.miss("boot from a floppy", "a guest has none", "kvmctl install, from a CD")
    order = list(dict.fromkeys(BOOT[word] for word in listed if word in BOOT))
    if order:
        draft.boot["order"] = order


def _cpu(draft: Draft, element: Element) -> None:
    mode, model = element.get("mode", "custom"), _text(element, "model")
    if mode == "maximum":
        draft.top["cpu"] = "max"
    elif mode == "custom" and model:
        signs = {"force": "+", "require": "+", "disable": "-", "forbid": "-"}
        features = [
            (signs.get(each.get("policy", "require")), each.get("name")) for each in element.iterfind("feature")
        ]
        draft.set_cpu(",".join([model, *(f"{sign}{name}" for sign, name in features if sign and name)]))
    elif mode == "host-model":
        draft.miss("CPU host-model", "kvmd's default is the host's own CPU", "set cpu if the guest moves between hosts")
    for tag in ("topology", "numa"):
        if element.find(tag) is not None:
            draft.miss(f"CPU <{tag}>", "the CPUs are arranged as QEMU has it")


def _clock(draft: Draft, element: Element) -> None:
    if element.get("offset") not in ("utc", "localtime", None):
        draft.miss(f"clock {element.get('offset')}", "it is UTC, or local time by the profile", "set it in the guest")


def _profile(draft: Draft, root: Element) -> None:
    """libosinfo knows the system; else the clock tells something."""
    system = next((each.get("id", "") for each in root.iter() if each.tag.endswith("}os") and each.get("id")), "")
    clock = root.find("clock")
    localtime = clock is not None and clock.get("offset") == "localtime"
    if "microsoft.com/" in system or root.find("features/hyperv") is not None:
        draft.top["profile"] = "windows"
    elif any(each in system for each in BSD):
        draft.top["profile"] = "bsd"
    elif localtime:
        draft.local_time()


def _on_crash(draft: Draft, element: Element) -> None:
    if plain(element.text or "") == "restart":
        draft.top["restart"] = "on-failure"


def _features(draft: Draft, element: Element) -> None:
    known = {"acpi", "apic", "pae", "hyperv", "vmport", "smm", "kvm", "ioapic"}
    for feature in element:
        if feature.tag not in known:
            draft.miss(f"feature {feature.tag}", "kvmd does not know it")


def _commandline(draft: Draft, element: Element) -> None:
    args = [plain(arg.get("value", "")) for arg in element.iterfind(f"{QEMU}arg")]
    if args:
        draft.miss(f"QEMU's arguments {' '.join(args)}", "what they name may be missing", "[qemu] args")
    for variable in element.iterfind(f"{QEMU}env"):
        draft.miss(f"QEMU's environment {variable.get('name')}", "kvmd sets none")


Handler = Callable[[Draft, Element], None]

_TOP: dict[str, Handler] = {
    **dict.fromkeys(("title", "description"), _description),
    "uuid": _uuid,
    "memory": _memory,
    "vcpu": _vcpu,
    "os": _os,
    "cpu": _cpu,
    "clock": _clock,
    "on_crash": _on_crash,
    "features": _features,
    "devices": devices.read,
    f"{QEMU}commandline": _commandline,
}
