"""`tests/bench/run peers`: many guests, beside what others do, and libvirt in the same host.

serial     a guest prints 20,000 lines: time and CPU for each; bare: `qemu -serial stdio | systemd-cat`. CPU is that of
           daemon and systemd-cat, then with journald's; libvirt: virtlogd's, which writes a file
autostart  `systemctl start` of 50 guests' units → the last one's first serial line; bare: 50 `systemd-run --scope` at
           once; libvirt: libvirtd's autostart
recovery   the daemon killed → its API lists all guests as running; libvirt: `virsh list`
memory     proportional set size of daemons (smaps_rollup); libvirt: libvirtd and virtlogd
idle       CPU and context switches of daemons while 100 guests run
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import lab

from .table import Row, Values, heading, line, spread

HERE = Path(__file__).resolve().parent
FEW, MANY = 20, 100
IDLE = 20  # seconds
TIMEOUT = 300.0

SERIAL = (
    Row("serial, times the rate", "serial: kvmd", "serial: bare", 1, faster=True),
    Row("  libvirt", "serial: libvirt", "serial: bare", faster=True),
    Row("serial, CPU", "serial CPU: kvmd", "serial CPU: bare", 1),
    Row("  with journald's", "serial CPU with journald: kvmd", "serial CPU with journald: bare"),
    Row("  libvirt", "serial CPU: libvirt", "serial CPU: bare"),
)
AUTOSTART = (
    Row("50 guests started at once", "autostart: kvmd", "autostart: bare", 1.3),
    Row("  libvirt", "autostart: libvirt", "autostart: bare"),
)


def table(rounds: int) -> Iterator[str]:
    package = lab.deb()
    with lab.Host("bookworm", package, name="bench", libvirt=True) as host:
        host.write("/var/lib/kvmd/rom", lab.guests.rom(4))
        host.write("/var/lib/kvmd/chatty", lab.guests.rom(20_000))
        for name in ("inside.py", "inside_peers.py"):
            host.copy_in(HERE / name, f"/run/bench/{name}")

        def inside(verb: str, count: int = 0) -> Values:
            words = ("env", "PYTHONPATH=/run", "python3", "-sBm", "bench.inside_peers", verb, str(count))
            values: Values = json.loads(host.run(*words, timeout=TIMEOUT).stdout.splitlines()[-1])
            return values

        inside("prepare")
        load = f"load {os.getloadavg()[0]:.1f}"
        yield f"{package.name}, {rounds} rounds, {os.cpu_count()} CPUs, {load}; median [quartiles]"
        empty = inside("memory")
        yield heading("µs for each line")
        values = inside("serial", rounds)
        yield from (row.show(values) for row in SERIAL)
        yield heading("ms")
        values = inside("autostart", rounds)
        yield from (row.show(values) for row in AUTOSTART)
        yield heading("ms", "libvirt")
        yield recovery(0, inside("recovery", rounds))
        inside("fill", FEW)
        few = inside("memory")
        yield recovery(FEW, inside("recovery", rounds))
        inside("fill", MANY)
        many = inside("memory")
        yield recovery(MANY, inside("recovery", rounds))
        yield heading("MiB", "libvirt", last="")
        yield absolute("memory, no guest", "memory", empty)
        yield absolute(f"memory, {FEW} guests", "memory", few)
        yield absolute(f"memory, {MANY} guests", "memory", many, 57)
        yield heading(f"{MANY} guests run, each second", "libvirt", last="")
        values = inside("idle", IDLE)
        yield absolute("idle, ms of CPU", "idle CPU", values, 0.5)
        yield absolute("idle, context switches", "idle switches", values, 0.5)


def recovery(guests: int, values: Values) -> str:
    target = 1 if guests else None
    return Row(f"recovery, {guests} guests", "recovery: kvmd", "recovery: libvirt", target).show(values)


def absolute(text: str, series: str, values: Values, target: float | None = None) -> str:
    base, own = values[f"{series}: libvirt"], values[f"{series}: kvmd"]
    return line(text, f"{spread(base)}  {spread(own)}", own[0], target, False, len(own))
