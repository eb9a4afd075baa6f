"""A guest's serial port: spooled, logged to the journal, followed by any number of consoles.

QEMU writes to a FIFO. Its bytes are spliced into a spool file whose length is the position in the guest's stream; each
journal entry carries the position it covers. After a crash of the daemon the spool says what was taken, the newest
entry what was logged: each line is logged once and in order, whatever ends or restarts meanwhile. Who follows the
spool reads it at a pace of its own. What was logged is punched out, so that the spool stays small; where the journal
does not keep up, the spool stops taking, the FIFO fills and the guest's tty waits - never QEMU itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from .errors import StartFailed, Unavailable
from .journal import Journal, about, encode, newest_first
from .terminal import LINE, LONGEST, text

CHUNK = 1 << 16  # bytes moved at a time, and kept for those who attach later
UNLOGGED = 1 << 20  # bytes the journal may be behind
PAUSE = 1.0  # seconds after which text without a line ending is logged
COALESCE = 0.005  # seconds
PATIENCE = 10.0  # seconds that the last lines of a dead guest may take
TAIL = 20  # lines
PAGE = 4096
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2  # linux/falloc.h

_libc = ctypes.CDLL(None, use_errno=True)


def open_fifo(path: Path) -> int:
    """For both directions, so that neither side ever sees the other leave."""
    return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)


class Spool:
    """What a guest has written so far: from a FIFO into a file, the end of which can be read again."""

    def __init__(self, fifo: Path, file: Path) -> None:
        """Raises ``StartFailed``."""
        try:
            self.fifo = open_fifo(fifo)
            self._file = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StartFailed(f"cannot open {error.filename}: {error.strerror}") from error
        self.taken = os.lseek(self._file, 0, os.SEEK_END)
        self.start = self._first_data()
        self.done = self.start  # up to here nobody needs it for its content
        self._followers: set[asyncio.Event] = set()
        self._room = asyncio.Event()
        self.ended = False

    def _first_data(self) -> int:
        try:
            return os.lseek(self._file, 0, os.SEEK_DATA)
        except OSError:  # ENXIO: empty, or nothing but a hole
            return self.taken

    async def run(self) -> None:
        """Take what the guest writes, until cancelled."""
        while True:
            await self._readable()
            while self.taken - self.done >= UNLOGGED:
                self._room.clear()
                await self._room.wait()
            # A guest writes byte by byte: gather for a moment, lest each byte wake us. A full disk tells nobody when
            # it has room again.
            await asyncio.sleep(COALESCE if self.take() else PAUSE)

    async def _readable(self) -> None:
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        loop.add_reader(self.fifo, readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(self.fifo)

    def take(self) -> int:
        """Move some bytes from the FIFO to the file; how many."""
        try:
            count = os.splice(self.fifo, self._file, CHUNK, offset_dst=self.taken)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.ENOSPC):
                return 0
            raise
        self.taken += count
        self._wake()
        return count

    def end(self) -> None:
        """The guest is dead: take the rest; those who follow learn that no more comes."""
        while self.take():
            pass
        self.ended = True
        self._wake()

    def _wake(self) -> None:
        for event in self._followers:
            event.set()

    @contextlib.contextmanager
    def follow(self) -> Iterator[asyncio.Event]:
        """An event that is set whenever there is more to read."""
        event = asyncio.Event()
        self._followers.add(event)
        try:
            yield event
        finally:
            self._followers.discard(event)

    def read(self, position: int) -> bytes:
        return os.pread(self._file, CHUNK, position)

    def forget(self, position: int) -> None:
        """What is before ``position`` is needed for scrolling back only: give the memory back but for the last bit."""
        self.done = position
        self._room.set()
        end = (position - CHUNK) // PAGE * PAGE
        if end - self.start >= CHUNK:
            flags = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
            _libc.fallocate(self._file, flags, ctypes.c_long(self.start), ctypes.c_long(end - self.start))
            self.start = end

    def close(self) -> None:
        os.close(self.fifo)
        os.close(self._file)


class SerialLog:
    """Follows a guest's spool, and logs each line; ``DIRECTORY/STREAM.out`` is the FIFO."""

    def __init__(
        self,
        guest: str,
        stream: str,
        directory: Path,
        journal: Journal,
        *,
        log: bool,
        heard: Callable[[str], None] = lambda line: None,
    ) -> None:
        """``heard`` is called with the text of each line, also where ``log`` is false. Raises ``StartFailed``."""
        self.spool = Spool(directory / f"{stream}.out", directory / f"{stream}.spool")
        self._guest = guest
        self._stream = stream
        self._journal = journal
        self._log = log
        self._heard = heard
        self._header = b""
        self._logged = self.spool.start
        self._tasks: list[asyncio.Task[None]] = []
        self.tail: deque[str] = deque(maxlen=TAIL)

    def start(self, invocation: str, *, resume: bool) -> None:
        """Pump from now on, for this run of the guest; on ``resume`` go on after the newest entry of it."""
        fields = {"SYSLOG_IDENTIFIER": self._guest, **about(self._guest), "KVMD_STREAM": self._stream}
        self._header = encode({**fields, "PRIORITY": "6", "KVMD_INVOCATION_ID": invocation})
        if resume:
            matches = {"KVMD_GUEST": self._guest, "KVMD_STREAM": self._stream, "KVMD_INVOCATION_ID": invocation}
            newest = next(newest_first(**matches), None)
            if newest:
                self._logged = max(self._logged, int(newest["KVMD_OFFSET"]) + int(newest["KVMD_LENGTH"]))
        for what, task in (("spool", self.spool.run()), ("log", self._run())):
            self._tasks.append(asyncio.create_task(task, name=f"{what} of {self._guest}'s {self._stream}"))

    async def _run(self) -> None:
        with self.spool.follow() as more:
            while True:
                more.clear()
                await self._log_lines()
                unfinished = self._logged < self.spool.taken
                try:  # not asyncio.wait_for: before Python 3.12 it may swallow a cancellation
                    async with asyncio.timeout(PAUSE if unfinished else None):
                        await more.wait()
                except TimeoutError:
                    await self._log_lines(partial=True)

    async def finish(self) -> None:
        """Log everything there is, also an unfinished line: the guest is dead.

        Raises ``Unavailable`` where journald takes nothing any more: a stop must end.
        """
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.spool.end()
        try:
            async with asyncio.timeout(PATIENCE):
                await self._log_lines(partial=True)
        except TimeoutError as error:
            rest = self.spool.taken - self._logged
            raise Unavailable(f"journald takes nothing, {rest} bytes of its output are not logged") from error

    async def _log_lines(self, *, partial: bool = False) -> None:
        """Log each finished line; with ``partial`` the unfinished one too."""
        while self._logged < self.spool.taken:
            before = self._logged
            for line in LINE.findall(self.spool.read(self._logged)):
                if not (line.endswith(b"\n") or len(line) == LONGEST or partial):
                    break
                await self._send(line)
            self.spool.forget(self._logged)
            if self._logged == before:
                break

    async def _send(self, line: bytes) -> None:
        message = text(line)
        if self._log:
            position = b"KVMD_OFFSET=%d\nKVMD_LENGTH=%d\n" % (self._logged, len(line))
            entry = b"%s%sMESSAGE=%s\n" % (self._header, position, message.encode())
            while not self._journal.offer(entry):
                await self._journal.writable()
        self._logged += len(line)
        self.tail.append(message)
        self._heard(message)

    async def close(self) -> None:
        """``finish``, and let go."""
        try:
            await self.finish()
        finally:
            self.spool.close()
