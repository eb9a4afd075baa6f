"""READY=1 of a guest's systemd: how the guest is told where to say it, and that it is heard, by whichever daemon.

The port stands in the guest's SMBIOS as long as it runs. PID 1 holds the socket, too, until the guest is ready: what it
says while there is no daemon waits for the next one. After `systemctl stop kvmd` PID 1 has forgotten it, and the next
daemon listens there again; it cannot know whether the guest has said it meanwhile.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

from . import fdstore, qemu, vsock
from .errors import StartFailed
from .process import Descriptors
from .runtime import Runtime

NOT_SAID = "it did not say READY=1 over vsock (is systemd 254 or newer its init?)"


class Notify:
    """For one guest, from its start until ``ready`` is called, or ``close``."""

    def __init__(self, guest: str, runtime: Runtime, ready: Callable[[], None]) -> None:
        self._held = f"{guest}.vsock"
        self._runtime = runtime
        self._ready = ready
        self._listener: vsock.Listener | None = None
        self.missed = ""  # why the guest may be ready and nobody knows

    async def start(self, seed: int, descriptors: Descriptors) -> qemu.Vsock:
        """What QEMU needs for it; the guest's address is derived from ``seed``. Raises ``StartFailed``."""
        fd, cid = vsock.open_device(seed)
        number = descriptors.take(fd)
        listener = vsock.listen()
        port: int = listener.getsockname()[1]
        fdstore.keep(self._held, listener.fileno())
        await self._listen(listener, cid)
        self._runtime.write_vsock(cid, port)
        return qemu.Vsock(number, cid, port)

    async def resume(self) -> None:
        """The guest was started by an earlier daemon, and is not known to be ready."""
        try:
            cid, port = self._runtime.vsock()
            if held := fdstore.find(self._held):
                await self._listen(socket.socket(fileno=held), cid)
            else:
                self.missed = "it may have said READY=1 while kvmd was stopped"
                await self._listen(vsock.listen(port), cid)
        except StartFailed as error:
            self.missed = str(error)

    async def _listen(self, listener: socket.socket, cid: int) -> None:
        self._listener = vsock.Listener(cid, self.heard)
        await self._listener.start(listener)

    def heard(self) -> None:
        self._ready()
        self.close()

    def close(self) -> None:
        if self._listener:
            self._listener.close()
        fdstore.drop(self._held)
