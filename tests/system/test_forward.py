"""firewalld on the host: its refusal named, opened in its own way, over its reload and restart, left as found."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import lab
import pytest

from .guests import Guests

pytestmark = pytest.mark.xdist_group("others")

ADDRESSES = ("192.0.2.60", "2001:db8:1::60")


def eventually(condition: Callable[[], object], seconds: float) -> None:
    """For firewalld's own work, of which it tells nobody outside."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "still not so"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def others(deb: object) -> Iterator[lab.Host]:
    """A host where firewalld is installed, and not started."""
    with lab.Host("bookworm", lab.deb(), name="others", others=True) as host:
        host.make_lan(docker0=True).neighbour("alice", "192.0.2.20", "2001:db8:1::20")
        yield host


@pytest.fixture
def guests(others: lab.Host) -> Iterator[Guests]:
    before = others.state()
    guests = Guests(others)
    yield guests
    others.run("systemctl", "stop", "firewalld")
    others.run("rm", "-f", "/etc/kvmd/kvmd.conf")
    guests.clear()
    assert others.state() == before


def reaches(host: lab.Host, count: int = 1) -> list[bool]:
    ping = ("ping", "-n", "-q", "-i", "0.2", "-c", str(count), "-W", "1")
    return [host.run(*ping, address, netns="alice", check=False).returncode == 0 for address in ADDRESSES]


def test_firewalld(guests: Guests) -> None:
    host = guests.host
    guests.linux("walled", last=60)
    guests.start("walled")
    assert reaches(host) == [True, True]
    since = host.cursor()
    host.run("systemctl", "start", "firewalld")
    warning = host.wait_journal("KVMD_GUEST=walled", message="probably cut off", since=since, timeout=5)["MESSAGE"]
    assert "chain filter_FORWARD of table inet firewalld (firewalld)" in warning
    assert "open = true under [firewall] in /etc/kvmd/kvmd.conf" in warning
    assert [network["state"]["data"] for network in guests.get("walled", "Networks")] == ["blocked"]
    assert [network["detail"]["data"] for network in guests.get("walled", "Networks")] == [warning]
    assert reaches(host) == [False, False]

    since = host.cursor()
    host.write("/etc/kvmd/kvmd.conf", "[firewall]\nopen = true\n")
    host.wait_journal("KVMD_GUEST=walled", message="kv-walled is up again", since=since, timeout=5)
    assert reaches(host) == [True, True]
    assert guests.type("walled", "ping 192.0.2.20", "^guest: ping").get("MESSAGE") == "guest: ping 192.0.2.20 ok"
    assert guests.type("walled", "ping 2001:db8:1::20", "^guest: ping")["MESSAGE"] == "guest: ping 2001:db8:1::20 ok"

    for verb in ("--reload", "--complete-reload"):
        host.run("firewall-cmd", verb)
        eventually(lambda: reaches(host) == [True, True], 2)
    host.run("systemctl", "restart", "firewalld")
    host.run("firewall-cmd", "--state")  # answers when its rules are there
    eventually(lambda: reaches(host) == [True, True], 2)
    host.run("systemctl", "restart", "kvmd")
    assert reaches(host) == [True, True]
    assert host.run("firewall-cmd", "--zone=kvmd", "--list-interfaces").stdout.split() == ["kv-walled"]
    assert "kvmd" not in host.run("sh", "-c", "grep -rl kvmd /etc/firewalld || true").stdout

    host.run("rm", "/etc/kvmd/kvmd.conf")
    eventually(lambda: guests.get("walled", "Networks")[0]["state"]["data"] == "blocked", 2)
    assert reaches(host) == [False, False]
    host.write("/etc/kvmd/kvmd.conf", "[firewall]\nopen = true\n")
    eventually(lambda: reaches(host) == [True, True], 2)
    host.run("systemctl", "stop", "kvmd@walled")
    eventually(lambda: not host.run("firewall-cmd", "--zone=kvmd", "--list-interfaces").stdout.split(), 2)


def test_a_guest_starts_behind_firewalld(guests: Guests) -> None:
    """And nobody is told of a barrier that kvmd opens. firewalld keeps empty chains until its next reload."""
    host = guests.host
    host.write("/etc/kvmd/kvmd.conf", "[firewall]\nopen = true\n")
    host.run("systemctl", "start", "firewalld")
    active, alone = host.run("firewall-cmd", "--get-active-policies").stdout, host.state()
    since = host.cursor()
    guests.linux("walled", last=60)
    guests.start("walled")
    assert reaches(host) == [True, True]
    assert not [entry for entry in host.journal("KVMD_GUEST=walled", since=since) if "cut off" in entry["MESSAGE"]]
    host.run("systemctl", "stop", "kvmd@walled")
    eventually(lambda: host.run("firewall-cmd", "--get-active-policies").stdout == active, 2)
    assert "kv-walled" not in "\n".join(host.state())
    host.run("firewall-cmd", "--reload")
    assert host.state() == alone

    guests.start("walled", ready=False)
    host.run("systemctl", "stop", "firewalld")
    guests.guest_off("walled")
    host.run("systemctl", "start", "firewalld")
    host.run("firewall-cmd", "--state")
    assert host.run("firewall-cmd", "--zone=kvmd", "--list-interfaces").stdout.split() == []


@pytest.mark.parametrize("allowed", ["", "[firewall]\nopen = true\n"])
def test_firewalld_is_older_than_kvmd(guests: Guests, allowed: str) -> None:
    """It has not read the zone that came with the package; and reads it when it is told to, for whoever opens it."""
    host = guests.host
    moved = ("zones/kvmd.xml", "policies/kvmd-in.xml", "policies/kvmd-out.xml")
    for name in moved:
        host.run("mv", f"/usr/lib/firewalld/{name}", f"/root/{name.replace('/', '-')}")
    host.run("systemctl", "start", "firewalld")
    host.run("firewall-cmd", "--state")
    for name in moved:
        host.run("mv", f"/root/{name.replace('/', '-')}", f"/usr/lib/firewalld/{name}")
    host.write("/etc/kvmd/kvmd.conf", allowed)
    since = host.cursor()
    guests.linux("walled", last=60)
    guests.start("walled")
    warning = host.wait_journal("KVMD_GUEST=walled", message="probably cut off", since=since, timeout=5)["MESSAGE"]
    assert ("INVALID_ZONE" in warning) == ("firewall-cmd --reload" in warning) == bool(allowed)
    assert reaches(host) == [False, False]
    host.run("firewall-cmd", "--reload")
    if not allowed:
        host.run("firewall-cmd", "--zone=kvmd", "--add-interface=kv-walled")
    eventually(lambda: reaches(host) == [True, True], 2)
    eventually(lambda: guests.get("walled", "Networks")[0]["state"]["data"] == "up", 2)
