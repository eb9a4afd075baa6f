"""log: by journalctl, where its reader may read the journal, else by the bus."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

from kvmd.ctl.bus import GUEST, connect
from kvmd.ctl.failure import Failure
from kvmd.ctl.guests import one

LINES = 10_000


async def run(arguments: argparse.Namespace) -> int:
    """Raises ``Failure``."""
    async with connect() as bus:
        guest = await one(bus, arguments.name)
        if not _may_read_journal():
            if arguments.follow or arguments.boot:
                raise Failure("-f and -b read the journal, which is not yours to read (join the group systemd-journal)")
            lines = await bus.call(guest.path, GUEST, "ReadLog", "t", arguments.lines or LINES)
            for line in lines:
                print(json.dumps({"MESSAGE": line}) if arguments.json else line)
            return 0
    words = ["journalctl", "--quiet", "_UID=0", f"KVMD_GUEST={guest.name}", "KVMD_STREAM=serial"]
    words += ["-o", "json" if arguments.json else "cat"]
    words += ["-f"] if arguments.follow else []
    words += ["-n", str(arguments.lines)] if arguments.lines is not None else ["-n", "all"] if arguments.follow else []
    if arguments.boot and guest.properties["StartTimestamp"]:
        words.append(f"--since=@{guest.properties['StartTimestamp'] / 1e6:.6f}")
    os.execvp("journalctl", words)
    return 1  # never


def _may_read_journal() -> bool:
    places = (Path("/var/log/journal"), Path("/run/log/journal"))
    return shutil.which("journalctl") is not None and any(
        os.access(file, os.R_OK) for place in places if place.is_dir() for file in place.glob("*/system.journal")
    )
