"""A rented host: a /32, a gateway on the link that hears nothing but what is sent to it, a switch that takes one MAC.

Its guests have more addresses of the provider's: of the host's subnet, of another one, of a prefix on the link, of a
prefix that is routed to the host.
"""

from __future__ import annotations

import difflib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import lab
import pytest

from .guests import RELEASES, Guests

INTERNET = lab.lan.RENTED_INTERNET
GATEWAY = ("198.51.100.1", "fe80::1%eth0")
MAC = "02:00:00:00:00:10"
HOST = ("198.51.100.10", "2001:db8:5:6::2")


@pytest.fixture(scope="module", params=RELEASES)
def host(deb: Path, request: pytest.FixtureRequest) -> Iterator[lab.Host]:
    with lab.Host(request.param, deb, name=f"rented-{request.param}") as host:
        host.make_lan(rented=True)
        host.write("/etc/resolv.conf", "nameserver 192.0.2.1\n")
        host.copy_in(lab.guests.initrd(request.param, tools="trixie"), "/var/lib/kvmd/images/asks.img")
        host.copy_in(lab.guests.clients_initrd(request.param), "/var/lib/kvmd/images/clients.img")
        yield host


@pytest.fixture
def guests(host: lab.Host) -> Iterator[Guests]:
    guests, before = Guests(host), host.state()
    yield guests
    guests.clear()
    changed = list(difflib.unified_diff(before, host.state(), n=0, lineterm=""))
    assert not changed, "\n".join(changed)


def network(*addresses: str, more: str = "configure = true\n") -> str:
    return f"[[network]]\naddress = {list(addresses)}\n{more}"


def ping(guests: Guests, name: str, *addresses: str) -> None:
    for address in addresses:
        assert guests.type(name, f"ping {address}", "^guest: ping")["MESSAGE"] == f"guest: ping {address} ok"


@pytest.mark.parametrize(
    ("four", "told"),
    [("198.51.100.20", "198.51.100.20/27 router=198.51.100.1"), ("203.0.113.7", "203.0.113.7/28 router=203.0.113.1")],
)
def test_a_guest_that_asks(guests: Guests, four: str, told: str) -> None:
    six = "2001:db8:5:6::42"
    guests.linux("asks", cmdline="kvmd.dhcp=1 kvmd.dhcp6=1", extra=network(four, six), initrd="asks.img")
    guests.linux("two", cmdline="kvmd.dhcp=1", extra=network("198.51.100.30"), initrd="asks.img")
    since = guests.host.cursor()
    guests.start("asks", "two")
    assert told in guests.wait("asks", "^guest: DHCP bound [0-9.]+/", since)["MESSAGE"]
    ping(guests, "asks", *INTERNET, GATEWAY[0], *HOST, "198.51.100.30")
    ping(guests, "two", INTERNET[0], four)
    for address in (four, six, "198.51.100.30"):
        guests.host.lan.router.ping(address)
        guests.host.run("ping", "-n", "-c", "1", "-W", "3", address)
    assert not [entry for entry in guests.host.journal("KVMD_GUEST=asks") if "only routers" in entry["MESSAGE"]]


def test_a_guest_that_is_configured_inside(guests: Guests) -> None:
    """With what the manual says; and a prefix that is routed to the host."""
    prefix = 'route = ["2001:db8:77:1::/64"]\n'
    guests.linux("static", extra=network("198.51.100.21", "2001:db8:5:6::43", more=prefix))
    guests.start("static")
    for line in (
        "ip addr add 198.51.100.21/32 dev eth0",
        "ip route add 198.51.100.1 dev eth0",
        "ip route add default via 198.51.100.1",
        "ip addr add 2001:db8:5:6::43/128 dev eth0",
        "ip -6 route add fe80::1 dev eth0",
        "ip -6 route add default via fe80::1 dev eth0",
        "ip addr add 2001:db8:77:1::1/64 dev lo",
    ):
        assert guests.type("static", f"sh {line} && echo done", "^done|^ip:")["MESSAGE"] == "done"
    ping(guests, "static", *INTERNET, GATEWAY[0], *HOST)
    for address in ("198.51.100.21", "2001:db8:5:6::43", "2001:db8:77:1::1"):
        guests.host.lan.router.ping(address)


def test_only_the_hosts_mac_is_on_the_wire(guests: Guests) -> None:
    """The switch would drop another, and the provider lock the port."""
    words = ("tcpdump", "-Z", "root", "-i", "eth0", "-Q", "out", "-e", "-n", "-l", "not", "ether", "src", MAC)
    capture = guests.host.popen(*words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert capture.stderr
    assert capture.stdout
    while "listening on" not in (line := capture.stderr.readline()):
        assert line
    guests.linux(
        "asks",
        cmdline="kvmd.dhcp=1 kvmd.dhcp6=1",
        extra=network("198.51.100.20", "2001:db8:5:6::42"),
        initrd="asks.img",
    )
    guests.start("asks")
    ping(guests, "asks", *INTERNET)
    guests.guest_off("asks")
    capture.terminate()
    assert capture.stdout.read().strip() == ""
    capture.wait()


CLIENTS = {
    "dhclient": "PATH=/bin:/sbin /usr/sbin/dhclient -1 -q -sf /sbin/dhclient-script eth0",
    "networkd": "mount -o remount,ro /sys; /usr/lib/systemd/systemd-networkd",
}


@pytest.mark.parametrize("client", CLIENTS)
def test_other_dhcp_clients(guests: Guests, client: str) -> None:
    four = "203.0.113.7"
    guests.linux("asks", top='memory = "256M"', extra=network(four, "2001:db8:5:6::42"), initrd="clients.img")
    guests.write("asks", guests.host.read("/etc/kvmd/asks.toml").replace('memory = "128M"\n', "", 1))
    guests.start("asks")
    guests.type("asks", f"sh ({CLIENTS[client]}) & echo asking", "^asking")
    wait = "until ip route | grep default; do usleep 50000; done; ip addr show dev eth0 | grep 'inet '"
    assert four in guests.type("asks", f"sh {wait}", "^ *inet ")["MESSAGE"]
    ping(guests, "asks", INTERNET[0], GATEWAY[0], HOST[0])
    guests.host.lan.router.ping(four)
    if client == "networkd":
        settled = "ip -6 route | grep -q default && ip -6 addr | grep '::42/' | grep -qv tentative"
        guests.type("asks", f"sh until {settled}; do usleep 50000; done; echo six", "^six")
        ping(guests, "asks", INTERNET[1])
