"""The guest agent's protocol, against agents that answer, that answer others' questions, and that answer nonsense."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from kvmd.errors import Busy, InvalidOption, Unavailable
from kvmd.guest import Guest
from kvmd.guests import agent as rooms
from kvmd.guests.agent import Agent
from kvmd.runtime import Runtime

GUEST = Guest("web", Path("/etc/kvmd/web.toml"), UUID(int=1), agent=True)
INTERFACES = [
    {"name": "lo", "ip-addresses": [{"ip-address": "127.0.0.1", "prefix": 8}]},
    {"name": "eth0", "ip-addresses": [{"ip-address": "192.0.2.42"}, {"ip-address": "2001:db8::42"}, {"ip-address": 7}]},
    {"name": "odd", "ip-addresses": [{"ip-address": "no address"}, "none", None]},
    "no interface",
    {"name": "none"},
]


class Fake:
    """What is at the other end: ``answers`` by command, each a value, or bytes as they are; ``stale`` comes first."""

    def __init__(self, stale: bytes = b"", **answers: object) -> None:
        self.stale = stale
        self.answers = {name.replace("_", "-"): answer for name, answer in answers.items()}
        self.asked: list[tuple[str, Any]] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(self.stale)
        while line := await reader.readline():
            request = json.loads(line.lstrip(b"\xff"))
            if request["execute"] == "guest-sync-delimited":
                writer.write(b"\xff" + json.dumps({"return": request["arguments"]["id"]}).encode() + b"\n")
                continue
            self.asked.append((request["execute"], request.get("arguments")))
            answer = self.answers.get(request["execute"])
            if answer is not None:
                writer.write(answer if isinstance(answer, bytes) else json.dumps({"return": answer}).encode() + b"\n")
        writer.close()


def run(tmp_path: Path, fake: Fake, work: Callable[[Agent], Awaitable[Any]], guest: Guest = GUEST) -> Any:
    async def main() -> Any:
        runtime = Runtime("web")
        runtime.path = tmp_path
        server = await asyncio.start_unix_server(fake.serve, str(tmp_path / "agent"))
        agent = Agent(guest, runtime, lambda what: None)
        async with server:
            try:
                return await work(agent)
            finally:
                agent.close()
                await asyncio.sleep(0)

    return asyncio.run(main())


def test_addresses_but_for_what_are_none(tmp_path: Path) -> None:
    fake = Fake(guest_network_get_interfaces=INTERFACES)
    assert run(tmp_path, fake, lambda agent: agent.addresses()) == ["192.0.2.42", "2001:db8::42"]


def test_what_was_asked_before_is_answered_to_nobody(tmp_path: Path) -> None:
    stale = b'{"return": "of before"}\n\xff{"return": 12345}\n\xff[[[\n'
    fake = Fake(stale, guest_network_get_interfaces=INTERFACES[:2])
    assert run(tmp_path, fake, lambda agent: agent.addresses()) == ["192.0.2.42", "2001:db8::42"]


@pytest.mark.parametrize(
    "answer", [b"[" * 60_000 + b"\n", b"x" * (1 << 17), b"\xfe\xfe\n", b"{}\n", b'{"error": {"desc": 7}}\n', b"7\n"]
)
def test_nonsense_cannot_be_read(tmp_path: Path, answer: bytes) -> None:
    with pytest.raises(Unavailable, match="what the agent in guest web answers to guest-network-get-interfaces cannot"):
        run(tmp_path, Fake(guest_network_get_interfaces=answer), lambda agent: agent.addresses())


def test_a_refusal_is_passed_on_in_bounds(tmp_path: Path) -> None:
    answer = json.dumps({"error": {"class": "GenericError", "desc": "no\x1b[31m" + "x" * 10_000}}).encode() + b"\n"
    with pytest.raises(Unavailable) as refused:
        run(tmp_path, Fake(guest_network_get_interfaces=answer), lambda agent: agent.addresses())
    assert str(refused.value).startswith(r"the agent in guest web refused guest-network-get-interfaces: no\x1b[31mxxx")
    assert len(str(refused.value)) < 300


def test_no_answer_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Agent._ask, "__defaults__", (0.1,))
    with pytest.raises(Unavailable, match=r"no agent in guest web has answered within 0.1 s \(is qemu-guest-agent"):
        run(tmp_path, Fake(), lambda agent: agent.addresses())


def test_no_channel(tmp_path: Path) -> None:
    guest = replace(GUEST, agent=False)
    for ask in (Agent.addresses, Agent.thaw, lambda agent: agent.freeze(1)):
        with pytest.raises(Unavailable, match="guest web has no channel to an agent"):
            run(tmp_path, Fake(), ask, guest)
    assert not (tmp_path / "frozen").exists()


def test_frozen_once_thawed_by_itself_and_by_the_next_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(guest_fsfreeze_freeze=2, guest_fsfreeze_thaw=2)

    async def freeze(agent: Agent) -> None:
        for seconds in (0, 301):
            with pytest.raises(InvalidOption, match=f"for 1 to 300 seconds, not for {seconds}"):
                await agent.freeze(seconds)
        assert await agent.freeze(300) == 2
        with pytest.raises(Busy, match="frozen already"):
            await agent.freeze(300)

    run(tmp_path, fake, freeze)
    assert (tmp_path / "frozen").exists()

    async def adopt(agent: Agent) -> None:
        agent.adopt()
        assert agent._thawing
        await agent._thawing

    run(tmp_path, fake, adopt)
    assert not (tmp_path / "frozen").exists()
    assert [command for command, _ in fake.asked] == ["guest-fsfreeze-freeze", "guest-fsfreeze-thaw"]


@pytest.mark.parametrize(("answer", "frozen"), [(b'{"error": {"desc": "cannot"}}\n', False), (b"nonsense\n", True)])
def test_a_freeze_that_fails(tmp_path: Path, answer: bytes, frozen: bool) -> None:
    """What may have been done all the same is thawed later; what has not been can be tried again at once."""

    async def freeze(agent: Agent) -> None:
        with pytest.raises(Unavailable):
            await agent.freeze(300)
        assert (tmp_path / "frozen").exists() is frozen
        with pytest.raises(Busy if frozen else Unavailable):
            await agent.freeze(300)

    run(tmp_path, Fake(guest_fsfreeze_freeze=answer), freeze)


def test_a_shutdown_is_not_answered_and_thaws_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "AGAIN", 0.1)
    fake = Fake(guest_fsfreeze_freeze=1, guest_fsfreeze_thaw=1)

    async def leave(agent: Agent) -> None:
        await agent.freeze(300)
        agent.begin_to_shut_down()
        assert agent._leaving
        await agent._leaving

    run(tmp_path, fake, leave)
    assert fake.asked[1:] == [("guest-fsfreeze-thaw", None), ("guest-shutdown", {"mode": "powerdown"})]
