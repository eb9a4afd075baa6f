"""A hostile guest: whatever it claims to be, the LAN hears nothing of it."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from kvmd.errors import StartFailed
from kvmd.network.firewalls import firewall
from kvmd.network.lan import Lan

from .conftest import ROUTER4, ROUTER6, Bottle, eventually, ruleset, run, settle

SEND = """
import socket
s = socket.socket(socket.AF_INET6 if ":" in "{source}" else socket.AF_INET, socket.SOCK_DGRAM)
s.bind(("{source}", {port}))
s.sendto(b"forged", ("{to}", 9999))
"""
OWN, FORGED, FAR = ("192.0.2.51", "2001:db8:1::33"), ("192.0.2.66", "2001:db8:1::66"), ("8.8.4.4", "2001:db8:8::8")
SAME = "52:54:00:00:00:01"


@pytest.mark.parametrize(
    ("sources", "mac", "port", "heard"),
    [
        (OWN, SAME, 5000, True),
        (FORGED, SAME, 5000, False),
        (FAR, SAME, 5000, False),
        (OWN, "52:54:00:66:66:66", 5000, False),
        (OWN, SAME, 67, False),
        (OWN, SAME, 547, False),
    ],
    ids=["honest", "neighbour's address", "far address", "other MAC", "DHCP server", "DHCPv6 server"],
)
@pytest.mark.parametrize("six", [0, 1])
async def test_forged(
    bottle: Bottle, lan: Lan, sources: tuple[str, str], mac: str, port: int, heard: bool, six: int
) -> None:
    guest, nic = bottle.guest(1)
    nic = replace(nic, addresses=tuple(map(ip_address, OWN)))
    guest.script(f"ip addr add {OWN[1]}/64 dev eth0 nodad")
    lan.declare([nic])
    await lan.ready(nic.tap)
    settle(guest.name)
    source, router = sources[six], (ROUTER4, ROUTER6)[six]
    assert await guest.reaches(router)
    if source != OWN[six]:
        guest.script(f"ip addr add {source}/{(24, 64)[six]} dev eth0 {('', 'nodad')[six]}")
    if mac != SAME:
        neighbour = guest.run("ip", "neigh", "show", router).split()
        guest.script(f"ip link set eth0 address {mac}")
        guest.script(f"ip neigh replace {router} lladdr {neighbour[4]} dev eth0 nud permanent")
    listener = await asyncio.create_subprocess_exec(
        *("nsenter", f"--net=/run/netns/{bottle.lan.name}", "timeout", "1"),
        *("tcpdump", "-l", "-n", "-i", "wire", "-c", "1", "udp and port 9999"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert listener.stderr is not None
    while b"listening" not in await listener.stderr.readline():
        pass
    guest.run("python3", "-c", SEND.format(source=source, port=port, to=router))
    output, _ = await listener.communicate()
    assert (b"9999" in output) == heard, output


async def test_delegated_prefixes_are_its_own(bottle: Bottle, lan: Lan) -> None:
    """Also one that holds the guest's address."""
    _guest, nic = bottle.guest(1)
    lan.declare([replace(nic, routes=(ip_network("2001:db8:1::/64"), ip_network("198.51.100.0/28")))])
    await lan.ready(nic.tap)
    rules = run("nft", "list", "table", "inet", "kvmd")
    assert "198.51.100.0/28" in rules
    assert "2001:db8:1::/64" in rules


async def test_others_rules_stay(bottle: Bottle, lan: Lan) -> None:
    _one, first = bottle.guest(1)
    _two, second = bottle.guest(2)
    run("nft", "add", "table", "inet", "filter")
    before = run("nft", "list", "ruleset")
    lan.declare([first, second])
    await lan.withdraw(first.tap)
    assert first.mac not in run("nft", "list", "ruleset")
    assert second.mac in run("nft", "list", "ruleset")
    await lan.withdraw(second.tap)
    assert run("nft", "list", "ruleset") == before


@pytest.mark.parametrize("damage", ["flush ruleset", "flush table inet kvmd", "flush set inet kvmd macs"])
async def test_heals(bottle: Bottle, lan: Lan, damage: str) -> None:
    """Also what only one of two guests needs."""
    _one, first = bottle.guest(1)
    _two, second = bottle.guest(2)
    lan.declare([first, second])
    before = ruleset()
    run("nft", *damage.split())
    await eventually(lambda: sorted(ruleset()) == sorted(before))
    assert first.mac in before
    assert second.mac in before


async def test_refusal_is_told(bottle: Bottle, lan: Lan, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that could forge addresses does not start."""
    _guest, nic = bottle.guest(1)
    monkeypatch.setattr(firewall, "_TABLE", "nonsense\n")
    lan.declare([nic])
    with pytest.raises(StartFailed, match="nftables refused"):
        await lan.ready(nic.tap)
    monkeypatch.undo()
    await lan.ready(nic.tap)


async def test_our_own_changes_are_nobody_elses_though_there_are_too_many(bottle: Bottle) -> None:
    """The socket of changes overflows: what is left in it is ours, too."""
    lost = asyncio.Event()
    wall = firewall.Firewall(lost.set)
    try:
        wall._changes._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)  # the least there is
        _guest, nic = bottle.guest(1)
        many = replace(nic, addresses=tuple(ip_address("203.0.113.0") + number for number in range(250)))
        for nics in ([many], [nic], []):
            assert not wall.apply(nics, frozenset())
            for _round in range(3):
                await asyncio.sleep(0)
            assert not lost.is_set()
        assert not wall.apply([many], frozenset())
        run("nft", "delete", "table", "inet", "kvmd")
        async with asyncio.timeout(5):
            await lost.wait()
    finally:
        wall.close()


async def test_removed_in_the_very_moment_it_is_made(bottle: Bottle, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the time we look at what we have done, somebody has undone it; or just before we add to it."""
    lost = asyncio.Event()
    wall = firewall.Firewall(lost.set)
    nics = [bottle.guest(number)[1] for number in (1, 2)]
    make = wall._nft.run

    def undone(text: str) -> str:
        error = make(text)
        run("nft", "delete", "table", "inet", "kvmd")
        return error

    try:
        monkeypatch.setattr(wall._nft, "run", undone)
        assert not wall.apply(nics[:1], frozenset())
        assert lost.is_set()
        monkeypatch.setattr(wall._nft, "run", make)
        assert not wall.apply(nics[:1], frozenset())
        assert wall.restored
        run("nft", "delete", "table", "inet", "kvmd")
        assert not wall.apply(nics, frozenset())
        assert wall.restored
        assert all(nic.mac in run("nft", "list", "table", "inet", "kvmd") for nic in nics)
        assert not wall.apply([], frozenset())
    finally:
        wall.close()
