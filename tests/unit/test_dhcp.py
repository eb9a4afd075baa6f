"""What a guest with ``configure`` is told, and the dnsmasq that tells it."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_interface, ip_network

import pytest

from kvmd.guest import Nic
from kvmd.network.model.dhcp import Terms, configuration, properties, resolvers, terms, unit
from kvmd.network.model.host import Host, HostRoute, Link
from kvmd.network.model.plan import interfaces, wanted
from kvmd.network.model.things import TapAddress

UPLINK = Link(2, "eth0", "02:00:00:00:00:02", 1400, up=True, carrier=True)
TAP = Link(7, "kv-snape", transient=True)
NIC = Nic(
    "kv-snape",
    "52:54:00:00:00:01",
    addresses=tuple(map(ip_address, ("192.0.2.42", "2001:db8:1::42", "192.0.2.43", "2001:db8:1::43", "2001:db8:7::1"))),
    configure=True,
)
HOST = Host(
    links={2: UPLINK, 7: TAP},
    addresses={2: tuple(map(ip_interface, ("192.0.2.10/23", "2001:db8:1::10/64", "fe80::2/64")))},
    routes=(
        HostRoute(ip_network("0.0.0.0/0"), 2, ip_address("192.0.2.254"), 200),
        HostRoute(ip_network("0.0.0.0/0"), 2, ip_address("192.0.2.1"), 100),
        HostRoute(ip_network("0.0.0.0/0"), 3, ip_address("203.0.113.1"), 0),
        HostRoute(ip_network("192.0.2.0/23"), 2),
        HostRoute(ip_network("::/0"), 2, ip_address("fe80::1"), 1024),
        HostRoute(ip_network("2001:db8:1::/64"), 2, None, 256),
    ),
)
TERMS = Terms(
    "kv-snape",
    "52:54:00:00:00:01",
    1400,
    tuple(map(ip_interface, ("192.0.2.42/23", "2001:db8:1::42/64", "2001:db8:7::1/64"))),
    ip_address("192.0.2.1"),
    default6=True,
)
SERVERS = tuple(map(ip_address, ("192.0.2.1", "2001:db8:1::1", "198.51.100.1", "2001:db8:ffff::1")))
GOLDEN = """\
port=0
no-hosts
no-resolv
bind-interfaces
except-interface=lo
leasefile-ro
pid-file
no-ping
quiet-dhcp
quiet-dhcp6
quiet-ra
dhcp-authoritative
dhcp-broadcast
dhcp-duid=32473,6b:76:6d:64
interface=kv-snape
dhcp-host=52:54:00:00:00:01,192.0.2.42,[2001:db8:1::42],[2001:db8:7::1]
shared-network=kv-snape,192.0.2.42
dhcp-range=192.0.2.42,static,255.255.254.0,10m
dhcp-option=option:router,192.0.2.1
dhcp-option=option:dns-server,192.0.2.1,198.51.100.1
dhcp-option=option:mtu,1400
enable-ra
ra-param=kv-snape,mtu:1400,60,1800
dhcp-option=option6:dns-server,[2001:db8:1::1],[2001:db8:ffff::1]
dhcp-range=2001:db8:1::,static,off-link,64,2m
dhcp-range=2001:db8:7::,static,off-link,64,2m
"""


def test_terms_are_those_of_the_lan() -> None:
    """Real prefix length, the gateway of the preferred default route by this uplink; one address of each prefix."""
    assert terms(NIC, UPLINK, HOST) == TERMS


def test_nothing_is_told_that_is_not_known() -> None:
    """At boot the uplink may still wait for its own address; when it is down the host forgets its routes."""
    assert terms(NIC, replace(UPLINK, up=False), HOST) is None
    assert terms(NIC, replace(UPLINK, carrier=False), HOST) is None
    bare = replace(HOST, addresses={2: (ip_interface("fe80::2/64"),)}, routes=())
    assert terms(NIC, UPLINK, bare) is None
    four = terms(NIC, UPLINK, replace(bare, addresses={2: (ip_interface("192.0.2.10/24"),)}))
    assert four == Terms("kv-snape", "52:54:00:00:00:01", 1400, (ip_interface("192.0.2.42/24"),))


@pytest.mark.parametrize(
    ("address", "gateway", "told", "router"),
    [
        ("198.51.100.20", "198.51.100.1", "198.51.100.20/27", "198.51.100.1"),
        ("198.51.100.20", "198.51.0.1", "198.51.100.20/17", "198.51.0.1"),
        ("203.0.113.7", "198.51.100.1", "203.0.113.7/28", "203.0.113.1"),  # .7 ends the /29 and the /30
        ("203.0.113.1", "198.51.100.1", "203.0.113.1/30", "203.0.113.2"),
        ("198.51.100.2", "198.51.100.3", "198.51.100.2/29", "198.51.100.3"),
        ("198.51.100.21", "fe80::1", "198.51.100.21/30", "198.51.100.22"),  # RFC 5549
        ("198.51.100.22", None, "198.51.100.22/30", "198.51.100.21"),
    ],
)
def test_a_gateway_that_every_client_can_use(address: str, gateway: str | None, told: str, router: str) -> None:
    """On a rented host, which has a /32 and a gateway on the link."""
    via = ip_address(gateway) if gateway else None
    default = HostRoute(ip_network("0.0.0.0/0"), 2, via)
    rented = Host({2: UPLINK}, {2: (ip_interface("198.51.100.10/32"),)}, (default,))
    found = terms(replace(NIC, addresses=(ip_address(address),)), UPLINK, rented)
    assert found
    assert (str(found.interfaces[0]), str(found.router)) == (told, router)


def test_a_gateway_elsewhere_and_a_prefix_of_ones_own() -> None:
    default = HostRoute(ip_network("0.0.0.0/0"), 2, ip_address("198.51.100.1"))
    host = replace(HOST, routes=(default, HostRoute(ip_network("192.0.2.0/23"), 2)))
    found = terms(replace(NIC, addresses=(ip_address("192.0.2.42"),)), UPLINK, host)
    assert found
    assert (str(found.interfaces[0]), str(found.router)) == ("192.0.2.42/23", "192.0.2.1")


def test_configuration() -> None:
    assert configuration(TERMS, SERVERS) == GOLDEN


def test_without_a_router_neighbours_are_asked_for() -> None:
    alone = replace(HOST, routes=tuple(route for route in HOST.routes if route.prefix.prefixlen))
    found = terms(NIC, UPLINK, alone)
    assert found
    text = configuration(found, ())
    assert "dhcp-option=option:router\n" in text
    assert "dhcp-option=option:dns-server\n" in text
    assert "ra-param=kv-snape,mtu:1400,60,0\n" in text
    assert "dhcp-range=2001:db8:1::,static,64,2m\n" in text


def test_one_family() -> None:
    four = configuration(replace(TERMS, interfaces=TERMS.interfaces[:1]), SERVERS)
    assert "ra" not in {line.partition("-")[0] for line in four.splitlines()}
    assert "enable-ra" not in four
    six = configuration(replace(TERMS, interfaces=TERMS.interfaces[1:]), SERVERS)
    assert "shared-network" not in six
    assert "option:router" not in six


def test_prefix_lengths() -> None:
    """A stranger to the LAN is alone; dnsmasq knows no prefix shorter than /64."""
    host = replace(HOST, addresses={}, routes=(HostRoute(ip_network("2001:db8::/32"), 2),))
    assert [str(interface) for interface in interfaces(NIC, UPLINK, host)] == [
        *("192.0.2.42/32", "2001:db8:1::42/64", "2001:db8:7::1/64")
    ]
    longer = replace(HOST, routes=(*HOST.routes, HostRoute(ip_network("2001:db8:1::/120"), 2)))
    assert ip_interface("2001:db8:1::42/120") in interfaces(NIC, UPLINK, longer)


def test_the_tap_has_addresses_only_where_a_server_needs_them() -> None:
    found = [thing.interface for thing in wanted(NIC, TAP, UPLINK, HOST) if isinstance(thing, TapAddress)]
    assert list(map(str, found)) == ["169.254.171.171/32", "2001:db8:1::/64", "2001:db8:7::/64"]
    assert found == [thing.interface for thing in wanted(NIC, TAP, None, HOST) if isinstance(thing, TapAddress)]
    static = wanted(replace(NIC, configure=False), TAP, UPLINK, HOST)
    assert not [thing for thing in static if isinstance(thing, TapAddress)]


def test_resolvers_are_those_a_guest_can_reach() -> None:
    text = """
        # nameserver 192.0.2.99
        nameserver 127.0.0.53
        nameserver 192.0.2.1
        search example.org
        nameserver fe80::1%eth0
        nameserver ::1
        nameserver
        nameserver nonsense
        nameserver 2001:db8:1::1   trailing
    """
    assert resolvers(text) == [ip_address("192.0.2.1"), ip_address("2001:db8:1::1")]


def test_resolvers_are_few() -> None:
    text = "".join(f"nameserver 192.0.2.{number}\n" for number in range(1, 101))
    assert resolvers(text) == [ip_address(f"192.0.2.{number}") for number in range(1, 9)]


def test_unit_goes_with_the_guest_and_is_not_root() -> None:
    assert unit("kv-snape") == "kvmd-dhcp-kv-snape.service"
    given = {name: value for name, _signature, value in properties("kv-snape", "snape", "kvmd-snape.scope", GOLDEN)}
    assert given["BindsTo"] == given["After"] == ["kvmd-snape.scope"]
    assert given["StandardInputData"] == GOLDEN.encode()
    assert given["Restart"] == "always"
    assert given["DynamicUser"] is True
    assert given["CapabilityBoundingSet"] == 0x3400
