"""A Proxmox VM's .conf → draft. Source: qm.conf(5)."""

from __future__ import annotations

import re
from ipaddress import ip_interface
from urllib.parse import unquote

from kvmd.ctl.foreign.borrowed import add_pci, add_usb
from kvmd.ctl.foreign.draft import CHOOSE, FRESH, SEALED, Draft
from kvmd.ctl.foreign.options import key_values, on, size

KNOWN = re.compile(
    r"^(?:ostype|scsihw|bootdisk|smbios1|vmgenid|cores|sockets|(?:scsi|virtio|ide|sata|net)[0-9]+): ", re.M
)
SECRETS = ("cipassword", "sshkeys")
LEGACY = ("w2k", "wxp", "w2k3")
LETTERS = {"c": "disk", "d": "cdrom", "n": "network"}
LIMITS = re.compile(r"(i|m)bps.*|iops.*")

# Proxmox's own order and locks, and tuning.
OURS = {
    *("scsihw", "meta", "vmgenid", "tablet", "vga", "numa", "hotplug", "bootdisk", "lock", "protection", "tags"),
    *("template", "parent", "snaptime", "acpi", "freeze", "keyboard", "rng0", "digest", "runningmachine"),
    *("runningcpu", "snapstate"),
}
BY_HAND = {
    "args": ("what they name is not there for kvmd's QEMU", "try them in [qemu] args"),
    "hookscript": ("kvmd runs none", "order units beside kvmd@NAME.service"),
    "startup": ("guests start as their units say", "systemctl edit kvmd@NAME: After="),
    "cpulimit": ("limits are systemd's", "CPUQuota under [limits]"),
    "cpuunits": ("limits are systemd's", "CPUWeight under [limits]"),
    "affinity": ("pinning is systemd's", "AllowedCPUs under [limits]"),
    "watchdog": ("kvmd has none", 'restart = "always" starts a guest that ended'),
    "hugepages": ("kvmd has none", ""),
    "audio0": ("a guest has no sound", ""),
    "cicustom": ("kvmd makes a seed of its own", "[cloud_init] takes user_data, meta_data, network_config"),
    **dict.fromkeys(
        ("ciuser", "cipassword", "sshkeys", "citype", "ciupgrade"),
        ("kvmd makes a seed of its own", "user_data under [cloud_init]"),
    ),
    **dict.fromkeys(
        ("nameserver", "searchdomain"), ("a seed of kvmd's has the host's", "user_data under [cloud_init]")
    ),
}


def read(text: str) -> Draft:
    draft = Draft()
    values: dict[str, str] = {}
    notes: list[str] = []
    for line in text.splitlines():
        if line.startswith("["):
            draft.miss(f"snapshots, from {line} on", "the image is as it is now", "")
            break
        if line.startswith("#"):
            notes.append(unquote(line[1:]))
        elif match := re.fullmatch(r"([a-z]+[a-z0-9_]*):\s*(.*?)\s*", line):
            values[match[1]] = match[2]
    draft.name = values.pop("name", "")
    draft.set_description(" ".join(notes) or unquote(values.pop("description", "")))
    _machine(draft, values)
    for key, value in values.items():
        if match := re.fullmatch(r"(scsi|virtio|ide|sata)[0-9]+", key):
            _drive(draft, key, match[1], value)
        elif re.fullmatch(r"net[0-9]+", key):
            _interface(draft, key, value)
        elif match := re.fullmatch(r"(hostpci|usb|virtiofs)[0-9]+", key):
            _OF_THE_HOST[match[1]](draft, key, value)
        elif re.fullmatch(r"(parallel|ivshmem|unused)[0-9]*", key):
            draft.miss(f"{key} {value}", "it is in no use" if key.startswith("unused") else "a guest has none")
        elif re.fullmatch(r"(serial|ipconfig)[0-9]+", key) or key in _READ or key in OURS:
            continue
        else:
            what = key if key in SECRETS else f"{key} {value}"
            draft.miss(what, *BY_HAND.get(key, ("kvmd does not know it",)))
    _addresses(draft, values)
    return draft


_READ = {
    *("machine", "bios", "efidisk0", "tpmstate0", "memory", "balloon", "shares", "cores", "sockets", "vcpus", "cpu"),
    *("kvm", "ostype", "localtime", "onboot", "boot", "agent", "smbios1"),
}


def _machine(draft: Draft, values: dict[str, str]) -> None:
    draft.set_machine(key_values(values.get("machine", "pc"), "type").get("type", "pc"))
    _firmware(draft, values)
    if (memory := size(key_values(values.get("memory", "512"), "current").get("current", ""), 1 << 20)) is not None:
        draft.set_memory(memory)
    if values.get("balloon", "0") not in ("0", values.get("memory")):
        draft.miss(f"balloon {values['balloon']}", "a guest keeps its memory", "memory says how much")
    cpus = int(values.get("cores", "1") or 1) * int(values.get("sockets", "1") or 1) if _counts(values) else 1
    if 1 < cpus <= 1024:
        draft.top["cpus"] = cpus
    if "vcpus" in values:
        draft.miss(f"vcpus {values['vcpus']}", f"kvmd plugs no CPUs in: it has {cpus}", "set cpus")
    _cpu(draft, values.get("cpu", ""))
    if values.get("kvm") == "0":
        draft.top["accelerator"] = "tcg"
    system = values.get("ostype", "other")
    if system in LEGACY:
        draft.top["profile"] = "legacy"
    elif system.startswith("w"):
        draft.top["profile"] = "windows"
    elif values.get("localtime") == "1":
        what = "it comes with profiles, windows and legacy, only"
        draft.miss("clock in local time", what, "set it in the guest, or set profile")
    if values.get("onboot") == "1":
        draft.top["autostart"] = True
    if uuid := key_values(values.get("smbios1", ""), "uuid").get("uuid"):
        draft.set_uuid(uuid)
    _boot(draft, values.get("boot", ""))
    agent = key_values(values.get("agent", "0"), "enabled")
    draft.agent = on(agent.get("enabled", "0"))
    if draft.agent and agent.get("type", "virtio") != "virtio":
        draft.miss(f"agent: type={agent['type']}", "its channel is virtio here", "tell the agent in the guest")


def _counts(values: dict[str, str]) -> bool:
    return all(re.fullmatch(r"[0-9]{1,4}", values.get(key, "1")) for key in ("cores", "sockets"))


def _firmware(draft: Draft, values: dict[str, str]) -> None:
    if values.get("bios") == "ovmf":
        draft.top["firmware"] = "uefi"
        if key_values(values.get("efidisk0", ""), "file").get("pre-enrolled-keys") == "1":
            draft.top["secure_boot"] = True
        draft.miss("UEFI's variables (efidisk0)", FRESH, CHOOSE)
    if "tpmstate0" in values:
        draft.tpm = True
        draft.miss("the TPM's state (tpmstate0)", "the guest gets an empty one", SEALED)


def _cpu(draft: Draft, said: str) -> None:
    given = key_values(said, "cputype")
    kind = given.get("cputype", "")
    if kind.startswith(("custom-", "x86-64-v")):
        draft.miss(f"cpu {kind}", "that model is Proxmox's own", "kvmd's default is the host's CPU; or set cpu")
    elif kind and kind != "host":
        draft.set_cpu(",".join([kind, *filter(None, given.get("flags", "").split(";"))]))


def _boot(draft: Draft, said: str) -> None:
    given = key_values(said, "legacy")
    kinds = {"net": "network", "ide2": "cdrom"}
    devices = given.get("order", "").split(";") if "order" in given else []
    order = [kinds.get(device, kinds.get(device.rstrip("0123456789"), "disk")) for device in devices if device]
    order = order or [LETTERS[letter] for letter in given.get("legacy", "") if letter in LETTERS]
    if order:
        draft.boot["order"] = list(dict.fromkeys(order))


def _drive(draft: Draft, key: str, bus: str, value: str) -> None:
    given = key_values(value, "file")
    volume = given.get("file", "")
    if "cloudinit" in volume:
        draft.miss(f"{key} {volume}", "kvmd makes a seed of its own", "user_data under [cloud_init]")
        return
    path, why = _path(volume)
    if given.get("media") == "cdrom":
        draft.add_cdrom(key, path)
        if why:
            draft.miss(f"{key} {volume}", why, "kvmctl media puts it in")
    elif why:
        draft.miss(f"{key} {volume}", why, f"pvesm path {volume} tells it; write a [[disk]] by hand")
    else:
        suffix = path.rpartition(".")[2]
        format = given.get("format") or (suffix if suffix in ("qcow2", "vmdk") else "raw")
        draft.add_disk(key, path, bus, format, readonly=given.get("ro") == "1")
    for option in given:
        if LIMITS.fullmatch(option):
            draft.miss(f"{key}: {option}={given[option]}", "limits are systemd's", "[limits] has IOReadBandwidthMax …")


def _path(volume: str) -> tuple[str, str]:
    """Where a volume of the storages lies that Proxmox is installed with, or why that is not known."""
    storage, _, name = volume.partition(":")
    if volume.startswith("/") or volume in ("none", ""):
        return volume.removeprefix("none"), ""
    if storage == "local" and name.startswith("iso/"):
        return f"/var/lib/vz/template/{name}", ""
    if storage == "local":
        return f"/var/lib/vz/images/{name}", ""
    if storage == "local-lvm" and "/" not in name:
        return f"/dev/pve/{name}", ""
    return "", f"where storage {storage} has it is not in this file"


def _interface(draft: Draft, key: str, value: str) -> None:
    given = key_values(value, "model")
    model = given.get("model") or next(iter(given), "")
    draft.add_nic(f"{key}, bridge {given.get('bridge', '-')}", model, given.get(model, given.get("macaddr", "")))
    for option, todo in (("tag", "set uplink to the VLAN's interface of the host"), ("rate", ""), ("trunks", "")):
        if option in given:
            draft.miss(f"{key}: {option}={given[option]}", "kvmd does not know it", todo)
    if given.get("firewall") == "1":
        draft.miss(f"{key}: firewall", "it is Proxmox's", "kvmd keeps guests to their own addresses")


def _addresses(draft: Draft, values: dict[str, str]) -> None:
    """What cloud-init would have told the guest are addresses of the LAN."""
    for number, nic in enumerate(draft.nics):
        given = key_values(values.get(f"ipconfig{number}", ""), "ip")
        found = []
        for said in (given.get("ip", ""), given.get("ip6", "")):
            try:
                found.append(str(ip_interface(said).ip))
            except ValueError:
                continue
        if found:
            nic["address"] = found


def _mapped(draft: Draft, key: str, kind: str, name: str, table: str) -> None:
    todo = f"pvesh get /cluster/mapping/{kind}/{name} tells it; write a [[{table}]] by hand"
    draft.miss(f"{key} {name}", "what it stands for is not in this file", todo)


def _pci(draft: Draft, key: str, value: str) -> None:
    """Without a function Proxmox hands over all of them."""
    given = key_values(value, "host")
    if "mapping" in given:
        _mapped(draft, key, "pci", given["mapping"], "pci")
        return
    if "mdev" in given:
        draft.miss(f"{key} {value}", "kvmd hands over no part of a device")
        return
    for said in given.get("host", "").split(";"):
        whole = re.fullmatch(r"([0-9a-fA-F]{4}:)?[0-9a-fA-F]{2}:[0-9a-fA-F]{2}", said)
        add_pci(draft, f"{key} {said}", f"{said}.0" if whole else said)
        if whole:
            why = "all its functions are meant, which this file does not list; the first one here"
            draft.miss(f"{key} {said}", why, f"a [[pci]] for each other that lspci -D -s {said} shows")
    for option in ("x-vga", "romfile", "legacy-igd", "vendor-id", "device-id", "sub-vendor-id", "sub-device-id"):
        if given.get(option, "0") != "0":
            draft.miss(f"{key}: {option}={given[option]}", "kvmd does not know it")


def _usb(draft: Draft, key: str, value: str) -> None:
    given = key_values(value, "host")
    if "mapping" in given:
        _mapped(draft, key, "usb", given["mapping"], "usb")
    elif given.get("host", "").lower() == "spice":
        draft.miss(f"{key} {value}", "there is no SPICE to redirect USB by")
    else:
        add_usb(draft, f"{key} {value}", given.get("host", ""))


def _directory(draft: Draft, key: str, value: str) -> None:
    _mapped(draft, key, "dir", key_values(value, "dirid").get("dirid", ""), "share")


_OF_THE_HOST = {"hostpci": _pci, "usb": _usb, "virtiofs": _directory}
