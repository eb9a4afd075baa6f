"""Others that play a guest: packets from its addresses, by the LAN or another tap, to the host and to other guests."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from ipaddress import ip_address, ip_network

import pytest

from kvmd.guest import Nic
from kvmd.network.firewalls import firewall
from kvmd.network.lan import Lan
from kvmd.network.model.plan import TAP_MAC

from .conftest import HOST4, HOST6, ROUTER4, ROUTER6, Bottle, Space, host_reaches, run, script, settle
from .test_lan import texts, up

# From an address that is not its own (IP_TRANSPARENT, IPV6_TRANSPARENT), and then from one that is.
FORGE = """
import socket, sys
for word, source in (("forged", sys.argv[1]), ("genuine", sys.argv[2])):
    family, level, option = (socket.AF_INET6, 41, 75) if ":" in source else (socket.AF_INET, 0, 19)
    s = socket.socket(family, socket.SOCK_DGRAM)
    s.setsockopt(level, option, 1)
    s.bind((source, 0))
    s.sendto(word.encode(), (sys.argv[3], 9999))
"""
HEAR = """
import socket
s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
s.bind(("::", 9999))
print("listening", flush=True)
while True:
    print(s.recv(100).decode(), flush=True)
"""
BEHIND = ("198.51.100.3", "2001:db8:9::3")
PREFIXES = (ip_network("198.51.100.0/28"), ip_network("2001:db8:9::/64"))


@contextlib.contextmanager
def ear(space: str) -> Iterator[Iterator[str]]:
    """Lines that come to UDP port 9999 of a namespace."""
    argv = ["nsenter", f"--net=/run/netns/{space}", "python3", "-c", HEAR]
    with subprocess.Popen(argv, text=True, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert next(process.stdout) == "listening\n"
        try:
            yield process.stdout
        finally:
            process.kill()


@dataclass
class Pretender:
    """A machine at an interface of the host's, whose own addresses are ``own``."""

    bottle: Bottle
    space: Space
    interface: str
    mac: str
    own: tuple[str, str]

    def reaches(self, target: str, source: str, there: Space | None = None) -> bool:
        """Whether ``target``, at the host or ``there``, hears what is said in the name of ``source``."""
        self.space.script(f"ip neigh replace {target} lladdr {self.mac} dev {self.interface} nud permanent")
        with ear(there.name if there else f"{self.bottle.prefix}-host") as lines:
            self.space.run("python3", "-c", FORGE, source, self.own[":" in source], target)
            return next(lines) == "forged\n"


def on_the_lan(bottle: Bottle, uplink: str = "up0", far: str = "wire") -> Pretender:
    [link] = json.loads(run("ip", "-j", "link", "show", uplink))
    return Pretender(bottle, bottle.lan, far, link["address"], (ROUTER4, ROUTER6))


def at_a_tap(bottle: Bottle) -> tuple[Pretender, Nic]:
    """A guest without addresses, let into the world by the administrator."""
    space, nic = bottle.guest(3)
    script("""
        ip link set tap3 up
        sysctl -q net.ipv4.conf.tap3.forwarding=1
        ip route add 192.0.2.53 dev tap3
        ip route add 2001:db8:1::53 dev tap3
    """)
    return Pretender(bottle, space, "eth0", TAP_MAC, ("192.0.2.53", "2001:db8:1::53")), replace(nic, addresses=())


def dropped() -> int:
    """How many packets."""
    listing = json.loads(run("nft", "-j", "list", "chain", "inet", "kvmd", "pretender"))["nftables"]
    expressions = [each for item in listing for each in item.get("rule", {}).get("expr", [])]
    [packets] = [each["counter"]["packets"] for each in expressions if "counter" in each]
    return int(packets)


@pytest.mark.parametrize("six", [False, True], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("whence", ["LAN", "tap"])
async def test_nobody_plays_a_guest(bottle: Bottle, lan: Lan, whence: str, six: bool) -> None:
    _one, first = bottle.guest(1)
    two, second = bottle.guest(2)
    pretender, third = at_a_tap(bottle)
    first = replace(first, routes=PREFIXES)
    await up(lan, first, second, third)
    settle()
    if whence == "LAN":
        pretender = on_the_lan(bottle)
    filtered = whence == "tap" and not six  # by rp_filter of the tap, before anybody counts
    for count, source in enumerate((texts(first)[six], BEHIND[six])):
        assert dropped() == (0 if filtered else 2 * count)
        assert not pretender.reaches((HOST4, HOST6)[six], source)
        assert not pretender.reaches(texts(second)[six], source, two)
    await lan.withdraw(first.tap)
    lan.declare([second, third])
    assert filtered or pretender.reaches(texts(second)[six], texts(first)[six], two)  # nobody's any more


@pytest.mark.parametrize("six", [False, True], ids=["IPv4", "IPv6"])
async def test_what_comes_back_by_a_second_uplink(bottle: Bottle, lan: Lan, six: bool) -> None:
    """It reaches the guest itself, and nobody else."""
    one, first = bottle.guest(1)
    two, second = bottle.guest(2)
    script(f"""
        ip link add up1 type veth peer name wire1 netns {bottle.lan.name}
        ip link set up1 up
        ip addr add 203.0.113.10/24 dev up1
        ip addr add 2001:db8:2::10/64 dev up1 nodad
        ip link add tap4 type veth peer name eth1 netns {one.name} address 52:54:00:00:00:04
    """)
    bottle.lan.script("""
        ip link set wire1 up
        ip addr add 203.0.113.1/24 dev wire1
        ip addr add 2001:db8:2::1/64 dev wire1 nodad
    """)
    one.script("""
        ip link set eth1 up
        ip addr add 203.0.113.54/24 dev eth1
        ip addr add 2001:db8:2::54/64 dev eth1 nodad
        sysctl -q net.ipv4.conf.all.accept_local=1
    """)
    other = Nic("tap4", "52:54:00:00:00:04", "up1", (ip_address("203.0.113.54"), ip_address("2001:db8:2::54")))
    first = replace(first, routes=PREFIXES, kin=other.addresses)
    other = replace(other, kin=(*first.addresses, *PREFIXES))
    await up(lan, first, second, other)
    settle()
    settle(one.name)
    pretender = on_the_lan(bottle, "up1", "wire1")
    for source in (texts(first)[six], BEHIND[six]):
        assert pretender.reaches(texts(other)[six], source, one)
    assert not dropped()
    bottle.lan.script(f"""
        ip route add {(HOST4, HOST6)[six]} dev wire1
        ip route add {texts(second)[six]} dev wire1
    """)
    for source in (texts(first)[six], texts(other)[six]):
        assert not pretender.reaches((HOST4, HOST6)[six], source)
        assert not pretender.reaches(texts(second)[six], source, two)
    assert dropped() == 4


async def test_the_lan_within_a_guests_prefix(bottle: Bottle, lan: Lan) -> None:
    """A guest that leads to a wide network: whom the host knows nearer is no pretender."""
    one, first = bottle.guest(1)
    two, second = bottle.guest(2)
    await up(lan, replace(first, routes=(ip_network("192.0.0.0/8"), ip_network("2001:db8::/32"))), second)
    settle()
    assert await bottle.lan.reaches(HOST4, HOST6, *texts(first), *texts(second))
    assert await two.reaches(ROUTER4, ROUTER6, *texts(first))
    assert await one.reaches(ROUTER4, ROUTER6, HOST4, HOST6)
    assert await host_reaches(ROUTER4, ROUTER6, *texts(first), *texts(second))
    assert not dropped()


async def test_what_two_guests_have_stays_until_the_last_has_gone(bottle: Bottle) -> None:
    """As when the file of one that runs was changed, and another one is started with what was in it."""
    _guest, nic = bottle.guest(1)
    wide, narrow = ip_network("203.0.113.0/24"), ip_network("203.0.113.128/28")
    nics = [replace(nic, routes=(wide,)), replace(nic, tap="tap2", routes=(narrow, wide)), replace(nic, tap="tap3")]
    nics[2] = replace(nics[2], routes=(narrow,), addresses=(ip_address("192.0.2.53"),))
    wall = firewall.Firewall(lambda: None)
    try:
        for present, taken, routed in (
            ((0, 1), "192.0.2.51", "203.0.113.0/24"),
            ((0, 1, 2), "192.0.2.51, 192.0.2.53", "203.0.113.0/24"),
            ((1, 2), "192.0.2.51, 192.0.2.53", "203.0.113.0/24"),
            ((2,), "192.0.2.53", "203.0.113.128/28"),
            ((0, 2), "192.0.2.51, 192.0.2.53", "203.0.113.0/24"),
            ((0,), "192.0.2.51", "203.0.113.0/24"),
        ):
            assert not wall.apply([nics[number] for number in present], frozenset())
            for name, wanted in (("taken4", taken), ("routed4", routed)):
                text = run("nft", "list", "set", "inet", "kvmd", name)
                assert " ".join(text.split()).partition("elements = { ")[2].rstrip(" }") == wanted
    finally:
        wall.apply([], frozenset())
        wall.close()
