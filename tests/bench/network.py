"""`tests/bench/run network`: the LAN of a guest, and a thousand taps.

first ping  with cold neighbour caches of the guest, the host and the neighbour; beside it the next, with warm ones
mended      from the end of what went wrong until the kernel holds everything again
taps        a tap is made → all is applied; and what the daemon does and takes while nothing happens
"""

from __future__ import annotations

import json
import os
import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import lab

HERE = Path(__file__).resolve().parent
GUEST = """memory = "128M"
[boot]
kernel = "vmlinuz"
initrd = "initrd.img"
cmdline = "console=ttyS0 quiet kvmd.name=ping kvmd.addr={four}/24 kvmd.gw=192.0.2.1 kvmd.addr6={six}/64 kvmd.gw6={gw6}"
[[network]]
address = ["{four}", "{six}"]
"""
ADDRESSES = {"four": "192.0.2.42", "six": "2001:db8:1::42", "gw6": "2001:db8:1::1"}
NEIGHBOUR = {"IPv4": "192.0.2.20", "IPv6": "2001:db8:1::20"}
TIME = re.compile(r"time=([\d.]+) ms")


def table(rounds: int) -> Iterator[str]:
    package = lab.deb()
    with lab.Host("bookworm", package, name="bench") as host:
        host.make_lan().neighbour("alice", *NEIGHBOUR.values())
        for name in ("inside.py", "inside_network.py"):
            host.copy_in(HERE / name, f"/run/bench/{name}")
        host.run("systemctl", "start", "kvmd")
        daemon = host.show("kvmd")["MainPID"]

        def inside(verb: str, count: int) -> str:
            words = ("env", "PYTHONPATH=/run", "python3", "-sBm", "bench.inside_network", verb, str(count), daemon)
            return host.run(*words, timeout=600).stdout.splitlines()[-1]

        yield f"{package.name}, {rounds} rounds, {os.cpu_count()} CPUs; ms: median [quartiles] maximum"
        yield f"{'first ping, cold caches':40} {'first':>32} {'with warm caches':>32}"
        for text, first, warm in pings(host, rounds):
            verdict = "met" if statistics.median(first) < 2 else "MISSED"
            yield f"{text:40} {spread(first):>32} {spread(warm):>32}  < 2 {verdict}"
        yield f"{'mended after':40} {'':>32} {'':>32}"
        mended: dict[str, list[float]] = json.loads(inside("mended", rounds))
        for text, values in mended.items():
            yield f"{text:40} {spread(values):>32} {'':>32}  ≤ 2000 {'met' if max(values) <= 2000 else 'MISSED'}"
        yield f"{'taps':>5} {'made → applied':>32} {'CPU ms/s idle':>15} {'switches/s idle':>16} {'PSS MiB':>8}"
        for row in json.loads(inside("taps", 0)):
            idle = f"{row['cpu']:15.1f} {row['switches']:16.1f}"
            yield f"{row['taps']:5} {spread(row['latency']):>32} {idle} {row['pss']:8.1f}"


def spread(values: Sequence[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} [{low:.2f} {high:.2f}] {max(values):.2f}"


def pings(host: lab.Host, rounds: int) -> Iterator[tuple[str, list[float], list[float]]]:
    """Between alice and an emulated guest, whose own kernel takes most of the time."""
    host.write("/etc/kvmd/ping.toml", GUEST.format(**ADDRESSES))
    host.run("busctl", "call", "org.kvmd1", "/org/kvmd1", "org.kvmd1.Manager", "Reload")
    host.run("systemctl", "start", "kvmd@ping")
    host.wait_journal("KVMD_GUEST=ping", message="guest: ready")
    for family, address in (("IPv4", ADDRESSES["four"]), ("IPv6", ADDRESSES["six"])):
        for direction in ("LAN → guest", "guest → LAN"):
            first, warm = [], []
            for _ in range(rounds):
                for netns in (None, "alice"):
                    host.run("ip", "neigh", "flush", "dev", "eth0", netns=netns)
                if direction == "LAN → guest":
                    say(host, "sh ip neigh flush dev eth0; echo flushed", "^flushed")
                    words = ("ping", "-n", "-c", "2", "-i", "0.2", "-W", "5", address)
                    times = TIME.findall(host.run(*words, netns="alice").stdout)
                else:
                    target = NEIGHBOUR[family]
                    since = host.cursor()
                    say(host, f"sh ip neigh flush dev eth0; ping -c 2 -W 5 {target}; echo pinged", "^pinged")
                    lines = host.journal("KVMD_GUEST=ping", "KVMD_STREAM=serial", since=since)
                    times = [time for line in lines for time in TIME.findall(line["MESSAGE"])]
                first.append(float(times[0]))
                warm.append(float(times[1]))
            yield f"{direction}, {family}", first, warm
    host.run("systemctl", "stop", "kvmd@ping")
    host.run("rm", "/etc/kvmd/ping.toml")


def say(host: lab.Host, line: str, answer: str) -> None:
    since = host.cursor()
    host.run("sh", "-c", f"printf '%s\\n' '{line}' > /run/kvmd/ping/serial.in")
    host.wait_journal("KVMD_GUEST=ping", "KVMD_STREAM=serial", message=answer, since=since)
