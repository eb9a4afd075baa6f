"""systemd-networkd or NetworkManager has the uplink: they leave the taps alone, and may be restarted under guests."""

from __future__ import annotations

import re
from collections.abc import Iterator

import lab
import pytest

from .guests import Guests

ADDRESSES = ("192.0.2.62", "2001:db8:1::62")
NETWORKD = """[Match]
Name=eth0
[Network]
Address=192.0.2.10/24
Address=2001:db8:1::10/64
Gateway=192.0.2.1
"""
NETWORK_MANAGER = """[connection]
id=wire
type=ethernet
interface-name=eth0
[ipv4]
method=manual
address1=192.0.2.10/24,192.0.2.1
[ipv6]
method=auto
address1=2001:db8:1::10/64
"""


@pytest.fixture
def guests(deb: object) -> Iterator[Guests]:
    """A host of its own, with udev: both take no interface before udev has seen it."""
    with lab.Host("bookworm", lab.deb(), name="managed", others=True) as host:
        host.run("mount", "-o", "remount,rw", "/sys")
        host.run("systemctl", "start", "systemd-udevd")
        host.make_lan(docker0=True).neighbour("alice", "192.0.2.20", "2001:db8:1::20")
        host.run("ip", "addr", "flush", "dev", "eth0", "scope", "global")
        yield Guests(host)


def lost(host: lab.Host, *argv: str) -> list[float]:
    """Seconds without an answer from the guest, IPv4 and IPv6, while the command runs and for some time after it."""
    ping = ("ping", "-n", "-q", "-i", "0.1", "-W", "2", "-c", "60")
    pings = [host.popen(*ping, address, netns="alice") for address in ADDRESSES]
    host.run(*argv)
    outputs = [ping.communicate(timeout=30)[0] for ping in pings]
    return [(60 - int(re.findall(r"(\d+) received", output)[0])) / 10 for output in outputs]


def hold(guests: Guests, state: list[str], *commands: str) -> None:
    """The guest runs on through each of the commands; afterwards it ends, and the host is as it was."""
    guests.linux("tenant", last=62)
    guests.start("tenant")
    for command in commands:
        assert max(lost(guests.host, *command.split())) <= 2, command
        for address in ("192.0.2.20", "2001:db8:1::20"):
            assert guests.type("tenant", f"ping {address}", "^guest: ping")["MESSAGE"] == f"guest: ping {address} ok"
    assert guests.get("tenant", "Networks")[0]["state"]["data"] == "up"


def test_networkd(guests: Guests) -> None:
    host = guests.host
    host.write("/etc/systemd/network/20-eth0.network", NETWORKD)
    host.run("systemctl", "start", "systemd-networkd")
    host.run("/lib/systemd/systemd-networkd-wait-online", "-i", "eth0", "--timeout=20")
    before = host.state()
    hold(guests, before, "systemctl restart systemd-networkd", "networkctl reload", "networkctl reconfigure eth0")
    listed = host.run("networkctl", "--no-legend", "--no-pager", "list").stdout
    assert re.search(r"kv-tenant +\S+ +\S+ +unmanaged", listed)
    assert re.search(r"eth0 +\S+ +routable +configured", listed)
    guests.clear()
    assert host.state() == before


def test_network_manager(guests: Guests) -> None:
    host = guests.host
    host.write("/etc/NetworkManager/system-connections/wire.nmconnection", NETWORK_MANAGER, 0o600)
    host.write("/etc/NetworkManager/conf.d/wire.conf", "[device-wire]\nmatch-device=interface-name:eth0\nmanaged=1\n")
    host.run("systemctl", "start", "NetworkManager")
    host.run("nm-online", "-q", "-s", "-t", "20")
    assert "eth0:connected:wire" in host.run("nmcli", "-t", "-f", "DEVICE,STATE,CONNECTION", "device").stdout
    before = host.state()
    hold(guests, before, "systemctl restart NetworkManager", "nmcli device reapply eth0", "nmcli connection up wire")
    assert "kv-tenant:unmanaged:" in host.run("nmcli", "-t", "-f", "DEVICE,STATE,CONNECTION", "device").stdout
    guests.clear()
    assert host.state() == before
