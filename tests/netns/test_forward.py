"""Other firewalls of the host, as their own tools make them: seen, named, opened where allowed, left as found."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace

import pytest

from kvmd.guest import Nic
from kvmd.network.lan import Lan

from .conftest import Bottle, Space, difference, eventually, run, settle, snapshot

TOOLS = ("iptables-nft", "ip6tables-nft")

# What dockerd 20 to 28 does when it starts, in its order; {tool} is iptables or ip6tables.
DOCKER = """
{tool} -P FORWARD DROP
{tool} -N DOCKER
{tool} -N DOCKER-ISOLATION-STAGE-1
{tool} -N DOCKER-ISOLATION-STAGE-2
{tool} -A DOCKER-ISOLATION-STAGE-1 -j RETURN
{tool} -A DOCKER-ISOLATION-STAGE-2 -j RETURN
{tool} -I FORWARD -o docker0 -j DOCKER
{tool} -I FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
{tool} -I FORWARD -i docker0 ! -o docker0 -j ACCEPT
{tool} -I FORWARD -i docker0 -o docker0 -j ACCEPT
{tool} -I FORWARD -j DOCKER-ISOLATION-STAGE-1
{tool} -I DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2
{tool} -I DOCKER-ISOLATION-STAGE-2 -o docker0 -j DROP
{tool} -N DOCKER-USER
{tool} -A DOCKER-USER -j RETURN
{tool} -I FORWARD -j DOCKER-USER
"""
# As a restart of it, or somebody's script, takes all away first.
FLUSH = """
{tool} -F
{tool} -X
"""


def foreign_rules() -> str:
    """kvmd's own table changes with each new address that a guest talks to."""
    return re.sub(r"table inet kvmd \{.*?\n\}\n", "", run("nft", "list", "ruleset"), flags=re.DOTALL)


def tables(text: str) -> None:
    for tool in TOOLS:
        for line in filter(None, text.format(tool=tool, six="6" if "6" in tool else "").splitlines()):
            run(*line.split())


@pytest.fixture(autouse=True)
def iptables() -> None:
    if shutil.which("iptables-nft") is None:
        pytest.skip("needs iptables")


@pytest.fixture
def guest(bottle: Bottle) -> tuple[Space, Nic]:
    return bottle.guest(1)


def addresses(nic: Nic) -> tuple[str, ...]:
    return tuple(map(str, nic.addresses))


async def open_both_ways(bottle: Bottle, space: Space, nic: Nic) -> bool:
    return await bottle.lan.reaches(*addresses(nic)) and await space.reaches("192.0.2.1", "2001:db8:1::1")


# What `ufw enable` makes of /etc/default/ufw, without its rules for single protocols; {six} is 6 for IPv6.
UFW = """
{tool} -N ufw{six}-before-forward
{tool} -N ufw{six}-user-forward
{tool} -A FORWARD -j ufw{six}-before-forward
{tool} -A ufw{six}-before-forward -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
{tool} -A ufw{six}-before-forward -j ufw{six}-user-forward
{tool} -P FORWARD DROP
"""


@pytest.mark.parametrize("name", ["tap1", "my.tap-1"])
async def test_docker(bottle: Bottle, lan: Lan, name: str) -> None:
    tables(DOCKER)
    space, nic = bottle.guest(1, plug=False)
    before = snapshot()
    nic = replace(nic, tap=name)
    bottle.plug(space, nic)
    lan.declare([nic])
    await lan.ready(nic.tap)
    settle(space.name)
    assert lan.status(nic.tap).state == "blocked"
    detail = lan.status(nic.tap).detail
    for word in (
        "chain FORWARD of table ip filter",
        "table ip6 filter",
        "(Docker)",
        "open = true",
        "/etc/kvmd/kvmd.conf",
    ):
        assert word in detail
    assert not await bottle.lan.reaches(addresses(nic)[0])
    assert not await bottle.lan.reaches(addresses(nic)[1])
    lan.declare([nic], True)
    assert lan.status(nic.tap).state == "up"
    assert await open_both_ways(bottle, space, nic)
    for tool in TOOLS:
        rules = run(tool, "-S")
        assert f"-A DOCKER-USER -i {name} -m comment --comment kvmd -j ACCEPT" in rules
        assert f"-A DOCKER-USER -o {name} -m comment --comment kvmd -j ACCEPT" in rules
    await lan.withdraw(nic.tap)
    bottle.unplug(nic)
    lan.declare([nic], True)
    assert difference(before, snapshot()) == []
    assert [report for report in bottle.reports if report[1] == detail] == [(nic.tap, detail, 4)]


async def test_docker_is_restarted(bottle: Bottle, lan: Lan, guest: tuple[Space, Nic]) -> None:
    space, nic = guest
    lan.declare([nic], True)
    await lan.ready(nic.tap)
    settle(space.name)
    assert await open_both_ways(bottle, space, nic)
    for text in (DOCKER, FLUSH + DOCKER, FLUSH + "{tool} -P FORWARD DROP"):
        tables(text)
        place = "DOCKER-USER" if "DOCKER" in text else "FORWARD"
        marks = [f"-A {place} -{end} tap1 -m comment --comment kvmd" for end in "io"]
        await eventually(
            lambda marks=marks: all(mark in run(tool, "-S") for tool in TOOLS for mark in marks),  # type: ignore[misc]
            seconds=2,
        )
        assert await open_both_ways(bottle, space, nic)
        assert run("iptables-nft", "-S").count("comment kvmd") == 2
    assert "blocked" not in {change.state for change in bottle.changes}
    lan.declare([nic], False)
    assert lan.status(nic.tap).state == "blocked"
    assert "kvmd" not in run("iptables-nft", "-S")


async def test_ufw(bottle: Bottle, lan: Lan, guest: tuple[Space, Nic]) -> None:
    space, nic = guest
    tables(UFW)
    before = foreign_rules()
    lan.declare([nic])
    settle(space.name)
    assert "(ufw)" in lan.status(nic.tap).detail
    lan.declare([nic], True)
    assert "-A ufw-user-forward -i tap1 -m comment --comment kvmd -j ACCEPT" in run("iptables-nft", "-S")
    assert "-A ufw6-user-forward -o tap1 -m comment --comment kvmd -j ACCEPT" in run("ip6tables-nft", "-S")
    assert await open_both_ways(bottle, space, nic)
    lan.declare([], True)
    assert len(foreign_rules().splitlines()) == len(before.splitlines())


async def test_news_is_told_once(bottle: Bottle, lan: Lan, guest: tuple[Space, Nic]) -> None:
    """However many commands it takes to make it."""
    space, nic = guest
    lan.declare([nic])
    settle(space.name)
    tables(DOCKER)
    await eventually(lambda: lan.status(nic.tap).state == "blocked", seconds=2)
    detail = lan.status(nic.tap).detail
    assert "table ip6 filter" in detail
    tables(FLUSH + "{tool} -P FORWARD ACCEPT")
    await eventually(lambda: lan.status(nic.tap).state == "up", seconds=2)
    assert [text for _tap, text, _priority in bottle.reports] == [detail, "tap1 is up again on up0"]


async def test_a_rule_is_taken_away(bottle: Bottle, lan: Lan, guest: tuple[Space, Nic]) -> None:
    space, nic = guest
    tables(DOCKER)
    lan.declare([nic], True)
    settle(space.name)
    before = run("iptables-nft", "-S")
    run("iptables-nft", "-D", "DOCKER-USER", "-i", nic.tap, "-m", "comment", "--comment", "kvmd", "-j", "ACCEPT")
    await eventually(lambda: sorted(run("iptables-nft", "-S").split("\n")) == sorted(before.split("\n")), seconds=2)


@pytest.mark.parametrize(
    ("rules", "state"),
    [
        ("{tool} -P FORWARD DROP", "blocked"),
        ("{tool} -A FORWARD -j REJECT", "blocked"),
        ("{tool} -A FORWARD -o tap1 -j DROP", "blocked"),
        ("{tool} -P FORWARD DROP\n{tool} -A FORWARD -i tap+ -j ACCEPT", "blocked"),
        ("{tool} -P FORWARD DROP\n{tool} -A FORWARD -p tcp -j ACCEPT", "blocked"),
        ("{tool} -P FORWARD DROP\n{tool} -A FORWARD -i tap+ -j ACCEPT\n{tool} -A FORWARD -o tap+ -j ACCEPT", "up"),
        ("{tool} -A FORWARD -m conntrack --ctstate INVALID -j DROP\n{tool} -A FORWARD -i wlan0 -j REJECT", "up"),
        ("{tool} -P FORWARD DROP\n{tool} -N OWN\n{tool} -A FORWARD -j OWN\n{tool} -A OWN -j ACCEPT", "up"),
    ],
)
async def test_what_counts_as_a_barrier(
    bottle: Bottle, lan: Lan, guest: tuple[Space, Nic], rules: str, state: str
) -> None:
    """Seen when it is made; and what is said of it is true of pings."""
    space, nic = guest
    lan.declare([nic])
    settle(space.name)
    assert lan.status(nic.tap).state == "up"
    tables(rules)
    await eventually(lambda: lan.status(nic.tap).state == state, seconds=2)
    assert await open_both_ways(bottle, space, nic) == (state == "up")
    before = foreign_rules()
    lan.declare([nic], True)
    assert lan.status(nic.tap).state == "up"
    assert (foreign_rules() == before) == (state == "up")
    assert await open_both_ways(bottle, space, nic)


async def test_leftovers_of_a_crash(bottle: Bottle, lan: Lan) -> None:
    tables(DOCKER)
    before = foreign_rules()
    run("nft", "insert", "rule", "ip", "filter", "DOCKER-USER", "iifname", '"tap9"', "accept", "comment", '"kvmd"')
    lan.declare([])
    assert foreign_rules() == before
