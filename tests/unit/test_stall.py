"""Why a guest stands still, whatever QEMU says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvmd.config import guestfile
from kvmd.guests.stall import Stall

FULL = {
    "node-name": "disk1",
    "action": "stop",
    "operation": "write",
    "nospace": True,
    "reason": "No space left on device",
}
TWO = '[[disk]]\npath = "a.qcow2"\n[[disk]]\npath = "b.raw"\nformat = "raw"\n'
B = "/var/lib/kvmd/images/b.raw"


@pytest.fixture
def stall() -> Stall:
    return Stall(guestfile.parse(TWO, Path("/etc/kvmd/web.toml"), guestfile.HostIds("0" * 32)).guest)


def test_events(stall: Stall) -> None:
    assert stall.hear("STOP", {}) == ""
    assert stall.reason == ""
    stall.hear("RESUME", {})
    assert stall.reason is None
    assert stall.hear("BLOCK_IO_ERROR", FULL) == f"stands still: disk full: {B}"
    assert stall.hear("BLOCK_IO_ERROR", FULL | {"reason": "another"}) == ""  # of many requests
    stall.hear("STOP", {})
    assert stall.reason == f"disk full: {B}"
    assert stall.blocked.is_set()
    stall.hear("RESUME", {})
    assert not stall.blocked.is_set()
    stall.hear("SUSPEND", {})
    assert stall.reason == "asleep (ACPI S3)"
    stall.hear("WAKEUP", {})
    assert stall.reason is None


def test_an_error_that_the_guest_is_told_of_is_news_once(stall: Stall) -> None:
    failed = {"node-name": "disk0", "action": "report", "nospace": False, "reason": "Input/output error"}
    first = "was told of an error: disk failed: /var/lib/kvmd/images/a.qcow2 (Input/output error)"
    assert [stall.hear("BLOCK_IO_ERROR", failed) for _ in range(3)] == [first, "", ""]
    others = [stall.hear("BLOCK_IO_ERROR", failed | {"reason": str(number)}) for number in range(1000)]
    assert len([news for news in others if news]) < 20
    assert stall.reason is None


@pytest.mark.parametrize(
    ("status", "drives", "reason"),
    [
        ("running", None, None),
        ("paused", None, ""),
        ("prelaunch", None, ""),
        ("suspended", None, "asleep (ACPI S3)"),
        ("io-error", [{"io-status": "ok"}, {"io-status": "nospace", "qdev": "/machine/peripheral/disk1/x"}],
         f"disk full: {B}"),
        ("io-error", [{"io-status": "failed", "inserted": {"node-name": "disk1"}}], f"disk failed: {B}"),
        ("io-error", ["?", 1, None, {"io-status": "ok"}], "a disk is full, or failed"),
        ("io-error", {}, "a disk is full, or failed"),
        ("watch\ndog", None, "QEMU says watch\\ndog"),
        (["x"] * 1000, None, "QEMU says " + str(["x"] * 1000)[:100]),
    ],
)  # fmt: skip
def test_what_qemu_answers(stall: Stall, status: Any, drives: Any, reason: str | None) -> None:
    stall.look(status, drives)
    assert stall.reason == reason
    assert stall.blocked.is_set() == (status == "io-error")
