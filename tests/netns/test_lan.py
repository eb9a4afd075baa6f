"""Guests, their host and their LAN, all by the real kernel: who reaches whom, and what the host looks like after."""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from collections.abc import Iterable
from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from kvmd.errors import AddressInUse, StartFailed, Unavailable
from kvmd.guest import Address, Nic
from kvmd.network.firewalls.forwarding import Forwarding
from kvmd.network.kernel import netlink
from kvmd.network.lan import Lan
from kvmd.network.model.host import Wire
from kvmd.network.model.things import Failure, Operation

from .conftest import (
    HOST4,
    HOST6,
    ROUTER4,
    ROUTER6,
    Bottle,
    difference,
    eventually,
    host_reaches,
    run,
    script,
    settle,
    snapshot,
)


def texts(nic: Nic) -> list[str]:
    return [str(address) for address in nic.addresses]


def proxies() -> set[str]:
    return set(
        re.findall(
            r"^(\S+) dev up0", run("ip", "neigh", "show", "proxy") + run("ip", "-6", "neigh", "show", "proxy"), re.M
        )
    )


async def up(lan: Lan, *nics: Nic) -> None:
    lan.declare(nics)
    for nic in nics:
        await lan.ready(nic.tap)
        await eventually(lambda nic=nic: lan.status(nic.tap).state == "up")


async def test_all_directions(bottle: Bottle, lan: Lan) -> None:
    """LAN, host, other guest; both families; none of them ever talked to before."""
    one, first = bottle.guest(1)
    _two, second = bottle.guest(2)
    await up(lan, first, second)
    assert await one.reaches(ROUTER4, ROUTER6, HOST4, HOST6, *texts(second))
    assert await bottle.lan.reaches(*texts(first), *texts(second))
    assert await host_reaches(*texts(first), *texts(second))
    assert not bottle.reports


async def test_delegated_prefixes(bottle: Bottle, lan: Lan) -> None:
    guest, nic = bottle.guest(1)
    nic = replace(nic, routes=(ip_network("2001:db8:1:30::/64"), ip_network("198.51.100.0/28")))
    guest.script("ip addr add 2001:db8:1:30::1/64 dev lo nodad\nip addr add 198.51.100.1/28 dev lo")
    bottle.lan.script(f"ip route add 198.51.100.0/28 via {HOST4}\nip -6 route add 2001:db8:1:30::/64 via {HOST6}")
    await up(lan, nic)
    settle(guest.name)
    assert await bottle.lan.reaches("198.51.100.1", "2001:db8:1:30::1")
    assert await host_reaches("198.51.100.1", "2001:db8:1:30::1")


async def test_guests_own_duplicate_address_detection(bottle: Bottle, lan: Lan) -> None:
    """Its own address: free. The neighbour's and another guest's: taken. One nobody has: free."""
    guest, nic = bottle.guest(1, plug=False)
    _, other = bottle.guest(2)
    bottle.plug(guest, nic, dad="")
    await up(lan, nic, other)
    guest.script("sysctl -q net.ipv6.conf.eth0.dad_transmits=1")
    for address in (ROUTER6, HOST6, texts(other)[1], "2001:db8:1::99"):
        guest.script(f"ip addr add {address}/64 dev eth0")
    await eventually(lambda: "tentative" not in guest.run("ip", "-6", "addr", "show", "-dadfailed"))
    failed = set(re.findall(r"inet6 (\S+)/", guest.run("ip", "-6", "addr", "show", "dadfailed")))
    assert failed == {ROUTER6, HOST6, texts(other)[1]}


async def test_neighbour_unreachability_detection(bottle: Bottle, lan: Lan) -> None:
    """Unicast solicitations are answered on either side, else long connections stall every 20 s."""
    guest, nic = bottle.guest(1)
    await up(lan, nic)
    assert await guest.reaches(ROUTER6)
    assert await bottle.lan.reaches(*texts(nic))
    for space, address, device in ((guest, ROUTER6, "eth0"), (bottle.lan, texts(nic)[1], "wire")):
        space.script(f"ip neigh change {address} dev {device} nud probe")
        await eventually(lambda s=space, a=address: "REACHABLE" in s.run("ip", "neigh", "show", a))


async def test_gateway_by_link_local_address(bottle: Bottle, lan: Lan) -> None:
    router = re.findall(r"inet6 (fe80\S+)/", bottle.lan.run("ip", "-6", "addr", "show", "wire"))[0]
    script(f"ip -6 route replace default via {router} dev up0")
    bottle.lan.script("ip addr add 2001:db8:ffff::1/128 dev lo nodad")
    guest, nic = bottle.guest(1)
    guest.script(f"ip -6 route replace default via {router} dev eth0")
    await up(lan, nic)
    assert await guest.reaches("2001:db8:ffff::1")
    assert "router" in guest.run("ip", "-6", "neigh", "show", router)


async def test_source_address_is_the_uplinks(bottle: Bottle, lan: Lan) -> None:
    """With an interface of lower index about, whose address the kernel would take for an unnumbered tap."""
    script("""
        ip link del up0
        ip link add docker0 type bridge
        ip addr add 172.17.0.1/16 dev docker0
        ip addr add 2001:db8:d0c::1/64 dev docker0 nodad
        ip link set docker0 up
    """)
    bottle.wire()
    guest, nic = bottle.guest(1)
    nic = replace(nic, routes=(ip_network("198.51.100.0/28"), ip_network("2001:db8:1:30::/64")))
    await up(lan, nic)
    for target, source in zip(
        [*texts(nic), "198.51.100.1", "2001:db8:1:30::1"], [HOST4, HOST6, HOST4, HOST6], strict=True
    ):
        assert f"src {source} " in run("ip", "route", "get", target)
    assert await host_reaches(*texts(nic))
    script(f"ip addr del {HOST4}/24 dev up0\nip addr add 192.0.2.11/24 dev up0\nip route add default via {ROUTER4}")
    await eventually(lambda: "src 192.0.2.11 " in run("ip", "route", "get", texts(nic)[0]))
    assert await host_reaches(*texts(nic))
    assert await guest.reaches(ROUTER4, "192.0.2.11")


async def test_address_change_while_no_daemon_runs(bottle: Bottle, tmp_path: Path) -> None:
    """systemd's default, promote_secondaries, is on; without, or without another address, the kernel drops proxies."""
    guest, nic = bottle.guest(1)
    async with bottle.lan_room(tmp_path) as lan:
        await up(lan, nic)
    script(f"""
        sysctl -q net.ipv4.conf.up0.promote_secondaries=1
        ip addr add 192.0.2.11/24 dev up0
        ip addr del {HOST4}/24 dev up0
        ip route replace default via {ROUTER4}
    """)
    settle(guest.name)
    assert await bottle.lan.reaches(*texts(nic))
    assert await guest.reaches(ROUTER4, ROUTER6, HOST6)
    assert await host_reaches(*texts(nic))


async def test_host_is_the_same_after_three_guests(bottle: Bottle, tmp_path: Path) -> None:
    """Line by line, with taps of ours; and nothing changes for the uplink while one of them is left."""
    before = snapshot()
    nics = [bottle.guest(number, plug=False)[1] for number in (1, 2, 3)]
    async with bottle.lan_room(tmp_path) as lan:
        lan.declare(nics)
        assert not difference(before, snapshot())
        fds = {nic.tap: lan.open_tap(nic)[0] for nic in nics}
        for nic in nics:
            await lan.ready(nic.tap)
        assert run("sysctl", "-n", "net.ipv6.conf.all.forwarding").strip() == "1"
        for nic in nics:
            assert proxies() >= set(texts(nic))
            over = asyncio.create_task(lan.withdraw(nic.tap))
            await asyncio.sleep(0)
            assert not proxies() & set(texts(nic))
            assert (run("sysctl", "-n", "net.ipv6.conf.all.forwarding").strip() == "1") == (nic is not nics[-1])
            await asyncio.to_thread(os.close, fds[nic.tap])
            await over
            assert lan.status(nic.tap).state == "absent"
        assert not difference(before, snapshot())
        assert not list((tmp_path / "kvmd").iterdir())
    assert not difference(before, snapshot())


async def test_other_interfaces_settings_come_back(bottle: Bottle, tmp_path: Path) -> None:
    """Writing all.forwarding writes every interface: what was 1 before is 1 after, what was 2 stays 2."""
    script("""
        ip link add d0 type bridge
        ip link add d1 type bridge
        ip link add d2 type bridge
        sysctl -q net.ipv6.conf.d0.forwarding=1
        sysctl -q net.ipv6.conf.default.forwarding=1
        sysctl -q net.ipv6.conf.d1.accept_ra=2
        sysctl -q net.ipv6.conf.d2.accept_ra=0
        sysctl -q net.ipv4.conf.d2.forwarding=1
    """)
    before = snapshot()
    nic = bottle.guest(1, plug=False)[1]
    async with bottle.lan_room(tmp_path) as lan:
        lan.declare([nic])
        [fd] = lan.open_tap(nic)
        await lan.ready(nic.tap)
        script("ip link add d3 type bridge")  # born on a host that forwards: takes advertisements all the same
        await eventually(lambda: run("sysctl", "-n", "net.ipv6.conf.d3.accept_ra").strip() == "2")
        os.close(fd)
        await lan.withdraw(nic.tap)
        assert run("sysctl", "-n", "net.ipv6.conf.d3.accept_ra").strip() == "1"
        script("ip link del d3")
    assert not difference(before, snapshot())


async def test_four_only_leaves_six_alone(bottle: Bottle, lan: Lan) -> None:
    guest, nic = bottle.guest(1)
    nic = replace(nic, addresses=nic.addresses[:1])
    await up(lan, nic)
    assert run("sysctl", "-n", "net.ipv6.conf.all.forwarding").strip() == "0"
    assert await guest.reaches(ROUTER4)
    assert await bottle.lan.reaches(texts(nic)[0])


async def test_killed_daemon(bottle: Bottle, tmp_path: Path) -> None:
    """A guest that goes on is adopted untouched; one that ended meanwhile leaves nothing."""
    before = snapshot()
    guest, nic = bottle.guest(1)
    _, other = bottle.guest(2)
    async with bottle.lan_room(tmp_path) as lan:
        await up(lan, nic, other)
    bottle.unplug(other)
    assert proxies() == {*texts(nic), *texts(other)}
    with_one = [line for line in snapshot() if not any(f"{text} " in line for text in texts(other))]
    async with bottle.lan_room(tmp_path) as lan:
        lan.declare([nic, other])
        assert proxies() == set(texts(nic))
        assert not [line for line in difference(with_one, snapshot()) if not re.search("maddr|nft", line)]
        assert other.mac not in run("nft", "list", "ruleset")
        assert await guest.reaches(ROUTER4, ROUTER6)
    bottle.unplug(nic)
    async with bottle.lan_room(tmp_path) as lan:
        lan.declare([])
        assert not difference(before, snapshot())


async def test_nothing_is_removed_before_it_is_known_what_is_wanted(
    bottle: Bottle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events may come while a new daemon asks the bus for firewalls, and while it takes over its guests."""
    before = snapshot()
    guest, nic = bottle.guest(1)
    async with bottle.lan_room(tmp_path) as lan:
        await up(lan, nic)
    running = snapshot()

    async def disturbed(self: Forwarding) -> None:
        script("ip link add passing type bridge\nip link del passing")
        for _round in range(5):
            await asyncio.sleep(0)

    monkeypatch.setattr(Forwarding, "begin", disturbed)
    async with bottle.lan_room(tmp_path) as lan:
        await disturbed(lan._forwarding)
        assert not difference(running, snapshot())
        lan.declare([nic])
        assert not [line for line in difference(running, snapshot()) if "nft" not in line]
        assert await guest.reaches(ROUTER4, ROUTER6)
        bottle.unplug(nic)
        await eventually(lambda: lan.status(nic.tap).state == "absent")
        assert not difference(before, snapshot())


async def test_a_guest_may_end_before_it_is_known_what_is_wanted(bottle: Bottle, tmp_path: Path) -> None:
    """One that is being taken over."""
    nic = bottle.guest(1, plug=False)[1]
    async with bottle.lan_room(tmp_path) as lan:
        fds = lan.open_tap(nic)
        await eventually(lambda: lan._survey.host.find(nic.tap))
        over = asyncio.create_task(lan.withdraw(nic.tap))
        await asyncio.sleep(0)
        await asyncio.to_thread(netlink.close_all, fds)
        async with asyncio.timeout(5):
            await over


async def test_nobody_waits_for_a_tap_that_is_not_heard_of_any_more(bottle: Bottle, tmp_path: Path) -> None:
    """Neither who waited before the daemon let go of the network nor who comes after."""
    nic = bottle.guest(1, plug=False)[1]
    async with bottle.lan_room(tmp_path) as lan:
        lan.declare([nic])
        fds = lan.open_tap(nic)
        await lan.ready(nic.tap)
        early = asyncio.create_task(lan.withdraw(nic.tap))
        await asyncio.sleep(0)
        assert not early.done()
    async with asyncio.timeout(1):
        await early
        await lan.withdraw(nic.tap)
    netlink.close_all(fds)


async def test_pieces_of_others_stay(bottle: Bottle, lan: Lan) -> None:
    """Proxies, routes and neighbours without our tag; even a proxy entry for a guest's own address."""
    guest, nic = bottle.guest(1, plug=False)
    four, six = texts(nic)
    script(f"""
        ip neigh add proxy {four} dev up0
        ip neigh add proxy 192.0.2.200 dev up0
        ip neigh add proxy 2001:db8:1::200 dev up0
        ip route add 203.0.113.0/24 dev up0 proto static
        ip neigh add 192.0.2.201 lladdr 52:54:00:00:00:aa dev up0 nud permanent
    """)
    before = snapshot()
    bottle.plug(guest, nic)
    await up(lan, nic)
    script("ip route add 192.0.2.202/32 dev tap1\nip -6 route add 2001:db8:1::202/128 dev tap1")
    assert await bottle.lan.reaches(four, six)
    await lan.withdraw(nic.tap)
    assert "192.0.2.202" in run("ip", "route", "show", "dev", "tap1")
    assert "proto 171" not in run("ip", "route") + run("ip", "-6", "route")
    bottle.unplug(nic)
    await eventually(lambda: lan.status(nic.tap).state == "absent")
    assert not difference(before, snapshot())


async def test_foreign_route_to_the_guest_is_told(bottle: Bottle, lan: Lan) -> None:
    _guest, nic = bottle.guest(1)
    script(f"ip route add {texts(nic)[0]}/32 dev up0")
    lan.declare([nic])
    with pytest.raises(StartFailed, match="File exists"):
        await lan.ready(nic.tap)
    assert "dev up0" in run("ip", "route", "show", texts(nic)[0])
    assert [tap for tap, _, _ in bottle.reports] == [nic.tap]


@pytest.mark.parametrize("trouble", ["recreate", "down", "carrier", "flush", "sysctl", "tap-route", "tap-down"])
async def test_heals(bottle: Bottle, lan: Lan, trouble: str) -> None:
    guest, nic = bottle.guest(1)
    await up(lan, nic)
    match trouble:
        case "recreate":
            script("ip link del up0")
            await eventually(lambda: lan.status(nic.tap).state == "no-uplink")
            bottle.wire()
        case "down":
            script(f"""
                ip link set up0 down
                ip link set up0 up
                ip addr add {HOST6}/64 dev up0 nodad
                ip route add default via {ROUTER4}
                ip -6 route add default via {ROUTER6}
            """)
        case "carrier":
            bottle.lan.script("ip link set wire down")
            await eventually(lambda: lan.status(nic.tap).state == "uplink-down")
            bottle.lan.script(f"ip link set wire up\nip addr add {ROUTER6}/64 dev wire nodad")
        case "flush":
            script("\n".join(f"ip neigh del proxy {text} dev up0" for text in texts(nic)))
        case "sysctl":
            script("sysctl -q net.ipv6.conf.all.forwarding=0\nsysctl -q net.ipv4.conf.up0.forwarding=0")
        case "tap-route":
            script(f"ip route del {texts(nic)[0]} dev tap1\nip -6 route del {texts(nic)[1]} dev tap1")
        case "tap-down":
            script("ip link set tap1 down")
    await eventually(lambda: proxies() == set(texts(nic)) and lan.status(nic.tap).state == "up")
    await eventually(
        lambda: run("ip", "route", "show", "proto", "171") and run("ip", "-6", "route", "show", "proto", "171")
    )
    if trouble != "recreate":
        await eventually(lambda: run("sysctl", "-n", "net.ipv4.conf.up0.forwarding").strip() == "1")
    mended = [sentence for _tap, sentence, _priority in bottle.reports if "restored" in sentence]
    assert bool(mended) == (trouble not in ("recreate", "carrier")), bottle.reports
    assert trouble != "sysctl" or "net/ipv6/conf/all/forwarding=1" in mended[0]
    settle()
    assert await bottle.lan.reaches(*texts(nic))
    assert await guest.reaches(ROUTER4, ROUTER6, HOST4)


async def test_set_down_in_the_middle_of_a_pass(bottle: Bottle, lan: Lan, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel refuses routes to it: that is nobody's to hear of, the next pass sets all right."""
    _guest, nic = bottle.guest(1)
    await up(lan, nic)
    apply, refused = lan._kernel.apply, []

    def disturbed(operations: list[Operation]) -> list[Failure]:
        if not refused:
            run("ip", "link", "set", nic.tap, "down")
        failures = apply(operations)
        refused.extend(failures)
        return failures

    monkeypatch.setattr(lan._kernel, "apply", disturbed)
    run("ip", "route", "del", texts(nic)[0], "dev", nic.tap)
    await eventually(lambda: refused and run("ip", "route", "show", "proto", "171"))
    assert lan.status(nic.tap).state == "up"
    assert not [text for _tap, text, _priority in bottle.reports if "refused" in text]


async def test_guest_file_goes_as_the_uplink_comes(bottle: Bottle, lan: Lan) -> None:
    """The pass hears of the carrier when a tap that it knows is nobody's any more."""
    nics = [bottle.guest(number)[1] for number in (1, 2)]
    await up(lan, *nics)
    bottle.lan.script("ip link set wire down")
    await eventually(lambda: lan.status("tap2").state == "uplink-down")
    bottle.lan.script("ip link set wire up")
    settle()  # nothing is heard meanwhile
    lan.declare(nics[1:])
    assert lan.status("tap2").state == "up"
    assert proxies() == set(texts(nics[1]))


async def test_recreated_uplink_is_like_new_after(bottle: Bottle, lan: Lan) -> None:
    script("ip link del up0")
    before = snapshot()
    nic = bottle.guest(1, plug=False)[1]
    bottle.wire()
    lan.declare([nic])
    [fd] = lan.open_tap(nic)
    await lan.ready(nic.tap)
    script("ip link del up0")
    bottle.wire()
    await eventually(lambda: proxies() == set(texts(nic)))
    assert run("sysctl", "-n", "net.ipv6.conf.up0.accept_ra").strip() == "2"
    os.close(fd)
    await lan.withdraw(nic.tap)
    assert run("sysctl", "-n", "net.ipv6.conf.up0.accept_ra").strip() == "1"
    script("ip link del up0")
    assert not difference(before, snapshot())


async def test_second_default_route(bottle: Bottle, lan: Lan) -> None:
    """No uplink named: the entries follow the default route."""
    _guest, nic = bottle.guest(1)
    await up(lan, nic)
    script("ip link add up1 type bridge\nip link set up1 up\nip route replace default dev up1")
    await eventually(lambda: lan.status(nic.tap).uplink == "up1" and not proxies())
    script(f"ip route replace default via {ROUTER4}")
    await eventually(lambda: lan.status(nic.tap).uplink == "up0" and proxies() == set(texts(nic)))


async def test_mtu_follows(bottle: Bottle, lan: Lan, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that has the old one is told of; not a neighbour is lost meanwhile."""
    _guest, nic = bottle.guest(1)
    script("ip link set up0 mtu 9000")
    await up(lan, nic)
    assert "mtu 9000" in run("ip", "link", "show", "tap1")
    apply, neighbours = lan._kernel.apply, []

    def watched(operations: list[Operation]) -> list[Failure]:
        failures = apply(operations)
        neighbours.append(run("ip", "neigh", "show", "dev", "tap1", "nud", "permanent"))
        return failures

    monkeypatch.setattr(lan._kernel, "apply", watched)
    script("ip link set up0 mtu 1400")
    await eventually(lambda: "mtu 1400" in run("ip", "link", "show", "tap1"))
    assert all(text in each for text in texts(nic) for each in neighbours)
    assert [text.partition(" until")[0] for _tap, text, _priority in bottle.reports] == [
        "tap1: its uplink up0 has an MTU of 1400 now, the guest keeps 9000"
    ]


async def test_addresses_in_use(bottle: Bottle, lan: Lan) -> None:
    _guest, nic = bottle.guest(1)
    mac = re.findall(r"ether (\S+)", bottle.lan.run("ip", "link", "show", "wire"))[0]
    lan.declare([nic])
    await lan.check(nic)
    await lan.ready(nic.tap)
    await lan.check(nic)  # our own proxies are no conflict
    for taken in (ROUTER4, ROUTER6):
        with pytest.raises(AddressInUse, match=f"{taken} .* {mac}"):
            await lan.check(replace(nic, addresses=(*nic.addresses, ip_address(taken))))
    with pytest.raises(AddressInUse, match="up0"):
        await lan.check(replace(nic, addresses=(ip_address(HOST4),)))


async def test_conflict_later(bottle: Bottle, lan: Lan) -> None:
    """Another machine takes a guest's address while it runs: told once, and the LAN is told whose it is."""
    _guest, nic = bottle.guest(1)
    await up(lan, nic)
    [uplink] = json.loads(run("ip", "-j", "link", "show", "up0"))
    bottle.lan.script(f"ip neigh replace {texts(nic)[0]} lladdr 02:00:00:00:00:99 dev wire nud stale")
    bottle.lan.script(f"arping -c 2 -w 1 -U -S {texts(nic)[0]} -i wire {texts(nic)[0]}")
    await eventually(lambda: lan.status(nic.tap).state == "conflict")
    assert len(bottle.reports) == 1
    await eventually(lambda: uplink["address"] in bottle.lan.run("ip", "neigh", "show", texts(nic)[0]))


# Gratuitous ARP of many machines for one address, as fast as it goes for three seconds; how many.
MANY_CONFLICTS = """
import socket, sys, time
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
s.bind(("wire", 0))
address, end, count = socket.inet_aton(sys.argv[1]), time.monotonic() + 3, 0
while time.monotonic() < end:
    mac = b"\\x02\\x99" + count.to_bytes(4, "big")
    s.send(b"\\xff" * 6 + mac + bytes.fromhex("0806000108000604" "0001") + mac + address + bytes(6) + address)
    count += 1
print(count)
"""


async def test_a_flood_of_conflicts(bottle: Bottle, lan: Lan) -> None:
    """One is told of, and the daemon has time for others."""
    _one, nic = bottle.guest(1)
    await up(lan, nic)
    told, used = len(bottle.changes), time.process_time()
    flood = asyncio.create_task(asyncio.to_thread(bottle.lan.run, "python3", "-c", MANY_CONFLICTS, texts(nic)[0]))
    longest = 0.0
    while not flood.done():
        before = time.monotonic()
        await asyncio.sleep(0.01)
        longest = max(longest, time.monotonic() - before)
    assert int(flood.result()) > 20_000
    assert lan.status(nic.tap).state == "conflict"
    assert len(bottle.reports) == 1
    assert len(bottle.changes) - told == 1
    assert longest < 0.2
    assert time.process_time() - used < 1.5


# Duplicate address detection for 500 addresses of the LAN, one after the other.
MANY_QUESTIONS = """
import socket, struct
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
s.bind(("eth0", 0))
for number in range(500):
    target = bytes.fromhex("20010db8000100000000000000") + (0x990000 + number).to_bytes(3, "big")
    group = bytes.fromhex("ff0200000000000000000001ff") + target[13:]
    body = struct.pack("!BBHI", 135, 0, 0, 0) + target
    words = bytes(16) + group + struct.pack("!II", len(body), 58) + body
    total = sum(struct.unpack(f"!{len(words) // 2}H", words))
    total = (total >> 16) + (total & 0xffff)
    body = body[:2] + struct.pack("!H", ~(total + (total >> 16)) & 0xffff) + body[4:]
    head = bytes.fromhex("3333ff") + target[13:] + bytes.fromhex("525400000001" "86dd")
    s.send(head + struct.pack("!IHBB", 6 << 28, len(body), 58, 255) + bytes(16) + group + body)
"""


async def test_the_lan_is_asked_few_questions_of_a_guest(
    bottle: Bottle, lan: Lan, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, nic = bottle.guest(1)
    await up(lan, nic)
    asked: list[Address] = []
    neighbours = lan._presence._neighbours
    holders = neighbours.holders

    async def counted(wire: Wire, addresses: Iterable[Address]) -> dict[Address, str]:
        asked.extend(addresses)
        return await holders(wire, asked[-1:])

    monkeypatch.setattr(neighbours, "holders", counted)
    await asyncio.to_thread(one.run, "python3", "-c", MANY_QUESTIONS)
    await asyncio.sleep(0.5)
    assert 3 <= len(asked) <= 10


async def test_addresses_are_defended(bottle: Bottle, lan: Lan) -> None:
    """Another machine that asks first is told: ARP probe (sender 0.0.0.0), IPv6 duplicate address detection."""
    _guest, nic = bottle.guest(1)
    await up(lan, nic)
    four, six = texts(nic)
    assert "from" in await asyncio.to_thread(
        bottle.lan.run, *f"arping -0 -c 1 -w 2 -i wire {four}".split(), check=False
    )
    bottle.lan.script(f"sysctl -q net.ipv6.conf.all.accept_dad=1\nip addr add {six}/64 dev wire")
    await eventually(lambda: "dadfailed" in bottle.lan.run("ip", "-6", "addr", "show", "wire"))


async def test_announced_at_start(bottle: Bottle, lan: Lan) -> None:
    """A neighbour that knew the addresses by another MAC finds the guest at once."""
    _guest, nic = bottle.guest(1)
    for text in texts(nic):
        bottle.lan.script(f"ip neigh add {text} lladdr 52:54:00:00:00:ee dev wire nud stale")
    await up(lan, nic)
    mac = re.findall(r"ether (\S+)", run("ip", "link", "show", "up0"))[0]
    for text in texts(nic):
        assert mac in bottle.lan.run("ip", "neigh", "show", text)


async def test_errors(bottle: Bottle, lan: Lan) -> None:
    _guest, nic = bottle.guest(1, plug=False)
    with pytest.raises(StartFailed, match="no guest"):
        await lan.ready("tap9")
    lan.declare([nic])
    with pytest.raises(StartFailed, match="does not exist"):
        await lan.ready(nic.tap)
    await lan.withdraw(nic.tap)
    lan.declare([replace(nic, uplink="eth7")])
    [fd] = lan.open_tap(nic)
    with pytest.raises(Unavailable, match="eth7"):
        await lan.ready(nic.tap)
    with pytest.raises(StartFailed, match="busy"):
        lan.open_tap(nic)
    os.close(fd)
    await lan.withdraw(nic.tap)


async def test_tap_without_addresses(bottle: Bottle, lan: Lan) -> None:
    _guest, nic = bottle.guest(1)
    nic = replace(nic, addresses=())
    await up(lan, nic)
    assert not proxies()
    assert run("sysctl", "-n", "net.ipv6.conf.tap1.accept_ra").strip() == "0"


async def test_lost_events(bottle: Bottle, lan: Lan, tmp_path: Path) -> None:
    """More events than the socket holds: everything is looked at again."""
    _guest, nic = bottle.guest(1, plug=False)
    lan.declare([nic])
    lan._events._socket.setsockopt(1, 33, 4096)
    many = "\n".join(f"link add dm{number} type bridge" for number in range(40))
    (tmp_path / "batch").write_text(many)
    run("ip", "-b", str(tmp_path / "batch"))
    [fd] = lan.open_tap(nic)
    await lan.ready(nic.tap)
    await eventually(lambda: lan.status(nic.tap).state == "up")
    os.close(fd)


async def test_address_of_another_network(bottle: Bottle, lan: Lan) -> None:
    """Works if a router sends it here; a person is told."""
    _guest, nic = bottle.guest(1)
    await up(lan, replace(nic, addresses=(ip_address("203.0.113.7"),)))
    assert [sentence.partition(" ")[0] for _, sentence, _ in bottle.reports] == ["203.0.113.7"]


async def test_hostile_flood_of_solicitations(bottle: Bottle, lan: Lan) -> None:
    """One guest asks for a thousand neighbours a second: another is answered, and the loop is not held up."""
    hostile, first = bottle.guest(1)
    honest, second = bottle.guest(2)
    await up(lan, first, second)
    settle(hostile.name)
    settle(honest.name)
    flood = await asyncio.create_subprocess_exec(
        *("nsenter", f"--net=/run/netns/{hostile.name}", "python3", "-c", FLOOD), stdin=asyncio.subprocess.DEVNULL
    )
    try:
        worst = 0.0
        for _ in range(50):
            begin = asyncio.get_running_loop().time()
            await asyncio.sleep(0.01)
            worst = max(worst, asyncio.get_running_loop().time() - begin - 0.01)
        assert worst < 0.2
        assert await honest.reaches(ROUTER6)
        bottle.lan.script("ip addr add 2001:db8:1::77/64 dev wire nodad")
        assert await honest.reaches("2001:db8:1::77")
    finally:
        flood.kill()
        await flood.wait()


FLOOD = """
import itertools, socket, struct
sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
sock.bind(("eth0", 0x86dd))
mac, source = bytes.fromhex("525400000001"), socket.inet_pton(socket.AF_INET6, "2001:db8:1::33")
head = bytes.fromhex("3333ff000099") + mac + struct.pack("!HIHBB", 0x86dd, 6 << 28, 32, 58, 255) + source
for number in itertools.count():
    target = bytes.fromhex("20010db80001000000000000") + struct.pack("!I", number)
    sock.send(head + bytes.fromhex("ff0200000000000000000001ff") + target[13:] + struct.pack("!BBHI", 135, 0, 0, 0)
              + target + b"\\x01\\x01" + mac)
"""


async def test_many_at_once(bottle: Bottle, lan: Lan) -> None:
    """Whoever waits for one is not told that it does not exist because of the events of all the others."""
    _guest, nic = bottle.guest(1, plug=False)
    nics = [replace(nic, tap=f"tap{number}", addresses=(ip_address(f"192.0.2.{number}"),)) for number in range(50, 90)]
    lan.declare(nics)
    fds = [lan.open_tap(each)[0] for each in nics]
    await lan.ready(nics[-1].tap)
    assert all(lan.status(each.tap).index for each in nics)
    for fd in fds:
        os.close(fd)


async def test_a_tap_with_a_server_has_addresses_for_it(bottle: Bottle, lan: Lan) -> None:
    """Which no packet leaves with, and which nobody takes for the host's; they are put back, and go with the guest."""
    before = snapshot()
    guest, nic = bottle.guest(1, plug=False)
    nic = replace(nic, configure=True)
    bottle.plug(guest, nic)
    lan.declare([nic])
    await lan.ready(nic.tap)
    settle(guest.name)

    def present() -> bool:
        text = run("ip", "-d", "addr", "show", nic.tap)
        return bool(re.search(r"171.171/32 scope host .*2001:db8:1::/64 scope global .*deprecated", text, re.DOTALL))

    assert present()
    assert "2001:db8:1::/64" not in run("ip", "-6", "route", "show", "dev", nic.tap)
    assert HOST4 in run("ip", "route", "get", str(nic.addresses[0]))
    assert HOST6 in run("ip", "route", "get", str(nic.addresses[1]))
    assert await bottle.lan.reaches(*map(str, nic.addresses))
    terms = lan.status(nic.tap).terms
    assert terms is not None
    assert str(terms.router) == ROUTER4
    script(f"ip addr del 169.254.171.171/32 dev {nic.tap}\nip addr del 2001:db8:1::/64 dev {nic.tap}")
    await eventually(present)
    script("ip route replace default via 192.0.2.7\nip link set up0 mtu 1400")
    await eventually(lambda: (now := bottle.changes[-1].terms) and (str(now.router), now.mtu) == ("192.0.2.7", 1400))
    script(f"ip link set up0 mtu 1500\nip route replace default via {ROUTER4}")
    await lan.withdraw(nic.tap)
    await eventually(lambda: "169.254" not in run("ip", "addr"))
    bottle.unplug(nic)
    await eventually(lambda: lan.status(nic.tap).state == "absent")
    assert not difference(before, snapshot())
