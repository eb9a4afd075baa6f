"""The host as last seen: what makes an older look worthless, and what does not."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from kvmd.guest import Nic
from kvmd.network.model.host import HostRoute, Link
from kvmd.network.model.survey import Survey
from kvmd.network.model.things import LinkState

UPLINK = Link(2, "eth0", "02:00:00:00:00:02", up=True, carrier=True)
TAP = Link(7, "kv-snape", "9a:00:00:00:00:07", transient=True)
NIC = Nic("kv-snape", "52:54:00:00:00:01", None, (ip_address("192.0.2.42"),))
ROUTES = (HostRoute(ip_network("0.0.0.0/0"), 2, ip_address("192.0.2.1")),)


@pytest.fixture
def survey() -> Survey:
    found = Survey()
    found.expect({TAP.name})
    assert found.look([UPLINK, TAP], {}, ROUTES)
    return found


def test_a_look_that_shows_nothing_new(survey: Survey) -> None:
    assert not survey.look(None, {}, ROUTES)
    assert survey.host.links == {2: UPLINK, 7: TAP}
    assert survey.look([UPLINK], {}, ())
    assert survey.name(7) is None


@pytest.mark.parametrize(
    ("link", "gone", "stale"),
    [
        (UPLINK, False, False),
        (replace(UPLINK, carrier=False), False, False),
        (replace(UPLINK, up=False), False, True),
        (UPLINK, True, True),
        (Link(3, "eth1"), False, True),
        (replace(TAP, up=True), False, False),
        (TAP, True, False),
    ],
)
def test_what_is_heard_of_an_interface(survey: Survey, link: Link, gone: bool, stale: bool) -> None:
    before = survey.links.get(link.index)
    assert survey.hear(link, gone) == before
    assert survey.host.links.get(link.index) == (None if gone else link)
    assert survey.stale == stale


def test_the_uplink_is_the_one_of_now(survey: Survey) -> None:
    """Also when only an interface has been heard of."""
    assert survey.uplink(NIC) == UPLINK
    down = replace(UPLINK, up=False)
    survey.hear(down, gone=False)
    assert survey.uplink(NIC) == down
    survey.expect({TAP.name, UPLINK.name})
    assert survey.uplink(NIC) is None


def test_same_host_until_the_next_look(survey: Survey) -> None:
    """Plans are kept for as long as it is the same."""
    survey.learn((2,), ())
    host = survey.host
    survey.learn((2,), ())
    survey.hear(replace(TAP, up=True), gone=False)
    survey.made(LinkState(7, "fe:00:00:00:00:01", 9000))
    assert survey.host is host
    assert host.links[7] == replace(TAP, mac="fe:00:00:00:00:01", mtu=9000, up=True)
    survey.made(LinkState(8, "fe:00:00:00:00:01", 9000))  # gone since
    assert [link.index for link in survey.others()] == [2]
