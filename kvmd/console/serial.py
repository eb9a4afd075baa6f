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
import fcntl
import itertools
import os
import termios
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from syslog import LOG_NOTICE

from kvmd.console.terminal import LINE, complete, text
from kvmd.errors import StartFailed, Unavailable
from kvmd.systemd.journal import WRITTEN_BY_ROOT, Event, Journal, about, encode, newest_first

CHUNK = 1 << 16  # bytes moved at a time, and kept for those who attach later
UNLOGGED = 1 << 18  # bytes the journal may be behind; the end of a guest waits for them
BATCH = 64  # lines logged before other guests have their turn
QUIET = 60.0  # seconds without being held back, after which it is news again
PAUSE = 1.0  # seconds after which text without a line ending is logged
COALESCE = 0.005  # seconds
PATIENCE = 10.0  # seconds that journald may let the last lines of a dead guest wait
TAIL = 20  # lines
PAGE = 4096
FULL = 1 << 20  # bytes that a FIFO holds at most (/proc/sys/fs/pipe-max-size)
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2  # linux/falloc.h

Hearer = Callable[[Sequence[str]], Awaitable[None]]

_libc = ctypes.CDLL(None, use_errno=True)


def open_fifo(path: Path) -> int:
    """For both directions, so that neither side ever sees the other leave."""
    return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)


class Spool:
    """What a guest has written so far: from a FIFO into a file, the end of which can be read again."""

    def __init__(self, fifo: Path, file: Path, held_back: Callable[[str], None]) -> None:
        """``held_back`` is called, with the reason, when the spool takes no more for now. Raises ``StartFailed``."""
        try:
            self.fifo = open_fifo(fifo)
            self._file = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StartFailed(f"cannot open {error.filename}: {error.strerror}") from error
        self.taken = os.lseek(self._file, 0, os.SEEK_END)
        self.start = self._first_data()
        self.done = self.start  # up to here it is logged, or need not be
        self._followers: set[asyncio.Event] = set()
        self._room = asyncio.Event()
        self._held_back = held_back
        self._path = file
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
            if self.pending >= UNLOGGED:
                self._held_back("it prints faster than the journal takes it")
            while self.pending >= UNLOGGED:
                self._room.clear()
                await self._room.wait()
            # A guest writes byte by byte: gather for a moment, lest each byte wake us. A full disk tells nobody when
            # it has room again.
            await asyncio.sleep(COALESCE if self.take() else PAUSE)

    @property
    def pending(self) -> int:
        """Bytes that are not done."""
        return self.taken - self.done

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
        except BlockingIOError:
            return 0
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            if self._punch(self.done):
                return self.take()
            self._held_back(f"cannot write {self._path}: {error.strerror}")
            return 0
        self.taken += count
        self._wake()
        return count

    @property
    def behind(self) -> bool:
        """Whether the guest has written more than was taken."""
        return fcntl.ioctl(self.fifo, termios.FIONREAD, bytes(4)) != bytes(4)

    def end(self) -> None:
        """No more comes; those who follow learn it."""
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

    def forget(self) -> None:
        """What is done is needed for scrolling back only: give the memory back but for the last bit."""
        self._room.set()
        if self.done - CHUNK - self.start >= CHUNK:
            self._punch(self.done - CHUNK)

    def _punch(self, position: int) -> bool:
        """Give the memory of what is before ``position`` back; whether there was any."""
        end = position // PAGE * PAGE
        if end <= self.start:
            return False
        flags = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
        _libc.fallocate(self._file, flags, ctypes.c_long(self.start), ctypes.c_long(end - self.start))
        self.start = end
        return True

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
        heard: Hearer | None = None,
    ) -> None:
        """``heard`` is awaited with each batch of lines before the next is logged, also where ``log`` is false.

        Raises ``StartFailed``.
        """
        self.spool = Spool(directory / f"{stream}.out", directory / f"{stream}.spool", self._say_held_back)
        self._guest = guest
        self._stream = stream
        self._journal = journal
        self._log = log
        self._heard = heard
        self._unheard: list[str] = []
        self._header = b""
        self._last_held_back = -QUIET
        self._patience: float | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self.tail: deque[str] = deque(maxlen=TAIL)

    def start(self, invocation: str, *, resume: bool) -> None:
        """Pump from now on, for this run of the guest; on ``resume`` go on after the newest entry of it."""
        fields = {"SYSLOG_IDENTIFIER": self._guest, **about(self._guest), "KVMD_STREAM": self._stream}
        self._header = encode({**fields, "PRIORITY": "6", "KVMD_INVOCATION_ID": invocation})
        if resume and self.spool.taken:
            self.spool.done = min(max(self.spool.done, self._logged(invocation)), self.spool.taken)
        for what, task in (("spool", self.spool.run()), ("log", self._run())):
            self._tasks.append(asyncio.create_task(task, name=f"{what} of {self._guest}'s {self._stream}"))

    def _logged(self, invocation: str) -> int:
        """How much of this run's output the journal has, as far as it can tell."""
        matches = {"KVMD_GUEST": self._guest, "KVMD_STREAM": self._stream, "KVMD_INVOCATION_ID": invocation}
        try:
            newest = next(newest_first(**WRITTEN_BY_ROOT, **matches), None)
            return int(newest["KVMD_OFFSET"]) + int(newest["KVMD_LENGTH"]) if newest else 0
        except (OSError, KeyError, ValueError, TypeError):  # damaged: lines may be logged twice
            return 0

    async def _run(self) -> None:
        with self.spool.follow() as more:
            while True:
                more.clear()
                await self._log_lines()
                unfinished = self.spool.done < self.spool.taken
                try:  # not asyncio.wait_for: before Python 3.12 it may swallow a cancellation
                    async with asyncio.timeout(PAUSE if unfinished else None):
                        await more.wait()
                except TimeoutError:
                    await self._log_lines(partial=not self.spool.behind)

    async def finish(self) -> None:
        """Log everything there is, also an unfinished line: the guest is dead.

        Raises ``Unavailable`` where journald takes nothing any more: a stop must end.
        """
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._patience = PATIENCE
        try:
            await self._log_lines()
            end = self.spool.taken + FULL  # another process may have its end of the FIFO by now
            while self.spool.taken < end and self.spool.take():
                await self._log_lines()
            self.spool.end()
            await self._log_lines(partial=True)
        except TimeoutError as error:
            self.spool.end()
            raise Unavailable(
                f"journald takes nothing, {self.spool.pending} bytes of its output are not logged"
            ) from error

    async def _log_lines(self, *, partial: bool = False) -> None:
        """Log each finished line; with ``partial`` the unfinished one too, unless it goes on meanwhile."""
        cut = self.spool.taken if partial else None
        while self.spool.done < self.spool.taken:
            before = self.spool.done
            data = self.spool.read(before)
            lines = iter(LINE.findall(data))
            if before + len(data) != cut:
                lines = itertools.takewhile(complete, lines)
            while batch := list(itertools.islice(lines, BATCH)):
                await self._send(batch)
            self.spool.forget()
            if self.spool.done == before:
                break

    async def _send(self, lines: Sequence[bytes]) -> None:
        turn = self._journal.turn if self._log else contextlib.nullcontext()
        async with asyncio.timeout(self._patience), turn:
            for line in lines:
                message = text(line)
                if self._log:
                    position = b"KVMD_OFFSET=%d\nKVMD_LENGTH=%d\n" % (self.spool.done, len(line))
                    entry = b"%s%sMESSAGE=%s\n" % (self._header, position, message.encode())
                    while not self._journal.offer(entry):
                        await self._journal.writable()
                self.spool.done += len(line)
                self.tail.append(message)
                self._unheard.append(message)
        said, self._unheard = self._unheard, []
        if self._heard:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._patience):
                    await self._heard(said)
        await asyncio.sleep(0)  # journald may be fast enough for this never to wait

    def _say_held_back(self, reason: str) -> None:
        now = time.monotonic()
        if now - self._last_held_back >= QUIET:
            what = f"Guest {self._guest} is held back, {self.spool.pending >> 10} KiB of its output wait: {reason}"
            self._journal.say(Event.HELD_BACK, f"{what} (nothing is lost)", self._guest, LOG_NOTICE)
        self._last_held_back = now

    async def close(self) -> None:
        """``finish``, and let go."""
        try:
            await self.finish()
        finally:
            self.spool.close()
