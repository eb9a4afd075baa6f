"""What is done to a guest that runs, by QMP: all but what ends it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from kvmd.errors import Unavailable
from kvmd.guest import BootDevice, Guest
from kvmd.guests.agent import Agent
from kvmd.guests.media import Media
from kvmd.guests.screen import Screen
from kvmd.guests.stall import ASLEEP, Stall
from kvmd.qemu.argv import after_boot_once
from kvmd.qemu.qmp import Qmp
from kvmd.runtime import Runtime

AGAIN = 1.0  # seconds in which a guest that goes on comes to the error that it stood still for: some milliseconds


class Steering:
    """Each raises ``QmpError`` where QEMU refuses, or does not answer any more."""

    def __init__(
        self, guest: Guest, runtime: Runtime, qmp: Qmp, stall: Stall, warn: Callable[[str], None] = lambda _: None
    ) -> None:
        self.agent = Agent(guest, runtime, warn)
        self.media = Media(guest, runtime, qmp, stall)
        self.screen = Screen(guest, runtime, qmp)
        self._name = guest.name
        self._qmp = qmp
        self._stall = stall

    async def boot_normally(self, guest: Guest, once: BootDevice | None) -> None:
        """From the next reset on, by ``boot.order``: the firmware reads the places of devices at each."""
        for device, index in after_boot_once(guest, once).items() if once else ():
            place: dict[str, object] = {"path": f"/machine/peripheral/{device}", "property": "bootindex"}
            if await self._qmp.execute("qom-get", **place) != index:  # to have it set twice is an error
                await self._qmp.execute("qom-set", **place, value=index)

    async def press_power_button(self) -> None:
        await self._qmp.execute("system_powerdown")

    async def reset(self) -> None:
        await self._qmp.execute("system_reset")

    async def pause(self) -> None:
        await self._qmp.execute("stop")

    async def resume(self) -> None:
        """Wake it, or have it go on. Raises ``Unavailable`` where it stands still for a disk, now as before."""
        if self._stall.reason == ASLEEP:
            await self._qmp.execute("system_wakeup")
            return
        blocked = self._stall.blocked
        stood = blocked.is_set()
        await self._qmp.execute("cont")
        if not stood:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(AGAIN):
                await blocked.wait()
            raise Unavailable(f"guest {self._name} stands still: {self._stall.reason} (make room, then resume it)")
