"""What kvmd costs, as ratios to what it is made of, measured in turn in one disposable host: see `tests/bench/run`.

Milliseconds of a busy machine mean little; the ratios are stable. Every round measures everything once, in turn.
A benchmark is no test: the exit status is 0 if all of it could be measured.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator

from . import network, one, peers

# By name, as typed: the lines of the table, and how many rounds it has if nobody says.
TABLES: dict[str, tuple[Callable[[int], Iterator[str]], int]] = {
    "one": (one.table, 15),
    "network": (network.table, 15),
    "peers": (peers.table, 3),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="tests/bench/run",
        description="kvmd against the bare commands, as ratios.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"{one.__doc__}\n{network.__doc__}\n{peers.__doc__}",
    )
    parser.add_argument("table", nargs="?", choices=TABLES, default="one", help="what to measure (one)")
    parser.add_argument("--rounds", type=int, metavar="N", help="how often each is measured")
    parser.add_argument(
        "--realtime", action="store_true", help="the host, both sides, before all else: for a machine others use, too"
    )
    arguments = parser.parse_args()
    table, rounds = TABLES[arguments.table]
    if arguments.rounds is not None and arguments.rounds < 2:
        parser.error("--rounds: at least 2")
    if arguments.realtime:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))  # what this process starts inherits it
    for text in table(arguments.rounds or rounds):
        print(text, flush=True)


if __name__ == "__main__":
    main()
