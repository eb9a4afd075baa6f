"""doctor: what this host has for guests, and what it lacks, on one page."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable

from kvmd.ctl.failure import FAILED
from kvmd.ctl.health import host, network, processor, service, software
from kvmd.ctl.health.facts import Facts
from kvmd.ctl.health.finding import Finding
from kvmd.ctl.health.gather import gather
from kvmd.ctl.progress import colourful
from kvmd.ctl.table import RESET

MARKS = {"ok": "✓", "warning": "!", "failed": "✗"}
PLAIN = {"ok": "+", "warning": "!", "failed": "X"}
COLOURS = {"ok": "\033[32m", "warning": "\033[33m", "failed": "\033[1;31m"}


async def run(arguments: argparse.Namespace) -> int:
    findings = judge(await gather())
    if arguments.json:
        print(json.dumps([finding.json() for finding in findings]))
    else:
        print("\n".join(page(findings, encoding=_encoding(), colour=colourful())))
    return FAILED if any(finding.state == "failed" for finding in findings) else 0


def judge(facts: Facts) -> list[Finding]:
    """In the order in which things depend on one another."""
    rooms = (processor, software, service, network, host)
    return [finding for room in rooms for finding in room.judge(facts)]


def page(findings: Iterable[Finding], *, encoding: str, colour: bool) -> list[str]:
    """A line each, with what to do, and a last one with what it comes to."""
    found = list(findings)
    marks = MARKS if _can(encoding) else PLAIN
    widest = max((len(finding.check) for finding in found), default=0)
    lines = []
    for finding in found:
        mark = f"{COLOURS[finding.state]}{marks[finding.state]}{RESET}" if colour else marks[finding.state]
        hint = f" ({finding.hint})" if finding.hint else ""
        lines.append(f"{mark} {finding.check.ljust(widest)}  {_plain(finding.text + hint, encoding)}")
    bad, doubtful = (sum(finding.state == state for finding in found) for state in ("failed", "warning"))
    stops = f"{bad} thing{'s' * (bad != 1)} stop{'s' * (bad == 1)} guests" if bad else "nothing stops guests"
    return [*lines, "", f"{stops}; {doubtful} warning{'s' * (doubtful != 1)}"]


def _encoding() -> str:
    """Python takes UTF-8 also where the locale is C; who asks for that by LC_ALL gets ASCII."""
    return "ascii" if os.environ.get("LC_ALL") in ("C", "POSIX") else sys.stdout.encoding


def _can(encoding: str) -> bool:
    try:
        "".join(MARKS.values()).encode(encoding)
    except (UnicodeError, LookupError):
        return False
    return True


def _plain(text: str, encoding: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text).encode(encoding, "replace").decode(encoding)
