"""The few QMP commands and events kvmd uses (QEMU's docs/interop/qmp-spec). Death is the pidfd's news, not ours."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvmd.errors import KvmdError

LINE_LIMIT = 1 << 20


class QmpError(KvmdError):
    """QEMU refused a command, or the monitor is gone."""


class Qmp:
    """One monitor connection. QEMU reads it byte by byte: keep commands short and few."""

    def __init__(self, on_event: Callable[[str, dict[str, Any]], None]) -> None:
        self._on_event = on_event
        self._replies: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._lock = asyncio.Lock()
        self._id = 0
        self._writer: asyncio.StreamWriter | None = None
        self._task: asyncio.Task[None] | None = None

    async def connect(self, path: Path) -> None:
        """Returns once QEMU has greeted and takes commands. Cancel it when QEMU dies instead.

        The socket listens before QEMU runs, so connecting never waits and the greeting means that QEMU is up.
        """
        try:
            reader, self._writer = await asyncio.open_unix_connection(str(path), limit=LINE_LIMIT)
            if not await reader.readline():
                raise QmpError("QEMU closed its monitor before greeting")
        except OSError as error:
            raise QmpError(f"cannot reach QEMU's monitor {path}: {error}") from error
        self._task = asyncio.create_task(self._read(reader), name=f"qmp {path}")
        await self.execute("qmp_capabilities")

    async def _read(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(OSError, ValueError):
            while line := await reader.readline():
                message = json.loads(line)
                if "event" in message:
                    self._on_event(message["event"], message.get("data", {}))
                else:
                    self._replies.put_nowait(message)
        self._replies.put_nowait({"error": {"desc": "QEMU closed its monitor"}})

    async def execute(self, command: str, **arguments: object) -> Any:
        """Run one command; its return value. Raises ``QmpError``."""
        async with self._lock:
            if self._writer is None or self._task is None or (self._task.done() and self._replies.empty()):
                raise QmpError("QEMU's monitor is closed")
            self._id += 1
            request = {"execute": command, "id": self._id, **({"arguments": arguments} if arguments else {})}
            self._writer.write(json.dumps(request, separators=(",", ":")).encode() + b"\n")
            while (reply := await self._replies.get()).get("id", self._id) != self._id:
                pass  # the answer to a command whose caller has given up
        if "error" in reply:
            raise QmpError(f"QEMU refused {command}: {reply['error'].get('desc', 'no reason given')}")
        return reply.get("return")

    async def drain(self) -> None:
        """Read to the end what a dead QEMU left in the socket, so that its last event is known."""
        if self._task:
            await self._task

    async def close(self) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._writer:
            self._writer.close()
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()
