"""A directory of the host that a guest has: virtiofsd, in a transient service with a user and a root of its own."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack

from kvmd.errors import StartFailed
from kvmd.guest import Guest
from kvmd.guests.helper import Helper
from kvmd.qemu import share
from kvmd.qemu.process import Process
from kvmd.runtime import Runtime
from kvmd.systemd import scope
from kvmd.systemd.units import Systemd


class Share(Helper):
    """The one at ``position`` in the guest's file."""

    def __init__(
        self, guest: Guest, position: int, systemd: Systemd, off: Callable[[], bool], say_lost: Callable[[], None]
    ) -> None:
        super().__init__(guest.share_unit(position), systemd, off, say_lost)
        self._guest = guest
        self._share = guest.shares[position]
        self._name = f"share{position}"

    async def start(self, runtime: Runtime, undo: AsyncExitStack) -> int:
        """A stream for QEMU. Raises ``StartFailed``."""
        found = await asyncio.to_thread(share.find, self._share)
        root = runtime.path / self._name
        path = runtime.path / f"{self._name}.sock"
        with ExitStack() as closing:
            listener = closing.enter_context(socket.socket(fileno=runtime.listen(path.name)))
            stream = closing.enter_context(socket.socket(socket.AF_UNIX))
            try:
                root.mkdir(mode=0o755)
                root.chmod(0o755)
                stream.connect(str(path))  # into the queue of ``listener``, without waiting
                path.unlink()
                properties = scope.share_properties(self._guest, self._share, *found, root, listener.fileno())
                await self._systemd.start_transient(self.unit, properties)
                for pid in (await self._systemd.processes(self.unit))[:1]:
                    self.own(undo, Process(pid))
            except OSError as error:
                raise StartFailed(f"cannot share {self._share.path}: {error}") from error
            if not self._process:
                raise StartFailed(f"virtiofsd for {self._share.path} ended at once (journalctl -t virtiofsd)")
            return stream.detach()

    async def _end(self) -> None:
        await super()._end()
        await self._systemd.settled(self.unit)  # the guest's next start is of the same unit
