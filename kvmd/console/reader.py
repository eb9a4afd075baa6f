"""A person at a guest's serial console: a stream of their own, any number at once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from pathlib import Path

from kvmd.console.serial import CHUNK, Spool, open_fifo


class Console:
    """Shows what the guest writes, from ``position`` on, and types what it gets.

    A reader that is too slow loses what has left the spool meanwhile; neither guest nor log nor others wait for it.
    """

    def __init__(self, spool: Spool, keyboard: Path, position: int | None = None) -> None:
        """``keyboard`` is the FIFO the guest reads from. ``position``: a little before now, or what is nearest to it.

        Raises ``OSError``.
        """
        self._spool = spool
        wanted = spool.taken - CHUNK if position is None else min(position, spool.taken)
        self.position = max(spool.start, wanted)
        self._keyboard = open_fifo(keyboard)
        self._ours, self._theirs = socket.socketpair()
        self._ours.setblocking(False)

    def take_theirs(self) -> int:
        """The other end, for the person; the caller closes it."""
        return self._theirs.detach()

    async def run(self) -> None:
        """Until either side is through."""
        tasks = [asyncio.create_task(self._show()), asyncio.create_task(self._type())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._ours.close()
            os.close(self._keyboard)

    async def _show(self) -> None:
        loop = asyncio.get_running_loop()
        position = self.position
        with self._spool.follow() as more, contextlib.suppress(ConnectionError):
            while position < self._spool.taken or not self._spool.ended:
                more.clear()
                position = max(position, self._spool.start)
                if data := self._spool.read(position):
                    await loop.sock_sendall(self._ours, data)
                    position += len(data)
                else:
                    await more.wait()

    async def _type(self) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(ConnectionError):
            while data := await loop.sock_recv(self._ours, 4096):
                while data:
                    try:
                        data = data[os.write(self._keyboard, data) :]
                    except BlockingIOError:  # the guest does not read
                        await self._writable()

    async def _writable(self) -> None:
        loop = asyncio.get_running_loop()
        writable = asyncio.Event()
        loop.add_writer(self._keyboard, writable.set)
        try:
            await writable.wait()
        finally:
            loop.remove_writer(self._keyboard)
