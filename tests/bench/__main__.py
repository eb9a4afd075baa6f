"""What kvmd costs, as ratios to what it is made of, measured in turn in one disposable host: see `tests/bench/run`.

`tests/bench/run` alone is about one guest:

Milliseconds of a busy machine mean little; the ratios are stable. Every round measures everything once, in turn.

    start    StartGuest sent → the guest's first serial line in the journal; bare: QEMU started → first byte in its file
    stop     Terminate sent → its reply, when tap and routes are gone, too; bare: QMP quit sent → process gone (pidfd)
    network  before a tap is made, by somebody else → the uplink's proxy entries, the last thing applied; a shell script
             that ends in the same state likewise, started when the tap is there and with the daemon halted
    memory   proportional set size of the daemon (smaps_rollup)

`tests/bench/run network` is about the LAN:

    first ping  with cold neighbour caches on all sides; beside it the ping after it, with warm ones
    mended      from the end of what went wrong until the kernel holds everything again
    taps        1 to 1,000 taps: link event → applied, the daemon's memory, and what it does while nothing happens

A benchmark is no test: the exit status is 0 if all of it could be measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import lab

HERE = Path(__file__).resolve().parent
GUESTS = 20
LINES = 4
INSIDE = "/run/bench-inside.py"
TIMEOUT_PER_ROUND = 60.0


@dataclass(frozen=True)
class Row:
    """One line of the table: the ratio of a series to its baseline, or the inverse if ``faster``."""

    text: str
    series: str
    base: str
    target: float | None = None
    faster: bool = False

    def show(self, values: Mapping[str, Sequence[float]]) -> str:
        own, base = values[self.series], values[self.base]
        ratio = statistics.median(own) / statistics.median(base)
        measured = f"{spread(base)}  {spread(own)}"
        if self.faster:
            ratio = 1 / ratio
        return line(self.text, measured, ratio, self.target, self.faster, len(own))


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


def spread(values: Sequence[float]) -> str:
    """Median, and the middle half."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:7.1f} [{low:6.1f} {high:6.1f}]"


def line(text: str, measured: str, ratio: float, target: float | None, at_least: bool, count: int) -> str:
    goal, verdict = "", ""
    if target is not None:
        goal = f"{'≥' if at_least else '≤'} {target:g}"
        verdict = "met" if (ratio >= target if at_least else ratio <= target) else "MISSED"
    return f"{text:36} {measured:48} {ratio:7.2f}  {goal:6} {verdict:7} {count:3}".rstrip()


def memory(host: lab.Host, daemon: int) -> dict[str, float]:
    """MiB by name, of smaps_rollup."""
    fields = (row.split() for row in host.read(f"/proc/{daemon}/smaps_rollup").splitlines()[1:])
    sizes = {field[0].rstrip(":"): int(field[1]) / 1024 for field in fields}
    return {**sizes, "Private": sizes["Private_Clean"] + sizes["Private_Dirty"]}


def show_memory(text: str, sizes: Mapping[str, float], target: float | None = None) -> str:
    measured = f"{sizes['Private']:.1f} private, {sizes['Rss']:.1f} resident"
    return line(text, measured, sizes["Pss"], target, False, 1)


def main() -> Iterator[str]:
    parser = argparse.ArgumentParser(prog="tests/bench/run", description="kvmd against the bare commands, as ratios.")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="how often each is measured (15)")
    parser.add_argument(
        "--realtime", action="store_true", help="the host, both sides, before all else: for a machine others use, too"
    )
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("--rounds: at least 2")
    if arguments.realtime:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))  # what this process starts inherits it
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
        output = inside("rounds", arguments.rounds, TIMEOUT_PER_ROUND * (arguments.rounds + 1))
        values: dict[str, list[float]] = json.loads(output.splitlines()[-1])
        load = f"load {before:.1f} before, {os.getloadavg()[0]:.1f} after"
        yield f"{package.name}, {arguments.rounds} rounds, {os.cpu_count()} CPUs, {load}; ms: median [quartiles]"
        yield f"{'':36} {'bare':>24}{'kvmd':>24}   ratio  target            n"
        yield from (row.show(values) for row in ROWS)
        yield f"{'':36} {'MiB':48}     PSS"
        yield show_memory("memory, no guest", idle, 40)
        inside("start", GUESTS, 120)
        yield show_memory(f"memory, {GUESTS} guests", memory(host, daemon))
        inside("stop", GUESTS, 120)


if __name__ == "__main__":
    for text in main():
        print(text, flush=True)
