"""`tests/bench/run` [one]: one guest.

start    StartGuest sent → the guest's first serial line in the journal; bare: QEMU started → first byte in its file
stop     Terminate sent → its reply, when tap and routes are gone, too; bare: QMP quit sent → process gone (pidfd)
network  before a tap is made, by somebody else → the uplink's proxy entries, the last thing applied; a shell script
         that ends in the same state likewise, started when the tap is there and with the daemon halted
memory   proportional set size of the daemon (smaps_rollup)
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import lab

from .table import Row, heading, line, memory

HERE = Path(__file__).resolve().parent
GUESTS = 20
LINES = 4
INSIDE = "/run/bench-inside.py"
TIMEOUT_PER_ROUND = 60.0

# The first three are what kvmd promises; those without a target say where the time goes.
ROWS = (
    Row("start → first serial line", "start: kvmd", "start: bare", 1.5),
    Row("  the same, guest without network", "start: kvmd, no network", "start: bare"),
    Row("  systemd-run --scope", "start: systemd-run", "start: bare"),
    Row("  start → returned", "started: kvmd", "start: bare"),
    Row("stop → returned", "stop: kvmd", "stop: bare", 2.7),
    Row("  the same, guest without network", "stop: kvmd, no network", "stop: bare"),
    Row("  bare QEMU with a tap", "stop: bare with a tap", "stop: bare"),
    Row("network, times as fast as a script", "network: kvmd", "network: script", 5, faster=True),
)


def show_memory(text: str, sizes: Mapping[str, float], target: float | None = None) -> str:
    measured = f"{sizes['Private']:.1f} private, {sizes['Rss']:.1f} resident"
    return line(text, measured, sizes["Pss"], target, False, 1)


def table(rounds: int) -> Iterator[str]:
    package = lab.deb()
    with lab.Host("bookworm", package, name="bench") as host:
        host.make_lan()
        host.write("/var/lib/kvmd/rom", lab.guests.rom(LINES))
        host.copy_in(HERE / "inside.py", INSIDE)
        host.run("systemctl", "start", "kvmd")
        daemon = int(host.show("kvmd")["MainPID"])

        def inside(verb: str, count: int, timeout: float) -> str:
            words = ("python3", "-IB", INSIDE, verb, str(count), str(daemon))
            return host.run(*words, timeout=timeout).stdout

        idle = memory(host, daemon)
        before = os.getloadavg()[0]
        output = inside("rounds", rounds, TIMEOUT_PER_ROUND * (rounds + 1))
        values: dict[str, list[float]] = json.loads(output.splitlines()[-1])
        load = f"load {before:.1f} before, {os.getloadavg()[0]:.1f} after"
        yield f"{package.name}, {rounds} rounds, {os.cpu_count()} CPUs, {load}; ms: median [quartiles]"
        yield heading("")
        yield from (row.show(values) for row in ROWS)
        yield f"{'':36} {'MiB':48}     PSS"
        yield show_memory("memory, no guest", idle, 40)
        inside("start", GUESTS, 120)
        yield show_memory(f"memory, {GUESTS} guests", memory(host, daemon))
        inside("stop", GUESTS, 120)
