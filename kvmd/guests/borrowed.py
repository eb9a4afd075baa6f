"""What a guest has of the host: directories, USB and PCI devices, the agent's channel; opened, and given back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial

from kvmd.guest import Guest
from kvmd.guests.share import Share
from kvmd.qemu import pci, usb
from kvmd.qemu.passthrough import OfTheHost
from kvmd.qemu.process import Descriptors, Process, User
from kvmd.runtime import Runtime
from kvmd.systemd.units import Systemd


class Borrowed:
    """Nothing, where the guest has none of it."""

    def __init__(
        self, guest: Guest, runtime: Runtime, systemd: Systemd, off: Callable[[], bool], warn: Callable[[str], None]
    ) -> None:
        """``warn`` is told what has been lost; ``off``: the guest has said that it ends."""
        self._guest = guest
        self._runtime = runtime
        hint = f"systemctl restart kvmd@{guest.name}"
        self._shares = [
            Share(
                guest,
                position,
                systemd,
                off,
                partial(warn, f"has lost {share.path}: its virtiofsd has ended ({hint})"),
            )
            for position, share in enumerate(guest.shares)
        ]

    async def open(self, user: User, descriptors: Descriptors, undo: AsyncExitStack) -> OfTheHost:
        """``user``: QEMU's. Raises ``StartFailed``."""
        guest = self._guest
        if guest.pci:
            self._runtime.write({"pci": " ".join(guest.pci).encode()})
            undo.callback(pci.take_back, guest.pci)
            for address in guest.pci:
                await asyncio.to_thread(pci.lend, address, user)
        return OfTheHost(
            shares=[descriptors.take(await share.start(self._runtime, undo)) for share in self._shares],
            usb=[descriptors.take(await asyncio.to_thread(usb.open_device, device)) for device in guest.usb],
            agent=descriptors.take(self._runtime.listen("agent")) if guest.agent else None,
        )

    async def adopt(self, qemu: Process, undo: AsyncExitStack) -> None:
        """As ``Helper.adopt``."""
        undo.callback(pci.take_back, self._guest.pci)
        for share in self._shares:
            await share.adopt(qemu, undo)

    def watch(self, qemu: Process) -> None:
        """As ``Helper.watch``."""
        for share in self._shares:
            share.watch(qemu)
