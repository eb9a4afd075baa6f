"""What a guest has of the host as QEMU's arguments: directories, USB and PCI devices, and the agent's channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvmd.guest import Guest

USB_SETS = 3_001_000  # of descriptors, one for each device
AGENT = "org.qemu.guest_agent.0"


@dataclass(frozen=True, slots=True)
class OfTheHost:
    """Descriptors: of each share a stream to its virtiofsd, of each USB device its node, and a listening socket."""

    shares: Sequence[int] = ()
    usb: Sequence[int] = ()
    agent: int | None = None


def passthrough_args(guest: Guest, of: OfTheHost, controller: str | None) -> list[str]:
    """``controller``: a USB bus of the machine's for any speed, where it has one."""
    args: list[str] = []
    if guest.shares:  # virtiofsd reads and writes the guest's memory itself
        args += [
            "-object", f"memory-backend-memfd,id=mem,size={guest.memory}B,share=on",
            "-machine", "memory-backend=mem",
        ]  # fmt: skip
    for number, (share, fd) in enumerate(zip(guest.shares, of.shares, strict=True)):
        args += [
            "-chardev", f"socket,id=share{number},fd={fd}",
            "-device", f"vhost-user-fs-pci,id=share{number},chardev=share{number},tag={share.tag}",
        ]  # fmt: skip
    if guest.usb and not controller:
        controller = "usb1.0"
        args += ["-device", "qemu-xhci,id=usb1"]
    for number, fd in enumerate(of.usb):
        args += [
            "-add-fd", f"set={USB_SETS + number},fd={fd}",
            "-device", f"usb-host,id=host{number},bus={controller},hostdevice=/dev/fdset/{USB_SETS + number}",
        ]  # fmt: skip
    for number, address in enumerate(guest.pci):
        args += ["-device", f"vfio-pci,id=pci{number},host={address}"]
    if of.agent is not None:
        args += [
            "-chardev", f"socket,id=agent,fd={of.agent},server=on,wait=off",
            "-device", "virtio-serial-pci,id=channels",
            "-device", f"virtserialport,bus=channels.0,chardev=agent,name={AGENT}",
        ]  # fmt: skip
    return args
