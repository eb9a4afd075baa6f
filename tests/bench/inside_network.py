"""The part of `tests/bench/run network` that runs inside the host; the last line printed is JSON.

python3 -m bench.inside_network mended N PID: what goes wrong, N times each: {trouble: [milliseconds, …]}
python3 -m bench.inside_network taps 0 PID: see ``taps``
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path

from .inside import CONFIGURATION, MANAGER, PAUSE, UPLINK, Client, Proxies, make_tap, wait_until

IDLE = 10.0  # seconds of looking on while nothing happens
TAPS = (1, 100, 500, 1000)
SAMPLES = 9
PREFIX = (ip_address("198.18.0.0"), ip_address("2001:db8:1::1:0"))  # IPv4: not on the LAN, so that there are a thousand


def run(*argv: str, check: bool = True) -> str:
    return subprocess.run(argv, check=check, capture_output=True, text=True, timeout=60).stdout


def addresses(number: int) -> tuple[str, str]:
    four, six = (str(first + number) for first in PREFIX)
    return four, six


def write_file(number: int) -> None:
    four, six = addresses(number)
    text = f'memory = "32M"\n[[network]]\naddress = ["{four}", "{six}"]\ntap = "many{number}"\n'
    (CONFIGURATION / f"many{number}.toml").write_text(text)


async def reload() -> None:
    client = Client()
    await client.connect()
    await client.call(MANAGER, "Reload")


# --- mended -----------------------------------------------------------------------------------------------------------


def routes() -> int:
    return len(
        (run("ip", "route", "show", "proto", "171") + run("ip", "-6", "route", "show", "proto", "171")).split("\n")
    )


def mended(count: int) -> dict[str, list[float]]:
    """Of one guest's network, each piece taken away or broken, and from the end of that until all is there again."""
    write_file(1)
    asyncio.run(reload())
    fd = make_tap("many1")
    proxies, wanted = Proxies(UPLINK), set(addresses(1))
    proxies.wait(wanted, present=True)
    four, six = addresses(1)
    whole = routes()
    series: defaultdict[str, list[float]] = defaultdict(list)
    replug = [
        "ip link del eth0",
        "ip link add eth0 address 02:00:00:00:00:10 type veth peer name host netns lan",
        "ip -n lan link set host master br0 up",
        "ip link set eth0 up",
        "ip addr add 192.0.2.10/24 dev eth0",
        "ip addr add 2001:db8:1::10/64 dev eth0 nodad",
        "ip route add default via 192.0.2.1",
    ]
    troubles: dict[str, tuple[list[str], Callable[[], object]]] = {
        "proxy entries removed": (
            [f"ip neigh del proxy {four} dev eth0", f"ip neigh del proxy {six} dev eth0"],
            lambda: wanted <= proxies.present(),
        ),
        "routes removed": (
            [f"ip route flush {four} dev many1", f"ip -6 route flush {six} dev many1"],
            lambda: routes() == whole,
        ),
        "nft table flushed": (
            ["nft delete table inet kvmd"],
            lambda: "many1" in run("nft", "list", "table", "inet", "kvmd", check=False),
        ),
        "sysctl changed": (
            ["sysctl -q net.ipv4.conf.eth0.forwarding=0"],
            lambda: Path("/proc/sys/net/ipv4/conf/eth0/forwarding").read_text() == "1\n",
        ),
        "uplink down and up": (
            ["ip link set eth0 down", "ip link set eth0 up", "ip route add default via 192.0.2.1"],
            lambda: wanted <= proxies.present() and routes() >= whole - 1,
        ),
        "uplink deleted and made again": (replug, lambda: wanted <= Proxies(UPLINK).present() and routes() == whole),
    }
    for _ in range(count):
        for name, (commands, whole_again) in troubles.items():
            for command in commands:
                run(*command.split())
            begin = time.perf_counter_ns()
            wait_until(whole_again, name, 0.001)
            series[name].append((time.perf_counter_ns() - begin) / 1e6)
            time.sleep(PAUSE)
            proxies = Proxies(UPLINK)
    os.close(fd)
    (CONFIGURATION / "many1.toml").unlink()
    asyncio.run(reload())
    return dict(series)


# --- taps -------------------------------------------------------------------------------------------------------------


def activity(daemon: int) -> tuple[float, int]:
    """The daemon's CPU time in milliseconds, and its context switches, so far."""
    fields = Path(f"/proc/{daemon}/stat").read_text().rpartition(")")[2].split()
    ticks = int(fields[11]) + int(fields[12])
    status = dict(row.split(":\t") for row in Path(f"/proc/{daemon}/status").read_text().splitlines() if ":\t" in row)
    switches = int(status["voluntary_ctxt_switches"]) + int(status["nonvoluntary_ctxt_switches"])
    return ticks * 1000 / os.sysconf("SC_CLK_TCK"), switches


def settle(daemon: int) -> None:
    """Until what the taps have caused is done: the daemon does next to nothing for a second."""
    before, after = 0.0, float("inf")
    while after - before > 20:
        before, _switches = activity(daemon)
        time.sleep(1)
        after, _switches = activity(daemon)


def pss(daemon: int) -> float:
    """The daemon's proportional set size in MiB."""
    fields = (row.split() for row in Path(f"/proc/{daemon}/smaps_rollup").read_text().splitlines()[1:])
    return next(int(field[1]) / 1024 for field in fields if field[0] == "Pss:")


def taps(daemon: int) -> list[dict[str, object]]:
    """For each number of taps: milliseconds from making one more until it is applied, and a second of idling."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
    for number in range(TAPS[-1] + 1):
        write_file(number)
    asyncio.run(reload())
    proxies = Proxies(UPLINK)
    held: list[int] = []
    rows: list[dict[str, object]] = []
    for count in TAPS:
        while len(held) < count:
            held.append(make_tap(f"many{len(held)}"))
        proxies.wait({address for number in range(count) for address in addresses(number)}, present=True)
        settle(daemon)
        cpu, switches = activity(daemon)
        time.sleep(IDLE)
        cpu, switches = activity(daemon)[0] - cpu, activity(daemon)[1] - switches
        latencies = []
        for _ in range(SAMPLES):
            last = set(addresses(count))
            begin = time.perf_counter_ns()
            fd = make_tap(f"many{count}")
            proxies.wait(last, present=True)
            latencies.append((time.perf_counter_ns() - begin) / 1e6)
            os.close(fd)
            proxies.wait(last, present=False)
            time.sleep(PAUSE)
        memory = next(
            int(row.split()[1])
            for row in Path(f"/proc/{daemon}/smaps_rollup").read_text().splitlines()
            if row.startswith("Pss:")
        )
        rows.append(
            {"taps": count, "latency": latencies, "cpu": cpu / IDLE, "switches": switches / IDLE, "pss": memory / 1024}
        )
    for fd in held:
        os.close(fd)
    for number in range(TAPS[-1] + 1):
        (CONFIGURATION / f"many{number}.toml").unlink()
    asyncio.run(reload())
    return rows


if __name__ == "__main__":
    verb, count, daemon = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    print(json.dumps(mended(count) if verb == "mended" else taps(daemon)))
