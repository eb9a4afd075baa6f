"""IPv6 switched off on the uplink under guests: told while it is so, and mended when it is over."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from kvmd.network.lan import Lan

from .conftest import HOST6, ROUTER4, ROUTER6, Bottle, eventually, run, script, settle
from .test_lan import proxies, texts, up

OFF = {
    "setting": ("sysctl -q net.ipv6.conf.up0.disable_ipv6=1", "sysctl -q net.ipv6.conf.up0.disable_ipv6=0"),
    "MTU": ("ip link set up0 mtu 1200", "ip link set up0 mtu 1500"),
}


@pytest.mark.parametrize("how", OFF)
async def test_switched_off_and_on(bottle: Bottle, lan: Lan, how: str) -> None:
    """IPv4 goes on, IPv6 to the host's other guests, too; the kernel's own tidying is not taken for anybody's."""
    guest, nic = bottle.guest(1)
    _two, other = bottle.guest(2)
    other = replace(other, addresses=other.addresses[:1])
    await up(lan, nic, other)
    script(OFF[how][0])
    await eventually(lambda: lan.status(nic.tap).state == "uplink-down")
    detail = lan.status(nic.tap).detail
    assert detail.startswith(f"{nic.tap} does not reach the LAN by IPv6: its uplink up0 has ")
    assert lan.status(other.tap).state == "up"
    assert proxies() == {texts(nic)[0], *texts(other)}
    assert await bottle.lan.reaches(texts(nic)[0], *texts(other))
    assert await guest.reaches(ROUTER4)
    await asyncio.sleep(2)  # it stays so
    assert lan.status(nic.tap).detail == detail
    script(f"{OFF[how][1]}\nip addr add {HOST6}/64 dev up0 nodad\nip -6 route add default via {ROUTER6}")
    await eventually(lambda: lan.status(nic.tap).state == "up")
    settle()
    assert await bottle.lan.reaches(*texts(nic))
    assert await guest.reaches(ROUTER6)
    told = [text for tap, text, _priority in bottle.reports if tap == nic.tap and "MTU of 1200 now" not in text]
    assert told == [detail, f"{nic.tap} is up again on up0"]


async def test_off_at_a_start(bottle: Bottle, lan: Lan) -> None:
    """Nothing tells that it is over but the setting itself: there is no address, and none comes."""
    _guest, nic = bottle.guest(1)
    script("sysctl -q net.ipv6.conf.up0.addr_gen_mode=1\nsysctl -q net.ipv6.conf.up0.disable_ipv6=1")
    lan.declare([nic])
    await lan.ready(nic.tap)
    await eventually(lambda: lan.status(nic.tap).state == "uplink-down")
    script("sysctl -q net.ipv6.conf.up0.disable_ipv6=0")
    await eventually(lambda: lan.status(nic.tap).state == "up")
    assert run("ip", "-6", "neigh", "show", "proxy", "dev", "up0")


async def test_off_is_no_matter_without_guests_that_speak_it(
    bottle: Bottle, lan: Lan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No pass after the other."""
    _guest, nic = bottle.guest(1)
    _two, other = bottle.guest(2)
    other = replace(other, addresses=other.addresses[:1])
    await up(lan, nic, other)
    script("sysctl -q net.ipv6.conf.up0.disable_ipv6=1")
    await eventually(lambda: lan.status(nic.tap).state == "uplink-down")
    bottle.unplug(nic)
    await eventually(lambda: lan.status(nic.tap).state == "absent")
    await asyncio.sleep(2)
    looks: list[bool] = []
    apply = lan._holdings.apply
    monkeypatch.setattr(lan._holdings, "apply", lambda *given: looks.append(True) or apply(*given))
    await asyncio.sleep(4)
    assert not looks
