"""A host that has its IPv6 address and default route from router advertisements keeps them, and goes on learning."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmd.network.lan import Lan

from .conftest import ROUTER4, ROUTER6, Bottle, advertising, difference, eventually, run, script, settle, snapshot


@pytest.fixture
def router(bottle: Bottle, tmp_path: Path) -> Iterator[None]:
    """The LAN's router advertises; the host has nothing but what it learns."""
    script("ip -6 addr flush dev up0 scope global\nip -6 route del default")
    with advertising(bottle.lan, "wire", "2001:db8:1::/64", tmp_path):
        yield


def learnt() -> bool:
    return "proto ra" in run("ip", "-6", "route", "show", "default")


async def test_default_route_stays(bottle: Bottle, lan: Lan, router: None) -> None:
    await eventually(lambda: learnt() and "mngtmpaddr" in run("ip", "-6", "addr"), 10)
    settle()
    before = snapshot()
    guest, nic = bottle.guest(1, plug=False)
    bottle.plug(guest, nic)
    lan.declare([nic])
    await lan.ready(nic.tap)
    assert learnt()
    await eventually(lambda: lan.status(nic.tap).state == "up")
    settle(guest.name)
    assert await guest.reaches(ROUTER6)
    assert await bottle.lan.reaches(str(nic.addresses[1]))
    script("ip -6 route del default")
    await eventually(learnt, 10)  # the next advertisement is heard
    await lan.withdraw(nic.tap)
    assert learnt()
    bottle.unplug(nic)
    await eventually(lambda: lan.status(nic.tap).state == "absent")
    assert not difference(before, snapshot())


async def test_recreated_uplink_learns(bottle: Bottle, lan: Lan, router: None) -> None:
    """Born with accept_ra=1 on a host that forwards, it would learn nothing."""
    nic = bottle.guest(1, plug=False)[1]
    lan.declare([nic])
    [fd] = lan.open_tap(nic)
    await lan.ready(nic.tap)
    script("ip link del up0")
    await eventually(lambda: lan.status(nic.tap).state == "no-uplink")
    script(f"""
        ip link add up0 type veth peer name wire netns {bottle.lan.name}
        ip link set up0 up
        ip addr add 192.0.2.10/24 dev up0
        ip route add default via {ROUTER4}
    """)
    bottle.lan.script(f"ip link set wire up\nip addr add {ROUTER6}/64 dev wire nodad")
    await eventually(lambda: learnt() and lan.status(nic.tap).state == "up", 20)
    os.close(fd)
    await lan.withdraw(nic.tap)
    assert learnt()


async def test_guest_is_no_router_for_the_host(bottle: Bottle, lan: Lan, router: None, tmp_path: Path) -> None:
    """An advertisement that a guest sends changes nothing on the host, nor does it reach the LAN."""
    guest, nic = bottle.guest(1)
    lan.declare([nic])
    await lan.ready(nic.tap)
    await eventually(learnt, 10)
    settle(guest.name)
    with advertising(guest, "eth0", "2001:db8:bad::/64", tmp_path):
        end = time.monotonic() + 6
        while time.monotonic() < end:
            await asyncio.sleep(0.2)
            assert "2001:db8:bad" not in run("ip", "-6", "route") + bottle.lan.run("ip", "-6", "route")
