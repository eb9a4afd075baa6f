"""A system bus that goes away, at whichever moment: an error at once, and nobody waits for what never comes."""

from __future__ import annotations

import asyncio
import io
import struct
from pathlib import Path

import pytest
from dbus_next._private.unmarshaller import Unmarshaller
from dbus_next.message import Message

from kvmd.errors import Unavailable
from kvmd.systemd import units
from kvmd.systemd.sysbus import DBUS, DISCONNECTED, BusError, SystemBus

GUID = "0123456789abcdef0123456789abcdef"
LOGIN = (f"OK {GUID}\r\n".encode(), b"AGREE_UNIX_FD\r\n")  # D-Bus specification, authentication protocol
UNIQUE_NAME = ":1.1"


class FrailBus:
    """Logs one client in and goes: after ``steps`` answers, of which the third is the one to Hello.

    Or ``stays``, and reads no more until it is asked to.
    """

    def __init__(self, path: Path, steps: int, stays: bool = False) -> None:
        self._path, self._steps, self._stays = path, steps, stays
        self._client = asyncio.get_running_loop().create_future()

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
        if self._stays:
            self._client.set_result((reader, writer))
        else:
            writer.close()

    async def connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        pair: tuple[asyncio.StreamReader, asyncio.StreamWriter] = await self._client
        return pair

    async def take(self, count: int) -> list[str]:
        """The members of the client's next messages."""
        reader, writer = await self._client
        members = []
        for _ in range(count):
            head = await reader.readexactly(16)
            body, _serial, fields = struct.unpack_from("<III", head, 4)
            rest = await reader.readexactly((fields + 7 & ~7) + body)
            members.append(Unmarshaller(io.BytesIO(head + rest)).unmarshall().member)
        writer.close()
        return members


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


async def test_an_answer_that_does_not_come(address: Path) -> None:
    """It is waited for so long, and takes up room until it comes: the bus counts it, too."""
    room = asyncio.Semaphore(1)
    async with FrailBus(address, 3, stays=True), asyncio.timeout(5), SystemBus() as bus:
        for _ in range(2):
            with pytest.raises(BusError, match=r"org\.silent has not answered Ask within 0\.1 s"):
                await bus.call(("org.silent", "/", "org.silent"), "Ask", patience=0.1, room=room)
            assert room.locked()


async def test_a_systemd_that_does_not_answer(address: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has not said that a unit is inactive, or that a scope ended well."""
    monkeypatch.setattr(units, "PATIENCE", 0.05)
    async with FrailBus(address, 3, stays=True), asyncio.timeout(5), SystemBus() as bus:
        systemd = units.Systemd(bus)
        for ask in (systemd.state, systemd.scope_result, systemd.service_result, systemd.settled):
            with pytest.raises(BusError, match="has not answered GetUnit"):
                await ask("x.scope")


async def test_signals_of_others_and_of_another_shape(address: Path) -> None:
    """Only those of the very sender, and of the signature that was asked for, are heard."""
    heard: asyncio.Future[object] = asyncio.get_running_loop().create_future()
    async with FrailBus(address, 3, stays=True) as frail, asyncio.timeout(5), SystemBus() as bus:
        bus.on_signal(DBUS[0], "org.kvmd1.Test", "News", "s", lambda message: heard.set_result(message.values()))
        _reader, writer = await frail.connection()
        for sender, signature, body in (
            (":1.66", "s", ["forged"]),
            (DBUS[0], "u", [7]),
            (DBUS[0], "", []),
            (DBUS[0], "s", ["right"]),
        ):
            writer.write(signal(sender, signature, body))
        assert await heard == ["right"]


def signal(sender: str, signature: str, body: list[object]) -> bytes:
    """With its sender, which only the bus writes."""
    message = Message.new_signal("/", "org.kvmd1.Test", "News", signature, body)
    message.serial, message.error_name = 1, sender  # the same type, in the place of another field
    data = message._marshall()
    field = data.index(sender.encode()) - 8
    return bytes(data[:field] + b"\7" + data[field + 1 :])


async def test_a_bus_that_does_not_read_for_a_while(address: Path) -> None:
    """Nothing is lost and the order kept, and what cannot be sent is in nobody's way."""
    async with FrailBus(address, 3, stays=True) as frail, asyncio.timeout(20), SystemBus() as bus:
        names = [f"Signal{number}" for number in range(3000)]
        sent = [bus.send(Message.new_signal("/", "org.kvmd1.Test", name, "s", ["x" * 1000])) for name in names]
        wrong = bus.send(Message.new_signal("/", "org.kvmd1.Test", "Wrong", "s", [1]))
        last = bus.send(Message.new_signal("/", "org.kvmd1.Test", "Last"))
        assert await frail.take(3001) == [*names, "Last"]
        await asyncio.gather(*sent, last)
        assert isinstance(await asyncio.wait_for(asyncio.gather(wrong, return_exceptions=True), 1), list)
        assert wrong.exception() is not None


async def test_what_waits_when_it_is_lost(address: Path) -> None:
    async with FrailBus(address, 3, stays=True) as frail, asyncio.timeout(20), SystemBus() as bus:
        sent = [bus.send(Message.new_signal("/", "org.kvmd1.Test", "S", "s", ["x" * 1000])) for _ in range(3000)]
        await frail.take(1)
        await asyncio.wait(sent)
        assert sent[-1].exception() is not None
        await asyncio.gather(*sent, return_exceptions=True)
