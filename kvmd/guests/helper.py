"""A process beside a guest's QEMU, in a unit of its own: watched, adopted by the next daemon, ended after QEMU."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from contextlib import AsyncExitStack
from signal import SIGKILL

from kvmd.qemu.process import Process
from kvmd.systemd.sysbus import BusError
from kvmd.systemd.units import Systemd

PATIENCE = 5.0  # seconds for it to end after QEMU
TOGETHER = 0.5  # seconds between their ends, where it is QEMU's that comes first


class Helper:
    """It ends by itself when QEMU, whom it serves over a stream, has ended; its loss is told once."""

    def __init__(self, unit: str, systemd: Systemd, off: Callable[[], bool], say_lost: Callable[[], None]) -> None:
        """``say_lost`` is called where the guest goes on without it; ``off``: the guest has said that it ends."""
        self.unit = unit
        self._systemd = systemd
        self._off, self._say_lost = off, say_lost
        self._watcher: asyncio.Task[None] | None = None
        self._process: Process | None = None
        self.lost = False

    async def adopt(self, qemu: Process, undo: AsyncExitStack) -> None:
        """Take over the one that an earlier daemon started."""
        try:
            pids = await self._systemd.processes(self.unit)
        except BusError:  # systemd does not answer: nobody knows, and nobody is told
            return
        with contextlib.suppress(ProcessLookupError):
            for pid in pids[:1]:
                self.own(undo, Process(pid))
        self.watch(qemu)

    def watch(self, qemu: Process) -> None:
        """From now on until ``qemu`` ends."""
        self._watcher = asyncio.create_task(self._watch(qemu), name=f"watch {self.unit}")

    async def _watch(self, qemu: Process) -> None:
        if self._process:
            await self._process.ended.wait()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TOGETHER):
                await qemu.ended.wait()
        if not qemu.ended.is_set() and not self._off():
            self.lost = True
            self._say_lost()

    def own(self, undo: AsyncExitStack, process: Process) -> None:
        """It is this one, and ends with what is in ``undo``."""
        self._process = process
        undo.push_async_callback(self._end)

    async def _end(self) -> None:
        """By itself, as nobody holds the other end of its stream any more, when it has written all it has to."""
        assert self._process
        if self._watcher:
            self._watcher.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                await self._process.ended.wait()
        self._process.signal(SIGKILL)
        await self._process.ended.wait()
        self._process.close()
