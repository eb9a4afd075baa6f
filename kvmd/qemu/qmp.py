"""The few QMP commands and events kvmd uses (QEMU's docs/interop/qmp-spec). Death is the pidfd's news, not ours.

A guest may have broken into its QEMU. So what QEMU says is bounded: in length, in how much of it is read in a second,
and in how long it may take to answer. If it is no QMP, nothing more of it is read.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from array import array
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvmd.errors import KvmdError

LONGEST = 1 << 16  # bytes of a line; the longest of those that are asked for is the greeting
PATIENCE = 20.0  # seconds for an answer, less than D-Bus callers wait: 25 (busctl(1), --timeout=)
UNANSWERED = 16  # commands
READABLE = 100  # characters of a sentence of QEMU's

# Messages count by their length, and by what they cause: a change that everybody on the bus is told counts as many.
RATE, BURST = 1000, 2.0  # in a second; seconds of which may come at once
LENGTH = 256  # bytes
COST = dict.fromkeys(("STOP", "RESUME", "SUSPEND", "WAKEUP"), 100)


class QmpError(KvmdError):
    """QEMU refused a command, does not answer, or the monitor is gone."""


class QmpRefused(QmpError):
    """QEMU took the command, and said no."""


class Qmp:
    """One monitor connection. QEMU reads it byte by byte: keep commands short and few."""

    def __init__(self, on_event: Callable[[str, Mapping[str, Any]], None], lost: Callable[[str], None]) -> None:
        """``on_event(event, data)``; ``lost(why)``: QEMU is read no more, and nobody waits who could be told."""
        self._on_event = on_event
        self._lost = lost
        self._answers: dict[int, asyncio.Future[Any]] = {}  # by the command's id, until QEMU answers
        self._id = 0
        self._socket: socket.socket | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._task: asyncio.Task[None] | None = None
        self._closed = "QEMU's monitor is closed"

    async def connect(self, path: Path) -> None:
        """Returns once QEMU has greeted and takes commands. Cancel it when QEMU dies instead. Raises ``QmpError``.

        The socket listens before QEMU runs, so connecting never waits and the greeting means that QEMU is up.
        """
        try:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            await asyncio.get_running_loop().sock_connect(self._socket, str(path))
            reader, self._writer = await asyncio.open_unix_connection(sock=self._socket, limit=LONGEST)
            if not await reader.readline():
                raise QmpError("QEMU closed its monitor before greeting")
        except OSError as error:
            raise QmpError(f"cannot reach QEMU's monitor {path}: {error}") from error
        except ValueError as error:
            raise QmpError(f"QEMU's greeting is longer than {LONGEST >> 10} KiB") from error
        self._closed = ""
        self._task = asyncio.create_task(self._read(reader), name=f"qmp {path}")
        await self.execute("qmp_capabilities")

    async def _read(self, reader: asyncio.StreamReader) -> None:
        loop = asyncio.get_running_loop()
        due, why, lost = 0.0, "QEMU closed its monitor", False
        try:
            while line := await reader.readline():
                due = max(due, loop.time() - BURST) + self._take(line) / RATE
                await asyncio.sleep(due - loop.time())
        except OSError:
            pass
        except (ValueError, RecursionError):  # too long, no UTF-8, no JSON, no QMP
            why, lost = "what QEMU says on its monitor is no QMP", True
        self._closed = why
        answers = [answer for answer in self._answers.values() if not answer.done()]
        for answer in answers:
            answer.set_exception(QmpError(why))
        if self._writer:
            self._writer.transport.abort()
        if lost and not answers:
            self._lost(why)

    def _take(self, line: bytes) -> float:
        """One message; what it costs. Raises ``ValueError`` where it is none."""
        match json.loads(line):
            case {"event": str(event), **rest} if isinstance(data := rest.get("data", {}), dict):
                self._on_event(event, data)
                return COST.get(event, 1) + len(line) / LENGTH
            case {"id": int(number), **rest}:
                answer = self._answers.pop(number, None)  # there is none for what was not asked
                if answer and not answer.done():
                    answer.set_result(rest)
            case {"error": _}:  # of what QEMU could not read
                pass
            case other:
                raise ValueError(other)
        return 1 + len(line) / LENGTH

    async def execute(self, command: str, **arguments: object) -> Any:
        """Run one command; its return value. Raises ``QmpError``."""
        return await self._execute(command, arguments, ())

    async def execute_with(self, fd: int, command: str, **arguments: object) -> Any:
        """As ``execute``, of a command that takes a descriptor: add-fd, getfd. The caller keeps ``fd``."""
        return await self._execute(command, arguments, (fd,))

    async def _execute(self, command: str, arguments: Mapping[str, object], fds: Sequence[int]) -> Any:
        if self._socket is None or self._closed:
            raise QmpError(self._closed)
        if len(self._answers) >= UNANSWERED:
            raise QmpError(f"QEMU has not answered the last {UNANSWERED} commands")
        self._id += 1
        request = {"execute": command, "id": self._id, **({"arguments": arguments} if arguments else {})}
        self._send(json.dumps(request, separators=(",", ":")).encode() + b"\n", fds)
        answer = self._answers[self._id] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(PATIENCE):
                reply = await answer
        except TimeoutError as error:
            raise QmpError(f"QEMU did not answer {command} within {PATIENCE:g} s") from error
        match reply:
            case {"return": value}:
                return value
            case {"error": {"desc": str(reason)}}:
                raise QmpRefused(f"QEMU refused {command}: {_readable(reason)}")
        raise QmpRefused(f"QEMU refused {command}: no reason given")

    def _send(self, line: bytes, fds: Sequence[int]) -> None:
        """At once: so few short commands always fit, and descriptors (SCM_RIGHTS) come with their command's bytes."""
        assert self._socket is not None
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
        try:
            sent = self._socket.sendmsg([line], ancillary)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise QmpError("QEMU closed its monitor") from error
        if sent < len(line):
            if sent and self._writer:
                self._writer.transport.abort()  # with half a command before it none would be understood
            raise QmpError("QEMU does not read its monitor")

    async def query(self, command: str, key: str) -> object:
        """What a command returns under this key. Raises ``QmpError``."""
        match await self.execute(command):
            case {**values} if key in values:
                return values[key]
        raise QmpError(f"QEMU's answer to {command} has no {key}")

    async def drain(self) -> None:
        """Read to the end what a dead QEMU left in the socket, so that its last event is known.

        Its end of the socket may be another's by now: that one is not waited for for long.
        """
        if self._task:
            await asyncio.wait((self._task,), timeout=PATIENCE)

    async def close(self) -> None:
        self._closed = self._closed or "QEMU's monitor is closed"
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._writer:
            self._writer.transport.abort()
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()


def _readable(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text[:READABLE])
