"""What a guest may send instead of READY=1, and what becomes of it."""

from __future__ import annotations

import asyncio
import socket
import time
from typing import Any

import pytest

from kvmd.guests.vsock import CONNECTIONS, LONGEST, Listener, Notification

CID = 42


class Connection(asyncio.Transport):
    """One that a guest has made."""

    def __init__(self, listener: Listener, cid: int = CID) -> None:
        super().__init__({"peername": (cid, 1024)})
        self.ended = asyncio.Event()
        self.protocol = Notification(listener)
        self.protocol.connection_made(self)

    @property
    def gone(self) -> bool:
        return self.ended.is_set()

    def abort(self) -> None:
        if not self.gone:
            self.ended.set()
            self.protocol.connection_lost(None)

    def say(self, *parts: bytes) -> None:
        for part in parts:
            if not self.gone:
                self.protocol.data_received(part)
        if not self.gone:
            self.protocol.eof_received()
            self.abort()


def said(*parts: bytes, cid: int = CID) -> bool:
    """Whether the guest counts as ready."""

    async def run() -> bool:
        heard: list[Any] = []
        listener = Listener(CID, lambda: heard.append(True))
        Connection(listener, cid).say(*parts)
        assert not listener.open
        return bool(heard)

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("parts", "ready"),
    [
        ([b"READY=1"], True),
        ([b"READY=1\nSTATUS=Startup finished in 2s.\n"], True),
        ([b"STATUS=nearly\nREA", b"DY=1\n"], True),
        ([b"\xff\0" * 1000 + b"\nREADY=1\n"], True),
        ([], False),
        ([b"READY=0"], False),
        ([b"READY=1x\nSTATUS=READY=1"], False),
        ([b"x" * LONGEST, b"\nREADY=1"], False),
    ],
)
def test_notifications(parts: list[bytes], ready: bool) -> None:
    assert said(*parts) is ready


@pytest.mark.parametrize("cid", [1, 2, CID + 1])
def test_nobody_speaks_for_another(cid: int) -> None:
    assert not said(b"READY=1", cid=cid)


def test_connections_are_few_and_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmd.guests.vsock.PATIENCE", 0)

    async def run() -> None:
        listener = Listener(CID, lambda: None)
        connections = [Connection(listener) for _ in range(CONNECTIONS + 2)]
        assert [connection.gone for connection in connections] == [False] * CONNECTIONS + [True] * 2
        connections[0].say(b"STATUS=booting")
        connections.append(Connection(listener))
        assert not connections[-1].gone
        for connection in connections:
            await connection.ended.wait()
        assert not listener.open
        silent = Connection(listener)
        listener.close()
        assert silent.gone

    asyncio.run(run())


def test_connections_are_taken_at_a_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever makes one after the other has not the whole daemon; what waits comes to its turn. By TCP here."""
    monkeypatch.setattr("kvmd.guests.vsock.PAUSE", 0.02)

    async def run() -> float:
        ready = asyncio.Event()
        listener = Listener("127.0.0.1", ready.set)  # type: ignore[arg-type]
        bound = socket.create_server(("127.0.0.1", 0), backlog=100)
        address = bound.getsockname()
        listener.start(bound)
        begun = time.monotonic()
        for word in [b"STATUS=x"] * 20 + [b"READY=1"]:
            with socket.create_connection(address) as connection:
                connection.send(word)
        async with asyncio.timeout(5):
            await ready.wait()
        listener.close()
        return time.monotonic() - begun

    assert asyncio.run(run()) > 20 * 0.02
