"""What the LAN is told of guests' addresses without asking: at a start and when the wire is another one, several times.

Also a switch that forwards only seconds after its port is up, and whoever lost a packet, has to hear of them.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from pathlib import Path

from kvmd.guest import Nic
from kvmd.network.lan import Lan
from kvmd.network.wire.announcements import TIMES

from .conftest import Bottle, eventually, run, script
from .test_lan import texts, up

FRAME = re.compile(
    r"^(\S+) (\S+) > .*(?:Request who-has (\S+) .*tell \3,"
    r"|neighbor advertisement, .*tgt is (\S+), Flags \[.*override)"
)


@dataclass
class Ear:
    """``heard``: seconds, MAC, address of each announcement so far."""

    heard: list[tuple[float, str, str]] = field(default_factory=list)

    def times(self, address: str, mac: str | None = None) -> list[float]:
        return [when for when, who, what in self.heard if what == address and mac in (None, who)]


@asynccontextmanager
async def ear(bottle: Bottle) -> AsyncIterator[Ear]:
    process = await asyncio.create_subprocess_exec(
        *("nsenter", f"--net=/run/netns/{bottle.lan.name}", "tcpdump", "-lnettv", "-B", "16384", "-i", "wire"),
        "arp or (icmp6 and ip6[40] == 136)",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout
    assert process.stderr
    while b"listening" not in await process.stderr.readline():
        pass
    ear = Ear()

    async def read(lines: asyncio.StreamReader) -> None:
        text = ""
        async for line in lines:
            text = line.decode() if line[:1].isdigit() else text.strip() + line.decode()
            if found := FRAME.search(text):
                ear.heard.append((float(found[1]), found[2], found[3] or found[4]))
                text = ""

    reader = asyncio.create_task(read(process.stdout))
    try:
        yield ear
    finally:
        process.terminate()
        await process.wait()
        await reader


def mac() -> str:
    [uplink] = json.loads(run("ip", "-j", "link", "show", "up0"))
    return str(uplink["address"])


def seconds(times: list[float]) -> set[float]:
    """After the first; a start says it twice at once, when all is applied and when the tap has a carrier."""
    return {round(when - times[0], 1) for when in times}


def nothing_to_say(lan: Lan) -> Callable[[], bool]:
    return lambda: lan._presence._announcements._timer is None


async def test_repeated_after_a_start(bottle: Bottle, lan: Lan) -> None:
    _guest, nic = bottle.guest(1)
    async with ear(bottle) as lan_ear:
        await up(lan, nic)
        await eventually(nothing_to_say(lan), TIMES[-1] + 2)
        await eventually(lambda: all(seconds(lan_ear.times(text, mac())) == {*TIMES} for text in texts(nic)))


async def test_never_with_an_old_mac_and_anew_after_a_change(bottle: Bottle, lan: Lan) -> None:
    """As when a bond fails over; and when the wire was unplugged, or the interface has another name."""
    _guest, nic = bottle.guest(1)
    async with ear(bottle) as lan_ear:
        await up(lan, nic)
        old, new, before = mac(), "02:00:00:00:00:77", lan._survey.host.find("up0")
        assert before
        script(f"ip link set up0 address {new}")
        lan._presence.announce_all(before)  # as it was: nothing has been read of the other one yet
        await eventually(lambda: all(len(lan_ear.times(text, new)) >= 3 for text in texts(nic)), 5)
        changed = min(lan_ear.times(texts(nic)[0], new))
        assert not [each for each in lan_ear.heard if each[0] > changed and each[1] == old]
        lan_ear.heard.clear()
        bottle.lan.script("ip link set wire down")
        await eventually(lambda: lan.status(nic.tap).state == "uplink-down")
        bottle.lan.script("ip link set wire up")
        await eventually(lambda: len(lan_ear.times(texts(nic)[0])) >= 2)
        await eventually(nothing_to_say(lan), TIMES[-1] + 2)
        lan_ear.heard.clear()
        script("ip link set up0 name up9")
        await eventually(lambda: all(len(lan_ear.times(text, new)) >= 2 for text in texts(nic)))


async def test_not_for_one_that_has_gone(bottle: Bottle, tmp_path: Path) -> None:
    """Given up, its tap gone, its file gone; and nothing is left to be said by a daemon that ends."""
    nics = [bottle.guest(number)[1] for number in (1, 2, 3, 4)]
    async with ear(bottle) as lan_ear:
        async with bottle.lan_room(tmp_path) as lan:
            await up(lan, *nics)
            lan.give_up(nics[0].tap)
            bottle.unplug(nics[1])
            await eventually(lambda: lan.status(nics[1].tap).state == "absent")
            lan.declare([nics[0], nics[1], nics[3]])
            await eventually(lambda: len(lan_ear.heard) >= 16)  # at once
            lan_ear.heard.clear()
            await eventually(lambda: len(lan_ear.times(texts(nics[3])[1])) == 2)  # after 1 and 3 s
            assert {address for _when, _mac, address in lan_ear.heard} == set(texts(nics[3]))
        assert nothing_to_say(lan)()


async def test_a_thousand(bottle: Bottle, lan: Lan) -> None:
    """All are said, by one timer, and the loop has time for others meanwhile."""
    _guest, nic = bottle.guest(1)
    many = Nic(nic.tap, nic.mac, None, tuple(ip_address("192.0.2.64") + n for n in range(1, 1001)))
    lan.declare([many])
    tasks = len(asyncio.all_tasks())
    async with ear(bottle) as lan_ear:
        longest, loop = 0.0, asyncio.get_running_loop()
        await lan.ready(nic.tap)
        assert len(asyncio.all_tasks()) <= tasks + 1
        lan_ear.heard.clear()
        end = loop.time() + 5
        while loop.time() < end:
            before = loop.time()
            await asyncio.sleep(0.01)
            longest = max(longest, loop.time() - before)
        assert longest < 0.4
        assert {text for _when, _mac, text in lan_ear.heard} == set(texts(many))
    lan.declare([replace(many, addresses=())])
    assert nothing_to_say(lan)()
