"""A system bus that goes away, at whichever moment: an error at once, and nobody waits for what never comes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from dbus_next.message import Message

from kvmd.errors import Unavailable
from kvmd.systemd.sysbus import DBUS, DISCONNECTED, BusError, SystemBus

GUID = "0123456789abcdef0123456789abcdef"
LOGIN = (f"OK {GUID}\r\n".encode(), b"AGREE_UNIX_FD\r\n")  # D-Bus specification, authentication protocol
UNIQUE_NAME = ":1.1"


class FrailBus:
    """Logs one client in and goes: after ``steps`` answers, of which the third is the one to Hello."""

    def __init__(self, path: Path, steps: int) -> None:
        self._path, self._steps = path, steps

    async def __aenter__(self) -> FrailBus:
        self._server = await asyncio.start_unix_server(self._serve, self._path)
        return self

    async def __aexit__(self, *_error: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in LOGIN[: self._steps]:
            await reader.readuntil(b"\r\n")
            writer.write(answer)
        if self._steps > len(LOGIN):
            await reader.readuntil(b"BEGIN\r\n")
            await reader.read(1 << 12)
            hello = Message(member="Hello", path=DBUS[1], interface=DBUS[2], serial=1)
            reply = Message.new_method_return(hello, "s", [UNIQUE_NAME])
            reply.serial = 1
            writer.write(reply._marshall())
        await writer.drain()
        writer.close()


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={tmp_path / 'bus'}")
    return tmp_path / "bus"


@pytest.mark.parametrize("steps", [0, 1, 2])
async def test_lost_while_it_logs_in(address: Path, steps: int) -> None:
    async with FrailBus(address, steps), asyncio.timeout(5):
        with pytest.raises(Unavailable, match="cannot reach the system bus"):
            await SystemBus().__aenter__()


async def test_there_is_none(address: Path) -> None:
    with pytest.raises(Unavailable, match="cannot reach the system bus"):
        await SystemBus().__aenter__()


async def test_a_call_after_it_was_lost(address: Path) -> None:
    async with FrailBus(address, 3), asyncio.timeout(5), SystemBus() as bus:
        await bus.lost()
        with pytest.raises(BusError) as caught:
            await bus.call(DBUS, "GetId")
        assert caught.value.name == DISCONNECTED
