"""When a guest is ready: as soon as it runs, or once it has said so, on its serial port or, its systemd, over vsock.

For vsock a port stands in the guest's SMBIOS as long as it runs. PID 1 holds the socket, too, until the guest is
ready: what it says while there is no daemon waits for the next one. After `systemctl stop kvmd` PID 1 has forgotten it,
and the next daemon listens there again; it cannot know whether the guest has said it meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Sequence
from itertools import islice
from syslog import LOG_WARNING

from kvmd.console.serial import BATCH
from kvmd.errors import StartFailed, Timeout
from kvmd.guest import Guest
from kvmd.guests import vsock
from kvmd.guests.search import Search
from kvmd.qemu.argv import Vsock
from kvmd.qemu.process import Descriptors
from kvmd.runtime import Runtime
from kvmd.systemd import fdstore
from kvmd.systemd.journal import WRITTEN_BY_ROOT, Event, Journal, newest_first


class Readiness:
    """Of one guest that runs; ``ready`` is set once it is."""

    def __init__(self, guest: Guest, runtime: Runtime, journal: Journal, changed: Callable[[], None]) -> None:
        self._guest = guest
        self._runtime = runtime
        self._journal = journal
        self._changed = changed
        self._held = f"{guest.name}.vsock"
        self._listener: vsock.Listener | None = None
        self._missed = ""  # why the guest may be ready and nobody knows
        pattern = guest.serial.ready
        self._search = Search(pattern, self._said, self._give_up) if pattern else None
        self._recalling: asyncio.Task[None] | None = None
        self._lost = ""  # why nobody will ever know
        self._known = asyncio.Event()  # that it is ready, or ``_lost``
        self.ready = asyncio.Event()

    async def offer_vsock(self, descriptors: Descriptors) -> Vsock | None:
        """What QEMU needs for the guest to say it over vsock, if it is to. Raises ``StartFailed``."""
        if not self._guest.vsock.ready:
            return None
        fd, cid = vsock.open_device(self._guest.uuid.int)
        number = descriptors.take(fd)
        listener = vsock.listen()
        port: int = listener.getsockname()[1]
        fdstore.keep(self._held, listener.fileno())
        self._listen(listener, cid)
        self._runtime.write_vsock(cid, port)
        return Vsock(number, cid, port)

    def runs(self) -> None:
        """Of which nothing else is asked."""
        if self._guest.ready_timeout is None:
            self._become_ready()

    async def hear(self, lines: Sequence[str]) -> None:
        """It has printed these; returns once it is known whether they say it."""
        if self._recalling:
            await asyncio.wait((self._recalling,))
        if self._search and not self._search.over:
            await self._search.of(lines)

    async def resume(self, invocation: str) -> None:
        """It was started by an earlier daemon, in whose time it may have said it, perhaps as its very last lines."""
        if self._guest.ready_timeout is None or self._runtime.ready():
            if self._search:
                self._search.close()
            self.ready.set()
            self._known.set()
        elif self._guest.vsock.ready:
            self._listen_again()
        else:
            self._recalling = asyncio.create_task(self._recall(invocation), name=f"recall {self._guest.name}")

    async def _recall(self, invocation: str) -> None:
        """Each batch is heard before the next is logged: of the last one, and of the first since, nobody knows."""
        entries = newest_first(**WRITTEN_BY_ROOT, KVMD_INVOCATION_ID=invocation, KVMD_STREAM="serial")
        with contextlib.suppress(OSError):
            newest = await asyncio.to_thread(lambda: list(islice(entries, 2 * BATCH)))
            if self._search:
                await self._search.of([str(entry.get("MESSAGE", "")) for entry in reversed(newest)])

    async def wait(self, ended: asyncio.Event) -> None:
        """Returns once it is ready. Raises ``StartFailed`` where it has ended before, else ``Timeout``."""
        timeout, pattern, name = self._guest.ready_timeout, self._guest.serial.ready, self._guest.name
        events = [asyncio.create_task(event.wait()) for event in (self._known, ended)]
        try:
            await asyncio.wait(events, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for event in events:
                event.cancel()
        if self._missed and not self.ready.is_set() and not ended.is_set():
            self._journal.say(Event.ADOPTED, f"Guest {name} counts as ready: {self._missed}", name, LOG_WARNING)
            self._said()
        if self.ready.is_set():
            self._runtime.renew_pid()
            return
        wanted = "it did not say READY=1 over vsock (is systemd 254 or newer its init?)"
        if pattern:
            wanted = f'it printed no line matching "{pattern.pattern}"'
        if ended.is_set():
            raise StartFailed(f"guest {name} ended before it was ready: {wanted}")
        if self._lost:
            raise Timeout(f"guest {name} cannot become ready, its power was cut: {self._lost}")
        raise Timeout(f"guest {name} was not ready within {timeout:g} s, its power was cut: {wanted}")

    def close(self) -> None:
        """Nobody listens any more."""
        if self._search:
            self._search.close()
        if self._recalling:
            self._recalling.cancel()
        if self._listener:
            self._listener.close()
        if self._guest.vsock.ready:
            fdstore.drop(self._held)

    def _listen_again(self) -> None:
        try:
            cid, port = self._runtime.vsock()
            if held := fdstore.find(self._held):
                self._listen(socket.socket(fileno=held), cid)
            else:
                self._missed = "it may have said READY=1 while kvmd was stopped"
                self._listen(vsock.listen(port), cid)
        except StartFailed as error:
            self._missed = str(error)

    def _listen(self, listener: socket.socket, cid: int) -> None:
        self._listener = vsock.Listener(cid, self._said)
        self._listener.start(listener)

    def _said(self) -> None:
        self._runtime.note_ready()
        self._become_ready()
        self.close()

    def _give_up(self, why: str) -> None:
        pattern, name = self._guest.serial.ready, self._guest.name
        self._lost = f'nobody looks for serial.ready "{pattern.pattern if pattern else ""}" any more: {why}'
        self._journal.say(Event.FAILED, f"Guest {name} counts as not ready: {self._lost}", name, LOG_WARNING)
        self._known.set()

    def _become_ready(self) -> None:
        self.ready.set()
        self._known.set()
        self._changed()
