"""What a guest has of the host, as other tools name it → draft: directories, USB and PCI devices."""

from __future__ import annotations

import re
from posixpath import basename, normpath

from kvmd.ctl.foreign.draft import Draft

TAG = 36  # characters
BIND = ("kvmd binds no driver itself", "bind the device to vfio-pci before the guest starts: man kvmd.toml, [[pci]]")


def number(said: str) -> int | None:
    """As C writes one, and so QEMU and libvirt: 0x before sixteens, 0 before eights."""
    match = re.fullmatch(r"0x([0-9a-f]{1,8})|0([0-7]{0,11})|([1-9][0-9]{0,9})", said.strip().lower())
    if match is None:
        return None
    return int(match[1], 16) if match[1] else int(match[3]) if match[3] else int(match[2] or "0", 8)


def add_usb(draft: Draft, label: str, device: str) -> None:
    """``device``: vendor:product, by hexadecimal digits, or bus-port."""
    ids = re.fullmatch(r"(?:0x)?([0-9a-f]{1,4}):(?:0x)?([0-9a-f]{1,4})", device.lower())
    device = f"{ids[1]:0>4}:{ids[2]:0>4}" if ids else device
    if not re.fullmatch(r"[0-9a-f]{4}:[0-9a-f]{4}|[0-9]{1,3}-[0-9]{1,3}(\.[0-9]{1,3}){0,6}", device):
        why = "it is neither vendor and product nor a port, which stay when it is plugged in again"
        draft.miss(label, why, "write a [[usb]] by hand, as lsusb shows it")
    elif device in draft.usb:
        draft.miss(f"{label} once more", "the file names each once", "name both by the ports they are plugged into")
    else:
        draft.usb.append(device)


def add_usb_numbers(draft: Draft, label: str, vendor: str, product: str) -> None:
    """As C writes them."""
    ids = [number(said) for said in (vendor, product)]
    add_usb(draft, label, ":".join("?" if each is None else f"{each:x}" for each in ids))


def add_pci(draft: Draft, label: str, address: str, *, bound: bool = False) -> None:
    """By hexadecimal digits, with or without its domain; ``bound``: to vfio-pci, as the other tool wanted it, too."""
    match = re.fullmatch(r"(?:([0-9a-f]{4}):)?([0-9a-f]{2}:[01][0-9a-f]\.[0-7])", address.lower())
    address = f"{match[1] or '0000'}:{match[2]}" if match else ""
    if not address:
        draft.miss(label, "it is not the address of a PCI device", "write a [[pci]] by hand, as lspci -D shows it")
    elif address not in draft.pci:
        draft.pci.append(address)
        if not bound:
            draft.miss(f"the driver of {address}", *BIND)


def add_share(draft: Draft, path: str, tag: str, kind: str, *, readonly: bool, user: str = "") -> None:
    """``kind``: by which it reached the guest; ``user``: who owns on the host what the guest writes, if known."""
    path, label = normpath(path) if path else "", f"directory {path}, {tag} in the guest"
    if not path.startswith("/") or ".." in path.split("/") or not basename(path) or not path.isprintable():
        draft.miss(label, "it is not the absolute path of a directory", "write a [[share]] by hand")
        return
    taken = {str(share["tag"]) for share in draft.shares}
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", tag).strip("-")[:TAG] or "share"
    if name in taken:
        name = next(each for count in range(2, len(taken) + 3) if (each := f"{name[: TAG - 4]}-{count}") not in taken)
    if name != tag:
        why = f"tags have letters, digits and _ . -, {TAG} at most, and differ"
        draft.miss(f"tag {tag} of {path}", why, f"it is {name} here")
    writable = not readonly and user != "root" and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*", user) is not None
    draft.shares.append({"path": path, "tag": name, "readonly": not writable, **({"user": user} if writable else {})})
    if not readonly and not writable:
        why = "it is not known who on the host is to own what the guest writes; read-only here"
        draft.miss(f"writing to {path}", why, "set user, not root, and readonly = false")
    if kind != "virtiofs":
        windows = draft.top.get("profile") == "windows"
        todo = "WinFsp, and viofs of virtio-win" if windows else f"mount -t virtiofs {name} /mnt, and /etc/fstab"
        draft.miss(
            f"{path} by {kind}", "it is virtiofs here, which is mounted by another type", f"in the guest: {todo}"
        )
