"""A pattern searched for in lines, by a real process of its own."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from kvmd.guests import search
from kvmd.guests.search import NOBODY, Search

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: the process is another user's")
EVIL = "(a+)+$", "a" * 60 + "!"


@asynccontextmanager
async def searching(pattern: str) -> AsyncIterator[tuple[Search, list[str]]]:
    """And what came of it."""
    told: list[str] = []
    seeker = Search(re.compile(pattern), lambda: told.append("found"), told.append)
    try:
        yield seeker, told
    finally:
        seeker.close()


def process(seeker: Search) -> subprocess.Popen[bytes]:
    assert seeker._process
    return seeker._process


@pytest.mark.parametrize(
    ("pattern", "line"),
    [("^login: $", "login: "), ("bé\u2028", "ab\u00e9\u2028"), ("^$", ""), (r"\d{3}", "x123"), ("one\n?two", "onetwo")],
)
async def test_found_once_in_whichever_batch(pattern: str, line: str) -> None:
    async with searching(pattern) as (seeker, told):
        await seeker.of(["nothing", "much"])
        assert (told, seeker.over) == ([], False)
        await seeker.of(["not", line, "this"])
        assert (told, seeker.over) == (["found"], True)
        await seeker.of([line])
        assert told == ["found"]


async def test_it_is_nobodys_and_gone_afterwards() -> None:
    async with searching("x") as (seeker, _told):
        await seeker.of(["a"])
        begun = process(seeker)
        assert Path(f"/proc/{begun.pid}").stat().st_uid == NOBODY
        assert Path(f"/proc/{begun.pid}/oom_score_adj").read_text() == "1000\n"
    await asyncio.to_thread(begun.wait)
    assert not Path(f"/proc/{begun.pid}").exists()


async def test_its_end_is_the_daemons() -> None:
    """Or somebody's who kills it."""
    async with searching("x") as (seeker, told):
        await seeker.of(["a"])
        begun = process(seeker)
        seeker._socket.shutdown(socket.SHUT_WR)
        assert await asyncio.to_thread(begun.wait) == 0
        await seeker.of(["x"])
        assert told == ["its process has ended with status 0"]


async def test_it_takes_no_longer_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop goes on meanwhile; and whoever waits may go."""
    monkeypatch.setattr(search, "SEARCH", search.SEARCH.replace(f"PROF, {search.LIMIT})", "PROF, 0.5)"))
    async with searching(EVIL[0]) as (seeker, told):
        impatient = asyncio.create_task(seeker.of([EVIL[1]]))
        await asyncio.sleep(0)
        impatient.cancel()
        await asyncio.gather(impatient, return_exceptions=True)
        assert told == []
        await seeker.of(["aaa"])
        assert len(told) == 1
        assert "CPU time" in told[0]


async def test_a_process_that_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "PATIENCE", 0.3)
    async with searching("x") as (seeker, told):
        await seeker.of(["a"])
        process(seeker).send_signal(signal.SIGSTOP)
        await seeker.of(["x"])
        assert told == ["it takes more than 0.3 s"]
