"""A guest's serial port into the journal: each line once and in order, whatever ends or restarts meanwhile.

QEMU writes to a FIFO. Its bytes are spliced into a spool file whose length is the position in the guest's stream;
each journal entry carries the position it covers. After a crash of the daemon the spool says what was taken, the
newest entry what was logged. The spool's logged part is punched out, so it stays small; a full FIFO makes the
guest's tty wait, never QEMU itself.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
from collections import deque
from pathlib import Path

from .errors import StartFailed
from .journal import Journal, about, encode, newest_first
from .terminal import LINE, LONGEST, text

CHUNK = 1 << 16
PAUSE = 1.0
COALESCE = 0.005
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2
PAGE = 4096
TAIL = 20

_libc = ctypes.CDLL(None, use_errno=True)


def make_fifo(path: Path, uid: int, gid: int) -> None:
    """A FIFO that only this user opens. Raises ``StartFailed``."""
    try:
        os.mkfifo(path, 0o600)
        os.chown(path, uid, gid)
    except OSError as error:
        raise StartFailed(f"cannot make the FIFO {path}: {error.strerror}") from error


class SerialLog:
    """The pump from one FIFO of a guest to the journal; ``DIRECTORY/STREAM.out`` is the FIFO."""

    def __init__(self, guest: str, stream: str, directory: Path, journal: Journal, *, log: bool) -> None:
        """Raises ``StartFailed``."""
        self._guest = guest
        self._stream = stream
        self._journal = journal
        self._log = log
        self._header = b""
        self._task: asyncio.Task[None] | None = None
        self.tail: deque[str] = deque(maxlen=TAIL)
        try:
            # For both directions, so that neither side ever sees the other leave.
            self._fifo = os.open(directory / f"{stream}.out", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            self._spool = os.open(directory / f"{stream}.spool", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StartFailed(f"cannot open {error.filename}: {error.strerror}") from error
        self.taken = os.lseek(self._spool, 0, os.SEEK_END)
        self._logged = self._punched = self._first_data()

    def start(self, invocation: str, *, resume: bool) -> None:
        """Pump from now on, for this run of the guest; on ``resume`` go on after the newest entry of it."""
        fields = {"SYSLOG_IDENTIFIER": self._guest, **about(self._guest), "KVMD_STREAM": self._stream}
        self._header = encode({**fields, "PRIORITY": "6", "KVMD_INVOCATION_ID": invocation})
        if resume:
            matches = {"KVMD_GUEST": self._guest, "KVMD_STREAM": self._stream, "KVMD_INVOCATION_ID": invocation}
            newest = next(newest_first(**matches), None)
            if newest:
                self._logged = max(self._logged, int(newest["KVMD_OFFSET"]) + int(newest["KVMD_LENGTH"]))
        self._task = asyncio.create_task(self._run(), name=f"{self._stream} of {self._guest}")

    def _first_data(self) -> int:
        try:
            return os.lseek(self._spool, 0, os.SEEK_DATA)
        except OSError:  # ENXIO: empty, or nothing but a hole
            return self.taken

    async def _run(self) -> None:
        while True:
            await self._log_lines()
            unfinished = self._logged < self.taken
            try:
                await asyncio.wait_for(self._readable(), PAUSE if unfinished else None)
            except TimeoutError:
                await self._log_lines(partial=True)
                continue
            if not self._take():  # the spool's disk is full: what is in the FIFO waits, and so does the guest's tty
                await asyncio.sleep(PAUSE)
                continue
            await self._log_lines()
            # A guest writes byte by byte: gather for a moment, lest each byte wake us.
            await asyncio.sleep(COALESCE)

    async def finish(self) -> None:
        """Log everything there is, also an unfinished line: the guest is dead."""
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        while self._take():
            await self._log_lines()
        await self._log_lines(partial=True)

    async def _readable(self) -> None:
        loop = asyncio.get_running_loop()
        ready = loop.create_future()

        def wake() -> None:
            if not ready.done():
                ready.set_result(None)

        loop.add_reader(self._fifo, wake)
        try:
            await ready
        finally:
            loop.remove_reader(self._fifo)

    def _take(self) -> int:
        try:
            count = os.splice(self._fifo, self._spool, CHUNK, offset_dst=self.taken)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.ENOSPC):
                return 0
            raise
        self.taken += count
        return count

    async def _log_lines(self, *, partial: bool = False) -> None:
        """Log each finished line; with ``partial`` the unfinished one too."""
        while self._logged < self.taken:
            before = self._logged
            data = os.pread(self._spool, CHUNK, self._logged)
            for line in LINE.findall(data) if self._log else ():
                if not (line.endswith(b"\n") or len(line) == LONGEST or partial):
                    break
                await self._send(line)
            if not self._log:
                self._logged += len(data)
            if self._logged == before:
                break
        end = self._logged // PAGE * PAGE
        if end - self._punched >= CHUNK:
            flags = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
            _libc.fallocate(self._spool, flags, ctypes.c_long(self._punched), ctypes.c_long(end - self._punched))
            self._punched = end

    async def _send(self, line: bytes) -> None:
        message = text(line)
        entry = b"%sKVMD_OFFSET=%d\nKVMD_LENGTH=%d\nMESSAGE=%s\n" % (
            self._header,
            self._logged,
            len(line),
            message.encode(),
        )
        while not self._journal.offer(entry):
            await self._journal.writable()
        self.tail.append(message)
        self._logged += len(line)

    async def close(self) -> None:
        """``finish``, and let go."""
        await self.finish()
        os.close(self._fifo)
        os.close(self._spool)
