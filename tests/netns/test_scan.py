"""A guest that talks to every address of its LAN does not cost the others theirs.

Each address that somebody sends to is an entry in the host's neighbour table, which has room for 1,024 by default
(gc_thresh3 in ip-sysctl.rst), for some seconds also if nobody answers there.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import statistics
from collections.abc import AsyncIterator

import pytest

from kvmd.network.lan import Lan
from kvmd.network.model.plan import TAP_MAC

from .conftest import Bottle, Space, eventually, run, script, settle
from .test_lan import up

PING = ("ping", "-n", "-W", "2")

# To the tap's MAC, without asking for a neighbour: nothing that limits answers holds it up.
SCAN = f"""
import itertools, socket, struct, sys, time
sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
sock.bind(("eth0", 0))
ether = bytes.fromhex("{TAP_MAC.replace(":", "")}") + bytes.fromhex("525400000001")
six, four = socket.inet_pton(socket.AF_INET6, "2001:db8:1::51"), socket.inet_aton("192.0.2.51")
udp = bytes.fromhex("0009000900080001")
def packet(number):
    if sys.argv[1] == "6":
        target = bytes.fromhex("20010db8000100000000000a") + struct.pack("!I", number)
        return ether + struct.pack("!HIHBB", 0x86dd, 6 << 28, len(udp), 17, 64) + six + target + udp
    head = struct.pack("!BBHHHBBH4sI", 0x45, 0, 28, 0, 0, 64, 17, 0, four, 0xc6120000 + number)
    total = sum(struct.unpack("!10H", head))
    total = ~((total & 0xffff) + (total >> 16)) & 0xffff
    return ether + struct.pack("!H", 0x800) + head[:10] + struct.pack("!H", total) + head[12:] + udp
for number in itertools.count():
    sock.send(packet(number & 0xffff))
    time.sleep(0.0002)
"""


@contextlib.asynccontextmanager
async def scanning(guest: Space, family: int) -> AsyncIterator[None]:
    where = ("nsenter", f"--net=/run/netns/{guest.name}")
    scanner = await asyncio.create_subprocess_exec(*where, "python3", "-c", SCAN, str(family))
    try:
        yield
        assert scanner.returncode is None
    finally:
        with contextlib.suppress(ProcessLookupError):
            scanner.kill()
        await scanner.wait()


@pytest.mark.parametrize("family", [4, 6])
async def test_anothers_first_ping(bottle: Bottle, lan: Lan, family: int) -> None:
    hostile, first = bottle.guest(1)
    honest, second = bottle.guest(2)
    # Of IPv4, too, a LAN with more addresses than the table has room for.
    bottle.lan.script("ip addr add 198.18.0.1/16 dev wire")
    script("ip addr add 198.18.0.2/16 dev up0")
    await up(lan, first, second)
    settle(honest.name)
    targets = [f"198.18.255.{n}" if family == 4 else f"2001:db8:1::b:{n}" for n in range(1, 21)]
    bottle.lan.script(
        "\n".join(
            f"ip addr add {t}/{16 if family == 4 else 64} dev wire {'' if family == 4 else 'nodad'}" for t in targets
        )
    )
    old = targets.pop()
    assert await hostile.reaches(old)  # who talks already goes on
    async with scanning(hostile, family):
        conversation = asyncio.create_task(
            asyncio.to_thread(hostile.run, *PING, "-c", "40", "-i", "0.1", old, check=False)
        )
        await eventually(lambda: dropped() > 5000, seconds=20)
        texts = [await asyncio.to_thread(honest.run, *PING, "-c", "1", to) for to in targets]
        assert " 0% packet loss" in await conversation
    times = [float(found[1]) for text in texts if (found := re.search(r"time=([\d.]+) ms", text))]
    assert len(times) == len(targets)
    assert statistics.median(times) < 5


def dropped() -> int:
    """Packets to more addresses than one guest may talk to."""
    [rule] = [
        item["rule"]
        for item in json.loads(run("nft", "-j", "list", "chain", "inet", "kvmd", "talk"))["nftables"]
        if "drop" in str(item)
    ]
    return int(rule["expr"][0]["counter"]["packets"])
