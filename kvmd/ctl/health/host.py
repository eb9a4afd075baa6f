"""Disks, the journal, the clock, and the users that guests run as."""

from __future__ import annotations

from collections.abc import Iterator

from kvmd.ctl.health.facts import Facts
from kvmd.ctl.health.finding import Finding, failed, ok, warning
from kvmd.ctl.table import size

LEAST = 5  # per cent
RANGE = "65,536 numbers for the users that guests run as"


def judge(facts: Facts) -> Iterator[Finding]:
    for path, space in facts.spaces.items():
        share = 100 * space.free // space.size if space.size else 100
        text = f"{size(space.free)} of {size(space.size)} are free in {path}"
        text += "" if space.where == path else f" (seen at {space.where})"
        if share < LEAST:
            todo = "guests stand still where it is full; journalctl --vacuum-size, or larger storage"
            yield warning("space", f"{text}, {share} %", todo)
        else:
            yield ok("space", text)
    for file, found in facts.ranges.items():
        if found:
            yield ok("users", f"{file} has {found} for guests")
        else:
            yield failed("users", f"{file} has no range of kvmd-qemu: {RANGE}", "dpkg-reconfigure kvmd")
    if facts.journal_kept is False:
        yield ok("journal", "what guests print is forgotten when the host boots", "mkdir /var/log/journal")
    elif facts.journal_kept:
        yield ok("journal", "what guests print outlives a boot of the host")
    if facts.year < 2026:
        yield warning("clock", f"the host's clock says {facts.year}, and guests take it over", "timedatectl")
    elif facts.synchronised is False:
        yield warning(
            "clock", "the host's clock is not synchronised, and guests take it over", "systemd-timesyncd, chrony"
        )
    elif facts.synchronised is None:
        yield ok("clock", "whether it is synchronised cannot be seen here")
    else:
        yield ok("clock", "the host's clock is synchronised")
