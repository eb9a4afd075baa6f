"""The devices of a libvirt domain → draft. Source: as in ``libvirt``."""

from __future__ import annotations

from collections.abc import Callable
from xml.etree.ElementTree import Element

from kvmd.ctl.foreign.borrowed import add_pci, add_share, add_usb, add_usb_numbers, number
from kvmd.ctl.foreign.draft import SEALED, Draft, plain

# What kvmd has its own of, or has no need of: nothing is lost.
OURS = {
    *("emulator", "controller", "input", "memballoon", "console", "serial", "video", "panic", "hub", "audio", "vsock"),
    "rng",
}
BY_HAND = {
    "sound": ("a guest has no sound",),
    "watchdog": ("a guest has none", 'restart = "always" starts one that ended'),
    "redirdev": ("there is no SPICE to redirect USB by",),
    "memory": ("memory devices are not known", "memory is what the domain has"),
}


def read(draft: Draft, element: Element) -> None:
    for device in element:
        handler = _READ.get(device.tag)
        if handler:
            handler(draft, device)
        elif device.tag not in OURS:
            draft.miss(f"<{device.tag}>", *BY_HAND.get(device.tag, ("kvmd does not know it",)))


def _source(disk: Element) -> str:
    """A path, or nothing; a network disk or a volume of a pool is none."""
    source = disk.find("source")
    if source is None:
        return ""
    return plain(source.get("file") or source.get("dev") or source.get("name") or source.get("volume") or "?")


def _disk(draft: Draft, element: Element) -> None:
    target, driver = element.find("target"), element.find("driver")
    device, path = element.get("device", "disk"), _source(element)
    label = f"{device} {target.get('dev', '') if target is not None else ''}".strip()
    if element.get("type", "file") not in ("file", "block"):
        todo = "make it a file or a block device of this host, and write a [[disk]] by hand"
        draft.miss(f"{label}: {element.get('type')} {path}", "kvmd has files and block devices", todo)
    elif device == "cdrom":
        draft.add_cdrom(label, path)
    elif device != "disk":
        draft.miss(f"{label} {path}".strip(), "a guest has none of these")
    else:
        bus = target.get("bus", "") if target is not None else ""
        readonly = element.find("readonly") is not None
        draft.add_disk(label, path, bus or "virtio", _attribute(driver, "type", "raw"), readonly=readonly)
        below = [_source(each) for each in element.iter("backingStore")]
        below = [path for path in below if path.startswith("/")]
        if below and draft.disks and draft.disks[-1]["path"] == path:
            draft.disks[-1]["backing"] = below
    for tag in ("iotune", "encryption", "auth", "transient", "shareable"):
        if element.find(tag) is not None:
            draft.miss(f"{label}: {tag}", "kvmd does not know it")
    if (element.findtext("serial") or "").strip():
        serial = plain(element.findtext("serial") or "")
        draft.miss(f"{label}: serial number {serial}", "disks have none", "use UUIDs in the guest")


def _interface(draft: Draft, element: Element) -> None:
    kind, source, mac, model = (
        element.get("type", ""),
        element.find("source"),
        element.find("mac"),
        element.find("model"),
    )
    if kind == "hostdev":
        _pci(draft, element, "network interface of the host")
        if mac is not None or element.find("vlan") is not None:
            what = f"MAC address and VLAN of the host's network interface {_attribute(mac, 'address', '')}".rstrip()
            draft.miss(what, "kvmd sets none there", "ip link set PF vf NUMBER mac …, before the guest starts")
        return
    given = dict(source.attrib) if source is not None else {}
    name = plain(given.get("bridge") or given.get("network") or given.get("dev") or "")
    draft.add_nic(f"{kind} {name}".strip(), _attribute(model, "type", "rtl8139"), _attribute(mac, "address", ""))
    label = f"network interface {len(draft.nics)}"
    if kind == "direct":
        draft.name_interface("uplink", given.get("dev", ""))
    for tag in ("vlan", "filterref", "bandwidth", "virtualport", "portForward"):
        if element.find(tag) is not None:
            todo = "set uplink to the VLAN's interface of the host" if tag == "vlan" else ""
            draft.miss(f"{label}: {tag}", "kvmd does not know it", todo)


def _attribute(element: Element | None, name: str, default: str) -> str:
    return plain(element.get(name, default)) if element is not None else default


def _graphics(draft: Draft, element: Element) -> None:
    kind, port = element.get("type", ""), element.get("port", "-1")
    if kind == "vnc" and port.isdecimal() and element.get("autoport") != "yes":
        listen = element.find("listen")
        draft.set_vnc(element.get("listen") or _attribute(listen, "address", "127.0.0.1"), int(port))
    elif kind == "spice":
        draft.miss("SPICE", "kvmd shows screens by VNC", "kvmctl view")
    elif kind != "vnc":
        draft.miss(f"graphics {kind}", "kvmd shows screens by VNC", "kvmctl view")
    if element.get("passwd"):
        draft.miss("the password of VNC", "no guest file has secrets of the screen", "display.password_file")


def _tpm(draft: Draft, element: Element) -> None:
    backend = element.find("backend")
    if backend is not None and backend.get("type") != "emulator":
        draft.miss(f"TPM {backend.get('type')}", "kvmd emulates one", "[tpm] enabled = true")
        return
    draft.tpm = True
    draft.miss("the TPM's state", "the guest gets an empty one", SEALED)


def _hostdev(draft: Draft, element: Element) -> None:
    def said(tag: str, name: str) -> str:
        return _attribute(element.find(f"source/{tag}"), name, "")

    kind = element.get("type", "")
    label = f"{kind} device of the host"
    if kind == "usb" and element.find("source/vendor") is not None:
        vendor, product = said("vendor", "id"), said("product", "id")
        add_usb_numbers(draft, f"{label}, {vendor}:{product}", vendor, product)
    elif kind == "usb":
        where = f"{said('address', 'bus')}-{said('address', 'port')}"
        add_usb(draft, f"{label}, number {said('address', 'device')} on bus {said('address', 'bus')}", where)
    elif kind == "pci":
        _pci(draft, element, label)
    else:
        draft.miss(label.strip(), "kvmd hands over those of USB and PCI")


def _pci(draft: Draft, element: Element, label: str) -> None:
    """libvirt binds the driver itself where it is said to manage it."""
    found = element.find("source/address")
    parts = [number(_attribute(found, each, "0")) for each in ("domain", "bus", "slot", "function")]
    domain, bus, slot, function = (0xFFFFF if part is None else part for part in parts)
    address = f"{domain:04x}:{bus:02x}:{slot:02x}.{function:x}" if found is not None else "?"
    add_pci(draft, f"{label}, {address}", address, bound=element.get("managed") != "yes")
    if element.find("rom[@file]") is not None:
        draft.miss(f"{address}: ROM of a file", "kvmd does not know it")


def _filesystem(draft: Draft, element: Element) -> None:
    source, target = element.find("source"), element.find("target")
    path, tag = _attribute(source, "dir", ""), _attribute(target, "dir", "")
    kind = _attribute(element.find("driver"), "type", "path")
    if element.get("type", "mount") != "mount" or (source is not None and source.get("socket")):
        what = f"directory {tag} in the guest, of type {element.get('type', 'mount')}"
        draft.miss(what, "kvmd shares directories by their paths", "write a [[share]] by hand")
        return
    readonly = element.find("readonly") is not None
    add_share(draft, path, tag, "virtiofs" if kind == "virtiofs" else "9p", readonly=readonly)


def _channel(draft: Draft, element: Element) -> None:
    name = _attribute(element.find("target"), "name", "")
    if name == "org.qemu.guest_agent.0":
        draft.agent = True
    elif not name.startswith("com.redhat.spice"):
        draft.miss(f"channel {name}", "kvmd has none")


_READ: dict[str, Callable[[Draft, Element], None]] = {
    "disk": _disk,
    "interface": _interface,
    "graphics": _graphics,
    "tpm": _tpm,
    "hostdev": _hostdev,
    "filesystem": _filesystem,
    "channel": _channel,
}
