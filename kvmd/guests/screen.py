"""A guest's screen: viewers handed over to QEMU, which speaks RFB (VNC) with each, and pictures of it."""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import suppress
from fcntl import F_ADD_SEALS
from fcntl import fcntl as control
from itertools import count
from pathlib import Path

from kvmd.errors import Busy, KvmdError, Unavailable
from kvmd.guest import Guest
from kvmd.qemu.display import SCREEN
from kvmd.qemu.qmp import Qmp, QmpRefused
from kvmd.runtime import Runtime

VIEWERS = 16  # at once
SHOTS = 4  # that wait for the one that is taken
LARGEST = 64 << 20  # bytes of a picture
PICTURE = 2_000_000  # descriptor set
PNG = b"\x89PNG\r\n\x1a\n"
SEALS = 0x1 | 0x2 | 0x4 | 0x8  # F_SEAL_SEAL, SHRINK, GROW, WRITE of linux/fcntl.h
PAUSE = 1.0  # seconds


class Screen:
    """Of one guest. What a viewer does, or leaves undone, is between them and QEMU: it costs the daemon nothing."""

    def __init__(self, guest: Guest, runtime: Runtime, qmp: Qmp) -> None:
        self._guest = guest
        self._runtime = runtime
        self._qmp = qmp
        self._viewers: set[int] = set()  # inodes of QEMU's ends
        self._numbers = count()
        self._serving: asyncio.Task[None] | None = None
        self._camera = asyncio.Lock()
        self._waiting = 0
        self._film: tuple[int, int] | None = None  # a file in memory, and QEMU's descriptor of it

    def listen(self) -> None:
        """At the socket for root's viewers, where the guest file wants one. Raises ``StartFailed``."""
        if self._guest.display.vnc:
            listener = socket.socket(fileno=self._runtime.listen("vnc", VIEWERS))
            self._serving = asyncio.create_task(self._serve(listener), name=f"viewers of {self._guest.name}")

    async def _serve(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with listener:
            listener.setblocking(False)
            while True:
                try:
                    viewer, _ = await loop.sock_accept(listener)
                except OSError:  # no descriptor left
                    await asyncio.sleep(PAUSE)
                    continue
                with viewer, suppress(KvmdError):  # whoever is not let in is hung up on
                    await self._hand_over(viewer)

    async def open(self) -> int:
        """A stream that speaks RFB; the caller closes it. Raises ``KvmdError``."""
        try:
            qemus, theirs = socket.socketpair()
        except OSError as error:
            raise Unavailable(f"cannot open the screen of guest {self._guest.name}: {error.strerror}") from error
        with qemus, theirs:
            await self._hand_over(qemus)
            return theirs.detach()

    async def _hand_over(self, viewer: socket.socket) -> None:
        await self._require_screen()
        if len(self._viewers) >= VIEWERS:
            self._viewers &= await asyncio.to_thread(_open_sockets)
        if len(self._viewers) >= VIEWERS:
            raise Busy(f"guest {self._guest.name} has {VIEWERS} viewers already (close one)")
        inode = os.fstat(viewer.fileno()).st_ino
        self._viewers.add(inode)
        name = f"viewer{next(self._numbers) % VIEWERS}"  # one that was not taken makes room for the next of that name
        try:
            await self._qmp.execute_with(viewer.fileno(), "getfd", fdname=name)
            await self._qmp.execute("add_client", protocol="vnc", fdname=name, skipauth=True)
        except KvmdError:
            self._viewers.discard(inode)
            raise

    async def _require_screen(self) -> None:
        try:
            await self._qmp.execute("qom-get", path=f"/machine/peripheral/{SCREEN}", property="type")
        except QmpRefused:
            hint = "set vnc = true under [display] in its file, and restart it"
            if self._guest.board == "microvm":
                hint = "microvm cannot have one"
            raise Unavailable(f"guest {self._guest.name} has no screen ({hint})") from None

    async def shoot(self) -> int:
        """A PNG of what is on the screen now, in a file in memory that nobody can change; the caller closes it.

        Raises ``KvmdError``.
        """
        if self._waiting > SHOTS:
            raise Busy(f"{self._waiting} pictures of guest {self._guest.name} are just being taken (try again)")
        self._waiting += 1
        try:
            async with self._camera:
                await self._require_screen()
                return await self._shoot()
        except OSError as error:
            raise Unavailable(f"cannot take a picture of guest {self._guest.name}: {error.strerror}") from error
        finally:
            self._waiting -= 1

    async def _shoot(self) -> int:
        """QEMU always has the same descriptor: one removed while the guest is paused would stay with it (QEMU 7.2)."""
        if self._film is None:
            self._film = film = _film()
            with suppress(QmpRefused):  # there is none, but for an earlier daemon's
                await self._qmp.execute("remove-fd", **{"fdset-id": PICTURE})
            await self._qmp.execute_with(film[1], "add-fd", **{"fdset-id": PICTURE})
        memory, qemus = self._film
        os.ftruncate(memory, 0)
        os.lseek(qemus, 0, os.SEEK_SET)
        await self._qmp.execute("screendump", filename=f"/dev/fdset/{PICTURE}", format="png", device=SCREEN)
        size = os.fstat(memory).st_size
        if size > LARGEST or os.pread(memory, len(PNG), 0) != PNG:
            raise Unavailable(f"QEMU of guest {self._guest.name} has made no picture")
        return await asyncio.to_thread(_print, memory, size)

    async def close(self) -> None:
        if self._serving:
            self._serving.cancel()
            await asyncio.gather(self._serving, return_exceptions=True)
        for fd in self._film or ():
            os.close(fd)
        self._film = None


def _film() -> tuple[int, int]:
    """QEMU opens a set for writing only by a descriptor that is for writing only."""
    memory = os.memfd_create("screen", os.MFD_CLOEXEC)
    try:
        return memory, os.open(f"/proc/self/fd/{memory}", os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        os.close(memory)
        raise


def _print(memory: int, size: int) -> int:
    """A copy that is sealed (memfd_create(2)), to be read from its beginning."""
    copy = os.memfd_create("screen.png", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        done = 0
        while done < size and (sent := os.sendfile(copy, memory, done, size - done)):
            done += sent
        os.lseek(copy, 0, os.SEEK_SET)
        control(copy, F_ADD_SEALS, SEALS)
    except OSError:
        os.close(copy)
        raise
    return copy


def _open_sockets() -> set[int]:
    """Inodes of all unix sockets there are. QEMU says nothing of viewers that leave a server which listens nowhere."""
    lines = Path("/proc/self/net/unix").read_text(errors="replace").splitlines()[1:]
    return {int(words[6]) for line in lines if len(words := line.split(None, 7)) > 6}
