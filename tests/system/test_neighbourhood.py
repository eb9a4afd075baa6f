"""systemd-networkd or NetworkManager has the uplink: they leave the taps alone, and may be restarted under guests."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager

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
GREEDY = "[Match]\nDriver=tun\n[Network]\nDHCP=yes\n"
NETWORK_MANAGER = """[connection]
id=wire
type=ethernet
interface-name=eth0
[ipv4]
method=manual
address1=192.0.2.10/24,192.0.2.1
[ipv6]
method=manual
address1=2001:db8:1::10/64,fe80::1
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
    ping = ("ping", "-n", "-q", "-i", "0.1", "-W", "2", "-c", "40")
    pings = [host.popen(*ping, address, netns="alice") for address in ADDRESSES]
    host.run(*argv)
    outputs = [ping.communicate(timeout=30)[0] for ping in pings]
    return [(40 - int(re.findall(r"(\d+) received", output)[0])) / 10 for output in outputs]


@contextmanager
def hold(guests: Guests, settled: str, *commands: str) -> Iterator[None]:
    """A guest is on the LAN, both ways, through each of the commands, and leaves the host as it would be without it.

    ``settled`` is the command that waits until what they started has ended.
    """
    host = guests.host
    for command in commands:
        host.run(*command.split())
        host.run(*settled.split())
    before = host.state()
    guests.linux("tenant", last=62)
    guests.start("tenant")
    for command in commands:
        assert max(lost(host, *command.split())) <= 2, command
        host.run(*settled.split())
        for address in ("192.0.2.20", "2001:db8:1::20"):
            assert guests.type("tenant", f"ping {address}", "^guest: ping")["MESSAGE"] == f"guest: ping {address} ok"
    assert guests.get("tenant", "Networks")[0]["state"]["data"] == "up"
    yield
    guests.clear()
    assert "\n".join(difflib.unified_diff(before, host.state(), n=0, lineterm="")) == ""


def test_networkd(guests: Guests) -> None:
    host = guests.host
    host.write("/etc/systemd/network/20-eth0.network", NETWORKD)
    host.write("/etc/systemd/network/30-greedy.network", GREEDY)
    host.run("systemctl", "start", "systemd-networkd")
    settled = "/lib/systemd/systemd-networkd-wait-online -i eth0 --timeout=20"
    restart = "systemctl restart systemd-networkd"
    with hold(guests, settled, restart, "networkctl reload", "networkctl reconfigure eth0", restart):
        listed = host.run("networkctl", "--no-legend", "--no-pager", "list").stdout
        assert re.search(r"kv-tenant +\S+ +\S+ +unmanaged", listed)
        assert re.search(r"eth0 +\S+ +routable +configured", listed)


def test_network_manager(guests: Guests) -> None:
    host = guests.host
    host.write("/etc/NetworkManager/system-connections/wire.nmconnection", NETWORK_MANAGER, 0o600)
    host.write("/etc/NetworkManager/conf.d/wire.conf", "[device-wire]\nmatch-device=interface-name:eth0\nmanaged=1\n")
    host.run("systemctl", "start", "NetworkManager")
    restart = "systemctl restart NetworkManager"
    with hold(guests, "nm-online -q -t 20", restart, "nmcli device reapply eth0", "nmcli connection up wire", restart):
        # What has an address is what it takes an interest in.
        host.run("ip", "addr", "add", "192.0.2.10/32", "dev", "kv-tenant")
        host.run(*restart.split())
        host.run("nm-online", "-q", "-t", "20")
        listed = host.run("nmcli", "-t", "-f", "DEVICE,STATE,CONNECTION", "device").stdout.splitlines()
        assert {"kv-tenant:unmanaged:", "docker0:connected (externally):docker0", "eth0:connected:wire"} <= set(listed)
