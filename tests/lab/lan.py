"""A LAN around a host: a switch, a router to an "internet", neighbours. All network namespaces inside that host.

host  192.0.2.10  2001:db8:1::10   eth0; default routes: static for IPv4, from router advertisements for IPv6
router 192.0.2.1  2001:db8:1::1 fe80::1   and behind it 198.51.100.1 and 2001:db8:ffff::1

A rented host has no LAN, only a gateway and a switch that lets frames of one MAC to the gateway pass:

host  198.51.100.10/32  2001:db8:5:6::2/128   eth0; default routes via the gateway, on the link
router 198.51.100.1 fe80::1   and behind it 192.0.2.1 and 2001:db8:ffff::1. It asks on the link for 198.51.100.0/24, for
single addresses of 203.0.113.0/24 and for 2001:db8:5:6::/64; 2001:db8:77::/56 is routed to the host.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

ROUTER = ("192.0.2.1", "2001:db8:1::1")
HOST = ("192.0.2.10", "2001:db8:1::10")
HOST_SECOND = ("203.0.113.10", "2001:db8:2::10")  # on eth1, a LAN without a router
INTERNET = ("198.51.100.1", "2001:db8:ffff::1")
RENTED_INTERNET = ("192.0.2.1", "2001:db8:ffff::1")

# attach SWITCH NETNS IFACE MAC ADDRESS…: a cable from the switch; its end in NETNS ("" is the host) has the addresses.
# accept_dad=0: nobody here but a guest does duplicate address detection, so that all is up at once.
PRELUDE = r"""
set -e
in_netns() { if [ -n "$1" ]; then ip netns exec "$@"; else shift; "$@"; fi; }
switch() {
    ip netns add "$1"
    ip netns exec "$1" sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1
    ip -n "$1" link add br0 type bridge mcast_snooping 0 forward_delay 0
    ip -n "$1" link set br0 up
}
attach() {
    switch=$1 netns=$2 iface=$3 mac=$4 port=${2:-host}; shift 4
    in_netns "$netns" ip link add "$iface" address "$mac" type veth peer name "$port" netns "$switch"
    in_netns "$netns" sysctl -qw "net.ipv6.conf.$iface.accept_dad=0"
    ip -n "$switch" link set "$port" master br0 up
    for address; do in_netns "$netns" ip addr add "$address" dev "$iface"; done
    in_netns "$netns" ip link set "$iface" up
}
"""

RADVD = """interface eth0 {
    AdvSendAdvert on; MinRtrAdvInterval 3; MaxRtrAdvInterval 10; AdvDefaultLifetime 1800;
    prefix 2001:db8:1::/64 { AdvOnLink on; AdvAutonomous off; };
};
"""

SET_UP = r"""
%(docker0)s
switch lan
attach lan "" eth0 02:00:00:00:00:10 192.0.2.10/24 2001:db8:1::10/64
ip route add default via 192.0.2.1

ip netns add router
ip -n router link set lo up
ip netns exec router sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
ip netns exec router sysctl -qw net.ipv6.conf.default.addr_gen_mode=1 # its link-local address is fe80::1 alone
attach lan router eth0 02:00:00:00:00:01 192.0.2.1/24 2001:db8:1::1/64 fe80::1/64
ip -n router addr add 198.51.100.1/32 dev lo
ip -n router addr add 2001:db8:ffff::1/128 dev lo
printf '%%s' "$1" > /run/lab-radvd.conf
systemd-run --quiet --unit=lab-radvd --service-type=forking ip netns exec router \
    radvd --config=/run/lab-radvd.conf --pidfile=/run/lab-radvd.pid --logmethod=stderr
%(eth1)s
until ip -6 route show default proto ra | grep -q .; do rdisc6 -q -1 -r 20 -w 500 eth0 >/dev/null || true; done
"""
# As Docker leaves it on a host: an interface with an address, older than the uplink.
DOCKER0 = """ip link add docker0 type bridge
sysctl -qw net.ipv6.conf.docker0.accept_dad=0
ip addr add 172.17.0.1/16 dev docker0
ip link set docker0 up"""
ETH1 = """switch lan1
attach lan1 "" eth1 02:00:00:00:01:10 203.0.113.10/24 2001:db8:2::10/64"""

RENTED = r"""
switch lan
attach lan "" eth0 02:00:00:00:00:10 198.51.100.10/32
ip route add 198.51.100.1 dev eth0
ip route add default via 198.51.100.1 dev eth0 onlink
sysctl -qw net.ipv6.conf.eth0.accept_ra=0
ip addr add 2001:db8:5:6::2/128 dev eth0 nodad
ip -6 route add default via fe80::1 dev eth0
bridge -n lan fdb replace 02:00:00:00:00:10 dev host master static
bridge -n lan link set dev host learning off locked on isolated on

ip netns add router
ip -n router link set lo up
ip netns exec router sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
ip netns exec router sysctl -qw net.ipv6.conf.default.addr_gen_mode=1
attach lan router eth0 02:00:00:00:00:01 198.51.100.1/24 fe80::1/64
ip -n router addr add 192.0.2.1/32 dev lo
ip -n router addr add 2001:db8:ffff::1/128 dev lo
ip -n router route add 203.0.113.0/24 dev eth0
ip -n router route add 2001:db8:5:6::/64 dev eth0
ip -n router route add 2001:db8:77::/56 via fe80::ff:fe00:10 dev eth0
"""

NEIGHBOUR = r"""
ip netns add "$2"
ip -n "$2" link set lo up
ip netns exec "$2" sysctl -qw net.ipv6.conf.default.accept_ra=0
attach "$@"
"""


class Shell(Protocol):
    """What a LAN needs of its host."""

    def run(
        self,
        *argv: str | Path,
        check: bool = ...,
        input: str | bytes | None = ...,
        timeout: float = ...,
        netns: str | None = ...,
    ) -> subprocess.CompletedProcess[str]: ...

    def popen(self, *argv: str | Path, netns: str | None = ..., **options: Any) -> subprocess.Popen[str]: ...


@dataclass(frozen=True)
class Neighbour:
    """Somebody on the LAN, with a network namespace of its own; the interface is eth0."""

    host: Shell
    name: str
    addresses: tuple[str, ...]
    mac: str

    def run(
        self, *argv: str | Path, check: bool = True, input: str | bytes | None = None, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        return self.host.run(*argv, check=check, input=input, timeout=timeout, netns=self.name)

    def popen(self, *argv: str | Path, **options: Any) -> subprocess.Popen[str]:
        return self.host.popen(*argv, netns=self.name, **options)

    def ping(
        self, address: str, count: int = 1, check: bool = True, wait: float = 5
    ) -> subprocess.CompletedProcess[str]:
        """All of COUNT echoes answered, each within WAIT seconds; check=False: see the result's returncode."""
        return self.run("ping", "-n", "-i", "0.2", "-c", str(count), "-W", str(wait), address, check=check)


class Lan:
    """The LAN of a host. docker0: the host has that interface, older than eth0; eth1: a second uplink, on lan1.

    rented: there is no LAN, only a gateway.
    """

    def __init__(self, host: Shell, *, docker0: bool = False, eth1: bool = False, rented: bool = False) -> None:
        self.host = host
        self._count = 0
        script = RENTED if rented else SET_UP % {"docker0": DOCKER0 if docker0 else "", "eth1": ETH1 if eth1 else ""}
        host.run("sh", "-c", PRELUDE + script, "lan", RADVD, timeout=120)
        addresses = ("198.51.100.1", "fe80::1") if rented else ROUTER
        self.router = Neighbour(host, "router", addresses, "02:00:00:00:00:01")

    def neighbour(self, name: str, *addresses: str, switch: str = "lan") -> Neighbour:
        """Somebody more on the LAN: addresses of its prefixes, without prefix length; default routes to the router."""
        self._count += 1
        mac = f"02:00:00:00:02:{self._count:02x}"
        full = [f"{address}/{64 if ':' in address else 24}" for address in addresses]
        families = {":" in address for address in addresses}
        routes = [f'ip -n "$2" route add default via {via}' for via in ROUTER if (":" in via) in families]
        script = "\n".join([PRELUDE, NEIGHBOUR, *(routes if switch == "lan" else [])])
        self.host.run("sh", "-c", script, "lan", switch, name, "eth0", mac, *full)
        return Neighbour(self.host, name, addresses, mac)
