"""The daemon as a service of systemd's: it says that it is well, and does not start again too often."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress

from systemd import daemon

from kvmd.systemd.sysbus import BusError
from kvmd.systemd.units import Systemd

UNIT = "kvmd.service"
LOOP = 20  # starts in a row, some 6 s, before it waits
LONGEST_WAIT = 30.0  # seconds
WELL = 60.0  # seconds


async def feed() -> None:
    """Tell systemd that the loop still turns, twice in each WatchdogSec= (sd_watchdog_enabled(3))."""
    interval = int(os.environ.get("WATCHDOG_USEC", "0")) / 2e6
    while interval:
        daemon.notify("WATCHDOG=1")
        await asyncio.sleep(interval)
    await asyncio.Event().wait()


async def not_too_often(systemd: Systemd) -> None:
    """Wait if systemd had to start the daemon again and again: RestartSec= would let a loop take the machine's time."""
    restarts = 0
    with suppress(BusError):  # it is not run by its unit
        restarts = await systemd.restarts(UNIT)
    if restarts > LOOP:
        seconds = min(2.0 ** (restarts - LOOP - 3), LONGEST_WAIT)
        daemon.notify(f"STATUS=Started again {restarts} times in a row, waiting {seconds:g} s")
        await asyncio.sleep(seconds)
        daemon.notify("STATUS=")


async def note_well(systemd: Systemd) -> None:
    """Whoever has run for a while begins a new count."""
    await asyncio.sleep(WELL)
    await systemd.reset_failed(UNIT)
