"""A guest is told its addresses: DHCPv4, router advertisements and DHCPv6, by a dnsmasq that comes and goes with it."""

from __future__ import annotations

import re
from collections.abc import Iterator

import lab
import pytest

from .guests import Guests

NAME, UNIT = "asks", "kvmd-dhcp-kv-asks.service"
FOUR, SIX = "192.0.2.45", "2001:db8:1::45"
NETWORK = f'[[network]]\naddress = ["{FOUR}", "{SIX}"]\nconfigure = true\n'
TOLD = f"guest: DHCP {{}} {FOUR}/24 router={{}} mtu={{}} dns={{}}"


@pytest.fixture
def asking(guests: Guests) -> Iterator[Guests]:
    """A guest with nothing set inside, not started yet, on a host with resolvers."""
    guests.host.write("/etc/resolv.conf", "nameserver 127.0.0.53\nnameserver 192.0.2.1\nnameserver 2001:db8:1::1\n")
    guests.host.copy_in(lab.guests.initrd("bookworm", tools="trixie"), f"/var/lib/kvmd/images/{NAME}.img")
    guests.linux(NAME, cmdline="kvmd.dhcp=1 kvmd.dhcp6=1", extra=NETWORK, initrd=f"{NAME}.img")
    yield guests
    guests.guest_off(NAME)
    assert not [unit for unit in guests.host.units() if unit.startswith("kvmd-dhcp-")]
    guests.host.run("rm", "/etc/resolv.conf", f"/var/lib/kvmd/images/{NAME}.img")


def told(guests: Guests, event: str, since: str | None = None) -> str:
    return guests.wait(NAME, f"^guest: DHCP {event} {FOUR}", since)["MESSAGE"]


def renew(guests: Guests) -> str:
    since = guests.host.cursor()
    guests.host.run("sh", "-c", f"echo 'sh kill -USR1 $(cat /udhcpc-eth0)' > /run/kvmd/{NAME}/serial.in")
    return told(guests, "renew", since)


def test_guest_is_told_all_it_needs(asking: Guests) -> None:
    asking.start(NAME)
    assert told(asking, "bound") == TOLD.format("bound", "192.0.2.1", 1500, "192.0.2.1")
    six = asking.wait(NAME, "^guest: DHCP bound 2001")["MESSAGE"]
    assert re.search(r"2001:0?db8:.*:0*45 .*dns=2001:0?db8:0*1:.*:0*1$", six)
    routes = asking.type(NAME, "sh ip -6 route | tr '\\n' ';'; echo", "default via")["MESSAGE"]
    assert "default via fe80::fc6b:76ff:fe6d:6400 dev eth0" in routes
    assert "2001:db8:1::/64" not in routes  # all by the router: nobody has to answer for the neighbours
    addresses = asking.type(NAME, "sh echo $(ip addr show dev eth0)", "inet6")["MESSAGE"]
    assert re.findall(r"inet6? (\S+) .*?scope global", addresses) == [f"{FOUR}/24", f"{SIX}/128"]
    for address in ("192.0.2.20", "2001:db8:1::20", "192.0.2.10", "2001:db8:1::10", "198.51.100.1", "2001:db8:ffff::1"):
        assert asking.type(NAME, f"ping {address}", "^guest: ping")["MESSAGE"] == f"guest: ping {address} ok"
    for address in (FOUR, SIX):
        asking.host.run("ping", "-n", "-c", "1", "-W", "3", address, netns="alice")


def test_dnsmasq_is_supervised_and_unprivileged(asking: Guests) -> None:
    host = asking.host
    asking.start(NAME)
    pid = host.show(UNIT)["MainPID"]
    status = dict(line.split(":\t", 1) for line in host.read(f"/proc/{pid}/status").splitlines() if ":\t" in line)
    assert "0" not in status["Uid"].split()
    assert int(status["CapBnd"], 16) == 1 << 10 | 1 << 12 | 1 << 13
    host.run("systemctl", "restart", "kvmd")
    assert renew(asking)
    assert host.show(UNIT)["MainPID"] == pid
    since = host.cursor()
    host.run("kill", "-9", pid)
    host.wait_journal("_PID=1", f"UNIT={UNIT}", message="^Started", since=since)
    assert renew(asking) == TOLD.format("renew", "192.0.2.1", 1500, "192.0.2.1")
    assert host.show(UNIT)["MainPID"] != pid


def test_what_changes_is_told(asking: Guests) -> None:
    """Another gateway, MTU and resolver; the neighbour entry that the host needs survives all of it."""
    host = asking.host
    host.write("/etc/resolv.conf.new", "nameserver 198.51.100.1\n")
    asking.start(NAME)
    changes = (
        (("ip", "route", "replace", "default", "via", "192.0.2.21"), ("192.0.2.21", 1500, "192.0.2.1")),
        (("ip", "route", "replace", "default", "via", "192.0.2.1"), ("192.0.2.1", 1500, "192.0.2.1")),
        (("ip", "link", "set", "eth0", "mtu", "1400"), ("192.0.2.1", 1400, "192.0.2.1")),
        (("mv", "/etc/resolv.conf.new", "/etc/resolv.conf"), ("192.0.2.1", 1400, "198.51.100.1")),
        (("ip", "link", "set", "eth0", "mtu", "1500"), ("192.0.2.1", 1500, "198.51.100.1")),
    )
    for command, terms in changes:
        since = host.cursor()
        host.run(*command)
        host.wait_journal("_PID=1", f"UNIT={UNIT}", message="^Started", since=since)
        assert renew(asking) == TOLD.format("renew", *terms)
    assert "PERMANENT" in host.run("ip", "neigh", "show", FOUR).stdout


def test_a_guest_that_boots_again_is_told_again(asking: Guests) -> None:
    """To DHCPv6 it is another client then: this one makes up a new IAID each time.

    Its kernel asks some ten times to be reset; dnsmasq is not started as often.
    """
    asking.start(NAME)
    since = asking.host.cursor()
    asking.type(NAME, "reboot", "guest: rebooting")
    assert told(asking, "bound", since)
    assert asking.wait(NAME, "^guest: DHCP bound 2001", since)
    started = asking.host.journal("_PID=1", f"UNIT={UNIT}", since=since)
    assert 1 <= sum(entry["MESSAGE"].startswith("Started") for entry in started) <= 4


@pytest.mark.complaints("failed while there was no kvmd")
def test_dnsmasq_goes_with_the_guest_without_a_daemon(asking: Guests) -> None:
    host = asking.host
    asking.start(NAME)
    qemu, since = str(asking.get(NAME, "PID")), host.cursor()
    host.run("systemctl", "stop", "kvmd")
    host.run("kill", "-9", qemu)
    host.wait_journal("_PID=1", f"UNIT={UNIT}", message="^Stopped", since=since)
    host.run("systemctl", "start", "kvmd")


@pytest.mark.complaints("is given no DNS server")
def test_no_resolver_for_guests_is_said(asking: Guests) -> None:
    asking.host.write("/etc/resolv.conf", "nameserver 127.0.0.53\n")
    since = asking.host.cursor()
    asking.start(NAME, ready=False)
    assert asking.host.wait_journal(f"KVMD_GUEST={NAME}", message="is given no DNS server", since=since, timeout=5)


@pytest.mark.complaints("could not be started")
def test_dnsmasq_is_missing(asking: Guests) -> None:
    host = asking.host
    host.run("mv", "/usr/sbin/dnsmasq", "/usr/sbin/dnsmasq.away")
    try:
        failed = asking.call("StartGuest", "s", NAME, check=False)
    finally:
        host.run("mv", "/usr/sbin/dnsmasq.away", "/usr/sbin/dnsmasq")
    assert "configure = true needs dnsmasq, which is not installed (install dnsmasq-base)" in failed.stderr


def test_another_dnsmasq_serves_another_interface(asking: Guests) -> None:
    """As libvirt and others do; each hears only its own clients."""
    host = asking.host
    words = ("--conf-file=/dev/null", "--port=0", "--bind-dynamic", "--interface=docker0", "--leasefile-ro")
    ranges = "--dhcp-range=172.17.0.100,172.17.0.200"
    host.run("systemd-run", "--unit=lab-dnsmasq", "/usr/sbin/dnsmasq", "--keep-in-foreground", *words, ranges)
    asking.start(NAME)
    assert told(asking, "bound") == TOLD.format("bound", "192.0.2.1", 1500, "192.0.2.1")
    assert host.units()["lab-dnsmasq.service"] == "active/running"
    host.run("systemctl", "stop", "lab-dnsmasq")


@pytest.mark.complaints("could not be started")
def test_another_server_holds_the_port(asking: Guests) -> None:
    host = asking.host
    taken = "import socket; s = socket.socket(2, 2); s.bind(('', 67)); print('bound', flush=True); s.recv(1)"
    other = host.popen("python3", "-c", taken)
    assert other.stdout
    assert other.stdout.readline() == "bound\n"
    failed = asking.call("StartGuest", "s", NAME, check=False)
    other.kill()
    other.wait()
    assert f"dnsmasq does not serve kv-{NAME}" in failed.stderr
    assert f"journalctl -u {UNIT}" in failed.stderr
