"""A guest's TPM: swtpm, started before QEMU in a scope and as a user of its own, and what its loss means."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Collection
from contextlib import AsyncExitStack
from signal import SIGKILL

from kvmd.guest import Guest
from kvmd.qemu import tpm, users
from kvmd.qemu.process import Descriptors, Process, User, spawn
from kvmd.systemd import scope
from kvmd.systemd.sysbus import BusError
from kvmd.systemd.units import Systemd

PATIENCE = 5.0  # seconds for swtpm to end after QEMU
TOGETHER = 0.5  # seconds between their ends, where it is QEMU's that comes first


class Tpm:
    """Nothing, where the guest has none."""

    def __init__(self, guest: Guest, systemd: Systemd, off: Callable[[], bool], say_lost: Callable[[], None]) -> None:
        """``say_lost`` is called where the guest goes on without its TPM; ``off``: it has said that it ends."""
        self._guest = guest
        self._systemd = systemd
        self._off, self._say_lost = off, say_lost
        self._watcher: asyncio.Task[None] | None = None
        self._process: Process | None = None
        self.user: User | None = None
        self.lost = False

    def choose_user(self, taken: Collection[int]) -> dict[str, bytes]:
        """What /run/kvmd/NAME has to say of it. Raises ``StartFailed``."""
        if not self._guest.tpm:
            return {}
        self.user = users.choose(self._guest.name, taken, "TPM")
        return {"tpm": f"{self.user.uid}\n".encode()}

    async def start(
        self, descriptors: Descriptors, for_qemu: Descriptors, stderr: Callable[[], int], undo: AsyncExitStack
    ) -> int | None:
        """With its state, which is in ``descriptors``; the stream ``for_qemu``. Raises ``StartFailed``."""
        if not self.user:
            return None
        [state] = descriptors.numbers
        ours, theirs = socket.socketpair()
        stream = for_qemu.take(ours.detach())
        command = tpm.swtpm(state, descriptors.take(theirs.detach()))
        users.publish(self._guest.name, self.user, "TPM")
        process, release, give_up = await spawn(command, descriptors, self.user, descriptors.take(stderr()))
        self._own(undo, process)
        try:
            properties = scope.tpm_properties(self._guest, process.pid)
            await self._systemd.start_transient(self._guest.tpm_scope, properties)
        except BaseException:
            give_up()
            raise
        release()
        return stream

    async def adopt(self, qemu: Process, undo: AsyncExitStack) -> None:
        """Take over the one that an earlier daemon started."""
        if not self._guest.tpm:
            return
        try:
            pids = await self._systemd.processes(self._guest.tpm_scope)
        except BusError:  # systemd does not answer: nobody knows, and nobody is told
            return
        with contextlib.suppress(ProcessLookupError):
            for pid in pids[:1]:
                self._own(undo, Process(pid))
        self.watch(qemu)

    def watch(self, qemu: Process) -> None:
        """From now on until ``qemu`` ends."""
        if self._guest.tpm:
            self._watcher = asyncio.create_task(self._watch(qemu), name=f"watch the TPM of {self._guest.name}")

    async def _watch(self, qemu: Process) -> None:
        if self._process:
            await self._process.ended.wait()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TOGETHER):
                await qemu.ended.wait()
        if not qemu.ended.is_set() and not self._off():
            self.lost = True
            self._say_lost()

    def _own(self, undo: AsyncExitStack, process: Process) -> None:
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
