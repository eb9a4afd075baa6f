"""What is wanted of the kernel, and what is done about the difference: without root, without a kernel."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv6Address, ip_address, ip_interface, ip_network

import pytest

from kvmd.guest import Nic
from kvmd.network.model.host import Host, HostRoute, Link
from kvmd.network.model.nicstatus import NOTICE, WARNING, assess, news
from kvmd.network.model.plan import METRIC, TAP_MAC, mended, plan, wanted
from kvmd.network.model.things import ALL, Failure, LinkState, Neighbour, Operation, Proxy, Route, Setting, diff
from kvmd.network.wire.vicinity import Verdict, own_addresses, vicinity

UPLINK = Link(2, "eth0", "02:00:00:00:00:02", 9000, up=True, carrier=True)
DOCKER = Link(1, "docker0", "02:00:00:00:00:01", 1500, up=True, carrier=True)
TAP = Link(7, "kv-snape", "9a:00:00:00:00:07", 1500, transient=True)
NIC = Nic(
    "kv-snape",
    "52:54:00:00:00:01",
    None,
    (ip_address("192.0.2.42"), ip_address("2001:db8:1::42")),
    (ip_network("2001:db8:30::/64"), ip_network("198.51.100.0/28")),
)
HOST = Host(
    links={link.index: link for link in (DOCKER, UPLINK, TAP)},
    addresses={
        1: (ip_interface("172.17.0.1/16"),),
        2: tuple(
            map(
                ip_interface, ("203.0.113.9/24", "192.0.2.10/24", "fe80::2/64", "2001:db8:9::1/64", "2001:db8:1::10/64")
            )
        ),
    },
    routes=(
        HostRoute(ip_network("0.0.0.0/0"), 2, ip_address("192.0.2.1"), 100),
        HostRoute(ip_network("192.0.2.0/24"), 2),
        HostRoute(ip_network("::/0"), 2, ip_address("fe80::1"), 1024),
        HostRoute(ip_network("2001:db8:1::/64"), 2, None, 256),
    ),
    learners=(1, 2),
)


def everything() -> list[object]:
    return list(wanted(NIC, TAP, UPLINK, HOST))


def place(kind: type, **fields: object) -> int:
    """Where in the order of application the first such thing stands."""
    for index, thing in enumerate(everything()):
        if isinstance(thing, kind) and all(getattr(thing, name) == value for name, value in fields.items()):
            return index
    raise AssertionError(f"no {kind.__name__} {fields}")


def test_order_of_application() -> None:
    """Each of these orders is a bug of somebody's, see the comments in ``network``."""
    learning = max(place(Setting, name="accept_ra", device=index, value=2) for index in HOST.learners)
    forwarding = place(Setting, table="ipv6/conf", device=ALL, name="forwarding", value=1)
    guard = place(Setting, device=TAP.index, name="accept_ra", value=0)
    up = place(LinkState, up=True)
    route = place(Route, prefix=ip_network("192.0.2.42/32"))
    proxy_arp = place(Setting, name="proxy_arp", value=1)
    answers = place(Proxy, device=UPLINK.index)
    assert learning < forwarding < guard < up < route < proxy_arp < answers
    assert place(Setting, device=TAP.index, table="ipv4/neigh", name="proxy_delay", value=0) < proxy_arp
    assert all(isinstance(thing, Proxy) for thing in everything()[answers:])


def test_uplink_never_answers_for_everything() -> None:
    assert not [
        thing
        for thing in everything()
        if isinstance(thing, Setting) and thing.device == UPLINK.index and thing.name in ("proxy_arp", "rp_filter")
    ]


def test_routes_name_the_uplinks_address_in_the_guests_prefix() -> None:
    four, six = NIC.addresses
    routes = {thing for thing in everything() if isinstance(thing, Route)}
    own4, own6 = ip_address("192.0.2.10"), ip_address("2001:db8:1::10")
    assert routes == {
        Route(7, ip_network("192.0.2.42/32"), None, own4),
        Route(7, ip_network("192.0.2.42/32"), None, None, METRIC),
        Route(7, ip_network("2001:db8:1::42/128"), None, own6, METRIC),
        Route(7, ip_network("198.51.100.0/28"), four, own4),
        Route(7, ip_network("198.51.100.0/28"), four, None, METRIC),
        Route(7, ip_network("2001:db8:30::/64"), six, own6, METRIC),
    }


def test_tap_is_a_mirror_of_the_uplink() -> None:
    things = everything()
    assert LinkState(7, TAP_MAC, 9000, True) in things
    assert Neighbour(7, NIC.addresses[0], NIC.mac) in things
    assert Proxy(7, IPv6Address("fe80::1"), router=True) in things


def test_without_uplink_nothing_claims_an_address() -> None:
    things = wanted(NIC, TAP, None, HOST)
    assert not [thing for thing in things if isinstance(thing, Proxy)]
    assert LinkState(7, TAP_MAC, 1500, True) in things
    assert [thing for thing in things if isinstance(thing, Route)]
    down = replace(UPLINK, up=False)
    assert not [thing for thing in wanted(NIC, TAP, down, HOST) if isinstance(thing, Proxy) and thing.device == 2]


def test_four_only_guest_leaves_six_alone() -> None:
    things = wanted(replace(NIC, addresses=NIC.addresses[:1], routes=()), TAP, UPLINK, HOST)
    six = [thing for thing in things if isinstance(thing, Setting) and thing.table.startswith("ipv6")]
    assert six == [Setting("ipv6/conf", 7, "disable_ipv6", 1)]


def test_uplink_is_the_default_routes() -> None:
    assert HOST.uplink(NIC, ["kv-snape"]) == UPLINK
    assert HOST.uplink(replace(NIC, uplink="docker0"), []) == DOCKER
    assert HOST.uplink(replace(NIC, uplink="eth9"), []) is None
    better = HostRoute(ip_network("0.0.0.0/0"), 1, None, 0)
    assert replace(HOST, routes=(*HOST.routes, better)).find("docker0") == DOCKER
    assert replace(HOST, routes=(*HOST.routes, better)).uplink(NIC, []) == DOCKER
    assert replace(HOST, routes=(*HOST.routes, better)).uplink(NIC, ["docker0"]) == UPLINK  # through a guest
    only6 = tuple(route for route in HOST.routes if route.prefix.version == 6)
    assert replace(HOST, routes=only6).uplink(NIC, []) == UPLINK
    assert Host().uplink(NIC, []) is None


def test_nothing_to_do() -> None:
    things = wanted(NIC, TAP, UPLINK, HOST)
    assert diff(things, things) == []
    assert diff(things, reversed(things)) == []
    assert diff([], []) == []


def test_difference_keeps_order_and_removes_backwards() -> None:
    one, two, three = (Proxy(2, ip_address(f"192.0.2.{number}")) for number in (1, 2, 3))
    assert diff([one, two], [two, three]) == [Operation("remove", three), Operation("add", one)]
    assert diff([], [one, two]) == [Operation("remove", two), Operation("remove", one)]
    assert diff([one, one], []) == [Operation("add", one)]


def test_difference_replaces_what_is_ours() -> None:
    prefix = ip_network("192.0.2.42/32")
    old, new = (Route(7, prefix, None, ip_address(text)) for text in ("192.0.2.10", "192.0.2.11"))
    assert diff([new], [old]) == [Operation("replace", new)]


def test_planned_once_while_nothing_is_different() -> None:
    first = plan(NIC, TAP, UPLINK, HOST)
    assert list(first.things.values()) == everything()
    assert plan(NIC, TAP, UPLINK, HOST, first) is first
    for changed in (
        plan(replace(NIC, configure=True), TAP, UPLINK, HOST, first),
        plan(NIC, replace(TAP, up=True), UPLINK, HOST, first),
        plan(NIC, TAP, None, HOST, first),
        plan(NIC, TAP, UPLINK, replace(HOST), first),
    ):
        assert changed is not first


def test_mended_is_what_was_there_before() -> None:
    """Not what is new, nor what is different now; what taps share is told once."""
    other = replace(NIC, tap="kv-lily", addresses=(ip_address("192.0.2.43"),), routes=())
    before = {NIC.tap: plan(NIC, TAP, UPLINK, HOST), other.tap: plan(other, replace(TAP, index=8), UPLINK, HOST)}
    shared = Setting("ipv4/conf", UPLINK.index, "forwarding", 1)
    own = Proxy(UPLINK.index, NIC.addresses[0])
    assert not mended([], before, before)
    assert not mended([shared, own], before, {})
    assert mended([shared, own], before, before) == {
        "kv-lily": "kv-lily: restored after it was removed or changed: net/ipv4/conf/eth0/forwarding=1",
        "kv-snape": "kv-snape: restored after it was removed or changed: proxy entry for 192.0.2.42 on eth0",
    }
    now = {NIC.tap: plan(NIC, TAP, replace(UPLINK, mtu=1400), HOST)}
    assert not mended([LinkState(TAP.index, TAP_MAC, 1400)], now, before)
    assert not mended([own], now, before)  # perhaps the kernel did that


V6 = IPv6Address


@pytest.mark.parametrize(
    ("source", "target", "verdict"),
    [
        ("2001:db8:1::42", "2001:db8:1::77", Verdict.ANSWER),
        ("fe80::5054:ff:fe00:1", "2001:db8:1::77", Verdict.ANSWER),
        ("2001:db8:1::42", "2001:db8:1::42", Verdict.SILENT),
        ("::", "2001:db8:1::42", Verdict.SILENT),
        ("::", "2001:db8:1::77", Verdict.ASK),
        ("::", "2001:db8:1::43", Verdict.TAKEN),
        ("2001:db8:1::42", "2001:db8:1::43", Verdict.ANSWER),
        ("2001:db8:1::42", "2001:db8:1::10", Verdict.SILENT),  # the kernel answers
        ("2001:db8:1::42", "fe80::1", Verdict.SILENT),  # the kernel answers
        ("2001:db8:1::42", "fe80::99", Verdict.SILENT),
        ("2001:db8:1::42", "2001:db8:ffff::1", Verdict.SILENT),
        ("::", "2001:db8:ffff::1", Verdict.SILENT),
        ("2001:db8:1::42", "ff02::1", Verdict.SILENT),
    ],
)
def test_judgement_of_solicitations(source: str, target: str, verdict: Verdict) -> None:
    other = replace(NIC, tap="kv-lily", addresses=(V6("2001:db8:1::43"),))
    view = vicinity(NIC, TAP, UPLINK, HOST, {*own_addresses(HOST), *NIC.addresses, *other.addresses})
    assert view.judge(V6(source), V6(target)) is verdict


def test_status_tells_the_worst() -> None:
    thing = Proxy(2, NIC.addresses[0])
    failure = Failure(Operation("add", thing), 1, "Operation not permitted")
    tap = replace(TAP, carrier=True)
    assert assess(NIC, None, UPLINK, "", [], []).state == "absent"
    assert assess(NIC, tap, UPLINK, "", [thing], []).state == "up"
    assert assess(NIC, TAP, UPLINK, "", [thing], []).state == "down"
    assert assess(NIC, tap, None, "", [thing], []).state == "no-uplink"
    assert assess(NIC, tap, replace(UPLINK, carrier=False), "", [], []).state == "uplink-down"
    assert assess(NIC, tap, UPLINK, "conflict!", [], []).detail == "conflict!"
    assert "not permitted" in assess(NIC, tap, UPLINK, "", [thing], [failure]).detail
    assert assess(NIC, tap, UPLINK, "", [], [failure]).state == "up"  # another's
    assert assess(replace(NIC, addresses=(), routes=()), tap, None, "", [], []).state == "up"


def test_news_are_told_once() -> None:
    absent = assess(NIC, None, UPLINK, "", [], [])
    up, down = replace(absent, state="up", uplink="eth0"), replace(absent, state="uplink-down", detail="no carrier")
    assert not list(news(NIC, UPLINK, HOST, absent, up))
    assert list(news(NIC, UPLINK, HOST, up, down)) == [("no carrier", WARNING)]
    assert not list(news(NIC, UPLINK, HOST, down, replace(down, index=7)))
    assert list(news(NIC, UPLINK, HOST, down, up)) == [("kv-snape is up again on eth0", NOTICE)]
    stranger = replace(NIC, addresses=(ip_address("198.18.0.1"),))
    assert [sentence.partition(" ")[0] for sentence, _ in news(stranger, UPLINK, HOST, absent, up)] == ["198.18.0.1"]
