"""What is done to a guest that runs, by QMP: all but what ends it."""

from __future__ import annotations

from kvmd.qemu.qmp import Qmp


class Steering:
    """Each raises ``QmpError`` where QEMU refuses, or does not answer any more."""

    def __init__(self, qmp: Qmp) -> None:
        self._qmp = qmp

    async def press_power_button(self) -> None:
        await self._qmp.execute("system_powerdown")

    async def reset(self) -> None:
        await self._qmp.execute("system_reset")

    async def pause(self) -> None:
        await self._qmp.execute("stop")

    async def resume(self) -> None:
        await self._qmp.execute("cont")
