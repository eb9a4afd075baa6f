"""Everybody reaches everybody, on Debian 12 and 13: two uplinks, a guest on both, each family; and what is on the wire.

The same on the kernel of the release: test_vm.py. With other kinds of uplinks: tests/netns/test_uplinks.py.
"""

from __future__ import annotations

import difflib
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lab
import pytest

from .guests import RELEASES, Guests

HOST_MAC = "02:00:00:00:00:10"
SECOND = """[[network]]
uplink = "eth1"
address = ["203.0.113.42", "2001:db8:2::42"]
"""
ALONE = "kvmd.addr.1=203.0.113.42/24 kvmd.addr6.1=2001:db8:2::42/64"


@pytest.fixture(scope="module", params=RELEASES)
def host(deb: Path, request: pytest.FixtureRequest) -> Iterator[lab.Host]:
    with lab.Host(request.param, deb, name=f"matrix-{request.param}") as host:
        lan = host.make_lan(docker0=True, eth1=True)
        lan.neighbour("alice", "192.0.2.20", "2001:db8:1::20")
        lan.neighbour("dave", "203.0.113.20", "2001:db8:2::20", switch="lan1")
        yield host


@contextmanager
def captured(host: lab.Host, lines: list[str], *expression: str, netns: str | None = None) -> Iterator[None]:
    """What tcpdump on eth0 sees meanwhile, a line each, goes to ``lines``."""
    # As root: one that changes its user would not end with its parent.
    words = ("tcpdump", "-Z", "root", "-i", "eth0", "-e", "-n", "-l", *expression)
    capture = host.popen(*words, netns=netns, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert capture.stdout is not None
    assert capture.stderr is not None
    while "listening on" not in (line := capture.stderr.readline()):
        assert line, "tcpdump does not start"
    yield
    capture.terminate()
    lines += filter(None, capture.stdout.read().splitlines())
    capture.wait()


def test_everybody_reaches_everybody(host: lab.Host) -> None:
    guests, before = Guests(host), host.state()
    foreign: list[str] = []
    answers: list[str] = []
    claims = "arp[6:2] = 2 or icmp6[0] = 136"  # ARP replies, neighbour advertisements
    with (
        captured(host, foreign, "-Q", "out", "not", "ether", "src", HOST_MAC),
        captured(host, answers, claims, netns="alice"),
    ):
        guests.linux("one", last=41)
        guests.linux("two", last=42, cmdline=ALONE, extra=SECOND)
        guests.start("one", "two")
        for netns, addresses in (
            ("alice", ("192.0.2.41", "2001:db8:1::41", "192.0.2.42", "2001:db8:1::42")),
            ("dave", ("203.0.113.42", "2001:db8:2::42")),
            (None, ("192.0.2.41", "2001:db8:1::41", "203.0.113.42", "2001:db8:2::42")),
            ("router", ("192.0.2.41", "2001:db8:1::41")),
        ):
            for address in addresses:
                host.run("ping", "-n", "-c", "1", "-W", "3", address, netns=netns)
        for guest, addresses in (
            ("one", ("192.0.2.20", "2001:db8:1::20", "192.0.2.10", "2001:db8:1::10", "192.0.2.42", "2001:db8:1::42")),
            ("one", ("192.0.2.1", "2001:db8:1::1", "198.51.100.1", "2001:db8:ffff::1")),
            ("two", ("203.0.113.20", "2001:db8:2::20", "203.0.113.10", "2001:db8:2::10", "192.0.2.20", "192.0.2.41")),
        ):
            for address in addresses:
                assert guests.type(guest, f"ping {address}", "^guest: ping")["MESSAGE"] == f"guest: ping {address} ok"
        assert "duplicate" not in " ".join(entry["MESSAGE"] for name in ("one", "two") for entry in guests.serial(name))
        assert guests.status("one").rstrip().endswith("guest: ping 2001:db8:ffff::1 ok")
        host.run("systemctl", "stop", "kvmd@one", "kvmd@two")
    guests.clear()
    assert list(difflib.unified_diff(before, host.state(), n=0)) == []
    assert foreign == []
    for address in ("192.0.2.41", "192.0.2.42"):
        assert any(re.search(rf"{HOST_MAC} > .* {address} is-at {HOST_MAC}", line) for line in answers), answers
    for address in ("2001:db8:1::41", "2001:db8:1::42"):
        assert any(re.search(rf"{HOST_MAC} > .*advertisement, .*tgt is {address}\b", line) for line in answers), answers
