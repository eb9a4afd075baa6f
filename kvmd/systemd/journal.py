"""Entries for journald in its native protocol (systemd's docs/JOURNAL_NATIVE_PROTOCOL), without ever blocking.

systemd-python's ``journal.send`` blocks the caller when journald is slow or away; here the caller is told and waits.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections import deque
from collections.abc import Iterator, Mapping
from enum import Enum
from syslog import LOG_INFO
from typing import Any

SOCKET = "/run/systemd/journal/socket"
SEND_BUFFER = 8 << 20
BACKLOG = 1000
PATIENCE = 10.0  # seconds for journald to write what it was sent

# Anybody may log with any field but those that journald adds. Not _SYSTEMD_UNIT=: it cannot look up a dead process.
WRITTEN_BY_ROOT = {"_UID": "0"}

log = logging.getLogger("kvmd")


class Event(Enum):
    """What kvmd itself says about a guest: one MESSAGE_ID for each kind; the texts are in kvmd.catalog."""

    STARTED = "6f1c0a1f6d5d4c0e9d5f0b6f8f3c2a01"
    STOPPED = "6f1c0a1f6d5d4c0e9d5f0b6f8f3c2a02"
    FAILED = "6f1c0a1f6d5d4c0e9d5f0b6f8f3c2a03"
    START_FAILED = "6f1c0a1f6d5d4c0e9d5f0b6f8f3c2a04"
    ADOPTED = "6f1c0a1f6d5d4c0e9d5f0b6f8f3c2a05"
    NETWORK = "6f1c0a1f6d5d4c0e9d5f0b6f8f3c2a06"
    FILE = "6f1c0a1f6d5d4c0e9d5f0b6f8f3c2a07"
    EMULATED = "6f1c0a1f6d5d4c0e9d5f0b6f8f3c2a08"
    QEMU = "6f1c0a1f6d5d4c0e9d5f0b6f8f3c2a09"
    HELD_BACK = "6f1c0a1f6d5d4c0e9d5f0b6f8f3c2a0a"
    CUT = "6f1c0a1f6d5d4c0e9d5f0b6f8f3c2a0b"
    CRASHED = "6f1c0a1f6d5d4c0e9d5f0b6f8f3c2a0c"
    PANICKED = "6f1c0a1f6d5d4c0e9d5f0b6f8f3c2a0d"
    OUT_OF_MEMORY = "6f1c0a1f6d5d4c0e9d5f0b6f8f3c2a0e"
    DISK = "6f1c0a1f6d5d4c0e9d5f0b6f8f3c2a0f"
    NOT_REGISTERED = "6f1c0a1f6d5d4c0e9d5f0b6f8f3c2a10"
    TPM = "6f1c0a1f6d5d4c0e9d5f0b6f8f3c2a12"
    SHARE = "6f1c0a1f6d5d4c0e9d5f0b6f8f3c2a13"


def encode(fields: Mapping[str, str]) -> bytes:
    """Fields as journald reads them; a value with a newline goes by length."""
    parts = []
    for key, value in fields.items():
        data = value.encode(errors="backslashreplace")  # an error may name a file whose name is not UTF-8
        if b"\n" in data:
            parts.append(b"%s\n%s%s\n" % (key.encode(), struct.pack("<Q", len(data)), data))
        else:
            parts.append(b"%s=%s\n" % (key.encode(), data))
    return b"".join(parts)


def about(guest: str) -> dict[str, str]:
    """The fields that tie an entry to a guest and show it in ``systemctl status kvmd@GUEST``."""
    return {"KVMD_GUEST": guest, "OBJECT_SYSTEMD_UNIT": f"kvmd@{guest}.service"}


class Journal:
    """One datagram socket for everything; PID 1 holds its other end, so it outlives journald's restarts.

    Open as long as the process: guests' lines are logged until the very end.
    """

    def __init__(self, path: str = SOCKET) -> None:
        """Raises ``OSError`` where there is no journald."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        self._path = path
        self._socket.connect(path)
        self.turn = asyncio.Lock()
        self._backlog: deque[bytes] = deque(maxlen=BACKLOG)
        self._flusher: asyncio.Task[None] | None = None

    def offer(self, entry: bytes) -> bool:
        """Hand one entry to journald; False when it is not taking any now (``writable`` says when)."""
        try:
            self._socket.send(entry)
        except BlockingIOError:
            return False
        except ConnectionError:  # the socket unit itself was restarted
            try:
                self._socket.connect(self._path)
            except OSError:
                return False
            return self.offer(entry)
        return True

    async def writable(self) -> None:
        """Returns when journald takes entries again.

        For the holder of ``turn``, who gives it back after a few entries: it goes to whoever has waited longest.
        """
        loop = asyncio.get_running_loop()
        writable = asyncio.Event()
        loop.add_writer(self._socket, writable.set)
        try:
            await writable.wait()
        finally:
            loop.remove_writer(self._socket)

    def say(self, event: Event, message: str, guest: str | None = None, priority: int = LOG_INFO) -> None:
        """Something a person should know; kept back, up to a bound, while journald takes nothing."""
        fields = {
            "MESSAGE": message,
            "MESSAGE_ID": event.value,
            "PRIORITY": str(priority),
            "SYSLOG_IDENTIFIER": "kvmd",
            **(about(guest) if guest else {}),
        }
        entry = encode(fields)
        if self._flusher or not self.offer(entry):
            self._backlog.append(entry)
            if not self._flusher:
                self._flusher = asyncio.create_task(self._flush(), name="journal backlog")

    async def _flush(self) -> None:
        async with self.turn:
            while self._backlog:
                if self.offer(self._backlog[0]):
                    self._backlog.popleft()
                else:
                    await self.writable()
        self._flusher = None


async def synchronize() -> None:
    """Returns when journald has written all it was sent (journalctl --sync), so that ``newest_first`` sees it.

    Or when journald has had its time: a daemon that starts must not stand still because journald does.
    """
    process = await asyncio.create_subprocess_exec("journalctl", "--sync", stderr=asyncio.subprocess.DEVNULL)
    try:
        async with asyncio.timeout(PATIENCE):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
        log.warning("journald did not write what it was sent within %g s: guests' last lines may come twice", PATIENCE)


def newest_first(**matches: str) -> Iterator[dict[str, Any]]:
    """The entries with these fields. Each step blocks for about a millisecond."""
    from systemd import journal  # the library is loaded only where the journal is read

    with journal.Reader(journal.LOCAL_ONLY) as reader:
        for key, value in matches.items():
            reader.add_match(f"{key}={value}")
        reader.seek_tail()
        while entry := reader.get_previous():
            yield entry
