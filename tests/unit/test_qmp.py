"""QMP with a QEMU that says anything, or nothing: over a real socket."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from kvmd.qemu import qmp
from kvmd.qemu.qmp import Qmp, QmpError

GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\n'


@dataclass
class Qemu:
    """The other end. It answers a command with what ``answers`` says, or with nothing."""

    writer: asyncio.StreamWriter
    answers: Callable[[dict[str, Any]], bytes]
    asked: list[str] = field(default_factory=list)
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, reader: asyncio.StreamReader) -> None:
        try:
            while line := await reader.readline():
                request = json.loads(line)
                self.asked.append(request["execute"])
                self.writer.write(self.answers(request))
        except ConnectionError:
            pass
        self.gone.set()


@dataclass
class Conversation:
    qmp: Qmp
    events: list[tuple[str, Mapping[str, Any]]]
    lost: list[str]
    qemu: Qemu
    heard: asyncio.Event


def well(request: dict[str, Any]) -> bytes:
    return json.dumps({"return": {}, "id": request["id"]}).encode() + b"\n"


@asynccontextmanager
async def conversation(path: Path, answers: Callable[[dict[str, Any]], bytes] = well) -> AsyncIterator[Conversation]:
    connected: asyncio.Future[Qemu] = asyncio.get_running_loop().create_future()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        qemu = Qemu(
            writer, lambda request: well(request) if request["execute"] == "qmp_capabilities" else answers(request)
        )
        writer.write(GREETING)
        connected.set_result(qemu)
        await qemu.run(reader)
        writer.close()

    events: list[tuple[str, Mapping[str, Any]]] = []
    lost: list[str] = []
    server = await asyncio.start_unix_server(accept, path / "qmp")
    heard = asyncio.Event()

    def hear(event: str, data: Mapping[str, Any]) -> None:
        events.append((event, data))
        heard.set()

    monitor = Qmp(hear, lost.append)
    try:
        await monitor.connect(path / "qmp")
        qemu = await connected
        yield Conversation(monitor, events, lost, qemu, heard)
    finally:
        await monitor.close()
        if connected.done():
            async with asyncio.timeout(5):
                await connected.result().gone.wait()
        server.close()
        await server.wait_closed()


async def test_answers_and_events_find_their_way(tmp_path: Path) -> None:
    def answers(request: dict[str, Any]) -> bytes:
        event = b'{"event": "STOP", "timestamp": {}}\n{"event": "SHUTDOWN", "data": {"reason": "guest-reset"}}\n'
        return event + json.dumps({"return": {"status": request["execute"]}, "id": request["id"]}).encode() + b"\n"

    async with conversation(tmp_path, answers) as talk:
        one, two = await asyncio.gather(talk.qmp.query("one", "status"), talk.qmp.query("two", "status"))
        assert (one, two) == ("one", "two")
        assert talk.events == [("STOP", {}), ("SHUTDOWN", {"reason": "guest-reset"})] * 2
        with pytest.raises(QmpError, match="answer to three has no enabled"):
            await talk.qmp.query("three", "enabled")
        assert talk.lost == []


async def test_a_descriptor_comes_with_its_command(tmp_path: Path) -> None:
    """And not one byte before or after, whatever is said around it."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "qmp"))
        listener.listen()
        monitor = Qmp(lambda event, data: None, lambda why: None)

        def serve() -> list[tuple[str, list[tuple[bytes, int]]]]:
            seen: list[tuple[str, list[tuple[bytes, int]]]] = []
            with listener.accept()[0] as end:
                end.sendall(GREETING)
                for _ in range(4):
                    line = b""
                    fds: list[tuple[int, int]] = []
                    while not line.endswith(b"\n"):  # as QEMU does
                        byte, some, _flags, _address = socket.recv_fds(end, 1, 4)
                        line, fds = line + byte, fds + [(fd, len(line)) for fd in some]
                    seen.append((json.loads(line)["execute"], [(os.read(fd, 9), at) for fd, at in fds]))
                    for fd, _at in fds:
                        os.close(fd)
                    end.sendall(well(json.loads(line)))
            return seen

        serving = asyncio.create_task(asyncio.to_thread(serve))
        await monitor.connect(tmp_path / "qmp")
        fds = []
        for word in (b"one", b"two"):
            fds.append(os.memfd_create("x"))
            os.write(fds[-1], word)
            os.lseek(fds[-1], 0, os.SEEK_SET)
        await asyncio.gather(
            monitor.execute_with(fds[0], "add-fd", **{"fdset-id": 1}),
            monitor.execute("query-status"),
            monitor.execute_with(fds[1], "getfd", fdname="x"),
        )
        assert await serving == [
            ("qmp_capabilities", []),
            ("add-fd", [(b"one", 0)]),
            ("query-status", []),
            ("getfd", [(b"two", 0)]),
        ]
        for fd in fds:
            os.close(fd)
        await monitor.close()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        ({"desc": "not now"}, "QEMU refused stop: not now"),
        ({"desc": "\ud800\x1b[2J" + "x" * 9999}, "QEMU refused stop: ??[2J" + "x" * 95),
        ({"desc": 5}, "QEMU refused stop: no reason given"),
        ("odd", "QEMU refused stop: no reason given"),
    ],
)
async def test_a_refusal(tmp_path: Path, error: object, told: str) -> None:
    def answers(request: dict[str, Any]) -> bytes:
        return json.dumps({"error": error, "id": request["id"]}).encode() + b"\n"

    async with conversation(tmp_path, answers) as talk:
        with pytest.raises(QmpError) as caught:
            await talk.qmp.execute("stop")
        assert str(caught.value) == told
        str(caught.value).encode()


@pytest.mark.parametrize(
    "said",
    [
        b"[]\n",
        b"null\n",
        b"5\n",
        b"no JSON\n",
        b'{"event": 5}\n',
        b'{"event": "SHUTDOWN", "data": "now"}\n',
        b'{"data": {}}\n',
        b"[" * 60_000 + b"\n",
        b'{"a":' * 10_000 + b"\n",
        b'"\xff\xfe"\n',
        b"1" * 60_000 + b"\n",
        b" " * 300_000,
    ],
    ids=lambda said: repr(said[:30]),
)
async def test_what_is_no_qmp_ends_it(tmp_path: Path, said: bytes) -> None:
    """And nothing else: whoever waits is told, or else somebody."""
    async with conversation(tmp_path, lambda request: said) as talk:
        with pytest.raises(QmpError, match="is no QMP"):
            await talk.qmp.execute("stop")
        with pytest.raises(QmpError, match="is no QMP"):
            await talk.qmp.execute("cont")
        assert talk.lost == []
        async with asyncio.timeout(5):
            await talk.qemu.gone.wait()  # it is not read any more
            await talk.qmp.drain()
    async with conversation(tmp_path) as talk:
        talk.qemu.writer.write(said)
        async with asyncio.timeout(5):
            await talk.qemu.gone.wait()
        assert len(talk.lost) == 1


async def test_answers_nobody_waits_for_are_dropped(tmp_path: Path) -> None:
    odd = b'{"return": {}, "id": %d}\n{"error": {}}\n'

    def answers(request: dict[str, Any]) -> bytes:
        return b"".join(odd % number for number in range(50, 150)) + well(request)

    async with conversation(tmp_path, answers) as talk:
        assert await talk.qmp.execute("stop") == {}
        assert talk.qmp._answers == {}
        assert talk.lost == []


async def test_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command has its time; what comes later is nobody's; and they do not queue for ever."""
    monkeypatch.setattr(qmp, "PATIENCE", 0.05)
    asked: list[dict[str, Any]] = []
    async with conversation(tmp_path, lambda request: asked.append(request) or b"") as talk:  # type: ignore[func-returns-value]
        for _ in range(qmp.UNANSWERED):
            with pytest.raises(QmpError, match=r"^QEMU did not answer stop within 0\.05 s$"):
                await talk.qmp.execute("stop")
        with pytest.raises(QmpError, match="has not answered the last 16 commands"):
            await talk.qmp.execute("stop")
        assert len(asked) == qmp.UNANSWERED
        talk.qemu.writer.write(b"".join(map(well, asked)) + b'{"event": "X"}\n')
        talk.qemu.answers = well
        monkeypatch.setattr(qmp, "PATIENCE", 5)
        await talk.heard.wait()
        assert await talk.qmp.execute("cont") == {}


async def test_a_caller_that_gives_up_takes_no_others_answer(tmp_path: Path) -> None:
    async with conversation(tmp_path, lambda request: b"" if request["execute"] == "first" else well(request)) as talk:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await talk.qmp.execute("first")
        assert await talk.qmp.execute("second") == {}


@pytest.mark.parametrize(
    ("event", "most"),
    [
        (b'{"event": "STOP"}', 40),
        (b'{"event": "RESET"}', 4000),
        (b'{"event": "X", "data": {"x": "%s"}}' % (b"x" * 60_000), 30),
    ],
    ids=["STOP", "RESET", "long"],
)
async def test_a_flood_is_read_slowly(tmp_path: Path, event: bytes, most: int) -> None:
    """And the loop goes on meanwhile."""
    async with conversation(tmp_path) as talk:

        async def flood() -> None:
            while True:
                talk.qemu.writer.write((event + b"\n") * 100)
                await talk.qemu.writer.drain()

        flooding = asyncio.create_task(flood())
        end, longest = time.monotonic() + 1.0, 0.0
        while (before := time.monotonic()) < end:
            await asyncio.sleep(0)
            longest = max(longest, time.monotonic() - before)
        flooding.cancel()
        await asyncio.gather(flooding, return_exceptions=True)
        assert 0 < len(talk.events) < most
        assert longest < 0.3


async def test_a_monitor_that_is_closed(tmp_path: Path) -> None:
    last = b'{"event": "SHUTDOWN", "data": {"reason": "guest-shutdown"}}\n'
    async with conversation(tmp_path, lambda request: last) as talk:
        waiting = asyncio.create_task(talk.qmp.execute("stop"))
        await talk.heard.wait()
        talk.qemu.writer.close()
        with pytest.raises(QmpError, match="closed its monitor"):
            await waiting
        await talk.qmp.drain()
        assert talk.events == [("SHUTDOWN", {"reason": "guest-shutdown"})]
        with pytest.raises(QmpError, match="closed its monitor"):
            await talk.qmp.execute("stop")
        assert talk.lost == []  # the pidfd says that QEMU has ended


@pytest.mark.parametrize("greeting", [b"", b"x" * 300_000, b"no QMP\n[]\n"])
async def test_no_greeting(tmp_path: Path, greeting: bytes) -> None:
    async def accept(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        writer.close()

    server = await asyncio.start_unix_server(accept, tmp_path / "qmp")
    monitor = Qmp(lambda event, data: None, lambda why: None)
    with pytest.raises(QmpError, match=r"greeting|is no QMP|closed its monitor"):
        await monitor.connect(tmp_path / "qmp")
    await monitor.close()
    server.close()
    await server.wait_closed()
