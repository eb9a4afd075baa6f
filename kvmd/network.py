"""What the kernel should hold for the guests' network: a pure function of their NICs and of what the host looks like.

No bridge. For each address of a guest: a host route to its tap, a permanent neighbour on the tap, a proxy entry on the
uplink. The tap has no address of the host's: nothing on it goes stale when the uplink's address changes. (A guest that
is to be configured has a DHCP server on its tap, which does not work without addresses there.) What is wanted is a
*sequence*, in the order of application; ``diff`` compares it with what is present and keeps that order.

Pieces made by kvmd carry protocol number 171 (RTA_PROTOCOL, NDA_PROTOCOL, IFA_PROTO), so that they can be told from
all others.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Interface, IPv6Address, IPv6Interface, ip_interface, ip_network
from typing import Literal

from kvmd.guest import Address, Network, Nic

PROTOCOL = 171
TAP_MAC = "fe:6b:76:6d:64:00"  # of every tap, host's side: a guest's neighbour cache survives restart and migration
TAP_MTU_MAX = 65521  # drivers/net/tun.c: MAX_MTU - ETH_HLEN
METRIC = 1024  # of IPv6 routes (the kernel's own default), and of the IPv4 routes that name no source
ALL = 0  # net.ipvX.conf.all, where a Setting wants an interface index
DHCP_SERVER = IPv4Interface("169.254.171.171/32")  # on taps whose guest is configured: never stale, none of the LAN

Interface = IPv4Interface | IPv6Interface


# --- what the host looks like -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Link:
    """A network interface; ``transient`` means a tap that goes with the last process that holds it open."""

    index: int
    name: str
    mac: str = ""
    mtu: int = 1500
    up: bool = False
    carrier: bool = False
    transient: bool = False


@dataclass(frozen=True, slots=True)
class HostRoute:
    """A default route (``gateway`` may be None on point-to-point links) or an on-link prefix, of the main table.

    Link-local and multicast prefixes are no part of it: each tap has them.
    """

    prefix: Network
    device: int
    gateway: Address | None = None
    metric: int = 0


@dataclass(frozen=True, slots=True)
class Host:
    """The host's interfaces, its usable addresses by interface index, its default routes and on-link prefixes.

    ``learners``: interfaces that take router advertisements and would no longer do so on a forwarding host.
    """

    links: Mapping[int, Link] = field(default_factory=dict)
    addresses: Mapping[int, tuple[Interface, ...]] = field(default_factory=dict)
    routes: tuple[HostRoute, ...] = ()
    learners: tuple[int, ...] = ()

    def find(self, name: str) -> Link | None:
        return next((link for link in self.links.values() if link.name == name), None)

    def uplink(self, nic: Nic, taps: Collection[str]) -> Link | None:
        """The interface ``nic`` reaches the LAN by: its own choice, else the default route's (IPv4 before IPv6).

        A default route through a guest (one of ``taps``) does not lead to the LAN.
        """
        if nic.uplink is not None:
            return self.find(nic.uplink)
        defaults = [
            (route.prefix.version, route.metric, link)
            for route in self.routes
            if route.prefix.prefixlen == 0 and (link := self.links.get(route.device)) and link.name not in taps
        ]
        return min(defaults, key=lambda item: item[:2], default=(0, 0, None))[2]

    def source(self, uplink: Link, target: Address) -> Address | None:
        """The address by which the host itself speaks to ``target``, a guest reached by ``uplink``'s LAN."""
        own = [
            interface
            for interface in self.addresses.get(uplink.index, ())
            if interface.version == target.version and not interface.ip.is_link_local
        ]
        own.sort(key=lambda interface: target not in interface.network)  # stable: the kernel's order otherwise
        return own[0].ip if own else None

    def strangers(self, nic: Nic, uplink: Link) -> list[Address]:
        """Addresses of ``nic`` that lie in no prefix of ``uplink``'s LAN: its machines will ask a router for them."""
        return [address for address in nic.addresses if self.prefix(uplink, address) is None]

    def prefix(self, uplink: Link, address: Address) -> Network | None:
        """The longest prefix of ``uplink``'s LAN that holds ``address``."""
        around = [prefix for prefix in self.prefixes(uplink) if address in prefix]
        return max(around, key=lambda prefix: prefix.prefixlen, default=None)

    def prefixes(self, uplink: Link) -> list[Network]:
        """Prefixes of ``uplink``'s LAN, and of the host's own addresses there."""
        own = [interface.network for interface in self.addresses.get(uplink.index, ()) if not interface.is_link_local]
        return self.on_link(uplink) + own

    def on_link(self, uplink: Link) -> list[Network]:
        """Prefixes of ``uplink``'s LAN."""
        return [
            route.prefix
            for route in self.routes
            if route.device == uplink.index and route.gateway is None and route.prefix.prefixlen
        ]


# --- what is wanted ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Setting:
    """``/proc/sys/net/TABLE/INTERFACE/NAME`` (ip-sysctl.rst); ``device`` an interface index or ``ALL``."""

    table: str
    device: int
    name: str
    value: int

    @property
    def key(self) -> tuple[object, ...]:
        return ("setting", self.table, self.device, self.name)

    def __str__(self) -> str:
        return f"{self.table} {self.name}={self.value}"


@dataclass(frozen=True, slots=True)
class LinkState:
    """MAC, MTU and administrative state of a tap."""

    device: int
    mac: str
    mtu: int
    up: bool = True

    @property
    def key(self) -> tuple[object, ...]:
        return ("link", self.device)

    def __str__(self) -> str:
        return f"tap up, MAC {self.mac}, MTU {self.mtu}"


@dataclass(frozen=True, slots=True)
class TapAddress:
    """An address of the host's on a tap, for a server there and nothing else: no route, never chosen as source."""

    device: int
    interface: Interface

    @property
    def key(self) -> tuple[object, ...]:
        return ("address", self.device, self.interface)

    def __str__(self) -> str:
        return f"address {self.interface} on the tap"


@dataclass(frozen=True, slots=True)
class Route:
    """A route to a guest; ``source`` is the address the host itself uses towards it (RTA_PREFSRC)."""

    device: int
    prefix: Network
    via: Address | None = None
    source: Address | None = None
    metric: int = 0

    @property
    def key(self) -> tuple[object, ...]:
        return ("route", self.prefix, self.metric, self.device)

    def __str__(self) -> str:
        return f"route to {self.prefix}" + (f" with source {self.source}" if self.source else "")


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A permanent neighbour on a tap: the host never asks for the guest's MAC, with whatever source address."""

    device: int
    address: Address
    mac: str

    @property
    def key(self) -> tuple[object, ...]:
        return ("neighbour", self.device, self.address)

    def __str__(self) -> str:
        return f"neighbour {self.address} with MAC {self.mac}"


@dataclass(frozen=True, slots=True)
class Proxy:
    """The kernel answers ARP and neighbour solicitations on ``device`` for ``address`` (NTF_PROXY)."""

    device: int
    address: Address
    router: bool = False

    @property
    def key(self) -> tuple[object, ...]:
        return ("proxy", self.device, self.address)

    def __str__(self) -> str:
        return f"proxy entry for {self.address}"


Thing = Setting | LinkState | TapAddress | Route | Neighbour | Proxy


@dataclass(frozen=True, slots=True)
class Operation:
    """``add``: must not exist; ``replace``: exists with our tag; ``remove`` a Setting: what it was before."""

    action: Literal["add", "replace", "remove"]
    thing: Thing


@dataclass(frozen=True, slots=True)
class Failure:
    """An operation the kernel refused: errno(3), and why in words."""

    operation: Operation
    code: int
    text: str


def wanted(nic: Nic, tap: Link, uplink: Link | None, host: Host) -> list[Thing]:
    """Everything the kernel should hold for ``nic`` while ``tap`` exists, in the order of application.

    Without an uplink the guest still reaches the host and the other guests.
    """
    families = {item.version for item in (*nic.addresses, *nic.routes)}
    return [
        *_host_settings(families, host.learners),
        *(_uplink_settings(uplink.index, families) if uplink else ()),
        *_tap_guard(tap.index, families),
        LinkState(tap.index, TAP_MAC, min(uplink.mtu, TAP_MTU_MAX) if uplink else tap.mtu),
        *(TapAddress(tap.index, interface) for interface in _servers(nic, uplink, host)),
        *(Neighbour(tap.index, address, nic.mac) for address in nic.addresses),
        *_routes(nic, tap, uplink, host),
        *_tap_forwarding(tap.index, families),
        *tap_proxies(nic, tap, uplink, host),
        # Last: from here on the LAN sends. An uplink that is down forgets its entries; they follow when it is up.
        *(Proxy(uplink.index, address) for address in nic.addresses if uplink and uplink.up),
    ]


def _host_settings(families: Collection[int], learners: Iterable[int]) -> Iterator[Setting]:
    if 6 in families:
        # Any write of 1 to any IPv6 forwarding purges the default routes learnt from router advertisements on every
        # interface with accept_ra=1 (net/ipv6/addrconf.c, addrconf_fixup_forwarding): 2 comes first.
        yield from (Setting("ipv6/conf", index, "accept_ra", 2) for index in learners)
        # IPv6 has no forwarding by interface before 6.17 (net/ipv6/ip6_output.c, ip6_forward).
        yield Setting("ipv6/conf", ALL, "forwarding", 1)
        # Solicitations sent to the guest's own address take the forwarding path: only `all` is asked there.
        yield Setting("ipv6/conf", ALL, "proxy_ndp", 1)


def _uplink_settings(uplink: int, families: Collection[int]) -> Iterator[Setting]:
    for version in sorted(families):
        yield Setting(f"ipv{version}/neigh", uplink, "proxy_delay", 0)  # else up to 0.8 s before each answer
        yield Setting(f"ipv{version}/conf", uplink, "forwarding", 1)  # IPv4: enough, with ip_forward=0


def _tap_guard(tap: int, families: Collection[int]) -> Iterator[Setting]:
    """Before the tap is up: nothing a guest sends configures the host."""
    for name, value in (("accept_redirects", 0), ("send_redirects", 0), ("rp_filter", 1)):
        yield Setting("ipv4/conf", tap, name, value)
    if families == {4}:
        yield Setting("ipv6/conf", tap, "disable_ipv6", 1)
        return
    # A tap is born with accept_ra=1; the link-local address is made of the MAC, at once, and needs no tag.
    guard = {"accept_ra": 0, "accept_redirects": 0, "autoconf": 0, "accept_dad": 0, "addr_gen_mode": 0}
    for name, value in {"disable_ipv6": 0, **guard}.items():
        yield Setting("ipv6/conf", tap, name, value)


def _tap_forwarding(tap: int, families: Collection[int]) -> Iterator[Setting]:
    for version in sorted(families):
        yield Setting(f"ipv{version}/neigh", tap, "proxy_delay", 0)
        # IPv6: also the router flag in our neighbour advertisements; a guest drops its default route without it.
        yield Setting(f"ipv{version}/conf", tap, "forwarding", 1)
    if 4 in families:
        # After the guest's route: before, the host would answer the guest's own gratuitous ARP, a false duplicate.
        yield Setting("ipv4/conf", tap, "proxy_arp", 1)


def interfaces(nic: Nic, uplink: Link | None, host: Host) -> tuple[Interface, ...]:
    """The addresses a guest is handed, with their prefix lengths: the first of IPv4, of IPv6 the first of each prefix.

    An IPv4 address of no prefix of the LAN is alone. dnsmasq knows no IPv6 prefix shorter than /64.
    """
    found: dict[object, Interface] = {}
    for address in nic.addresses:
        prefix = host.prefix(uplink, address) if uplink else None
        length = prefix.prefixlen if prefix else 0
        if address.version == 4:
            found.setdefault(4, ip_interface((address, length or 32)))
        else:
            interface = ip_interface((address, length if 64 <= length < 127 else 64))
            found.setdefault(interface.network, interface)
    return tuple(found.values())


def _servers(nic: Nic, uplink: Link | None, host: Host) -> Iterator[Interface]:
    """What dnsmasq must find on the tap: any IPv4 address, and one of each IPv6 prefix it speaks of.

    There it is the subnet-router anycast address, which a router has anyway (RFC 4291 section 2.6.1).
    """
    for interface in interfaces(nic, uplink, host) if nic.configure else ():
        if isinstance(interface, IPv4Interface):
            yield DHCP_SERVER
        else:
            yield IPv6Interface((interface.network.network_address, interface.network.prefixlen))


def _routes(nic: Nic, tap: Link, uplink: Link | None, host: Host) -> Iterator[Route]:
    """Host routes to the tap, and delegated prefixes via the guest's first address of that family.

    An unnumbered tap lends the host no source address, and IPv4 then takes that of the interface of lowest index,
    docker0's perhaps (inet_select_addr): so the route names the uplink's. When that address goes the kernel deletes
    the IPv4 route with it, perhaps while no daemon runs: a second one, of higher metric and without source, stays.
    """
    gateways = {address.version: address for address in reversed(nic.addresses)}
    for prefix, via in [(ip_network(address), None) for address in nic.addresses] + [
        (prefix, gateways.get(prefix.version)) for prefix in nic.routes
    ]:
        target = via or prefix.network_address
        source = host.source(uplink, target) if uplink else None
        if prefix.version == 4:
            yield Route(tap.index, prefix, via, None, METRIC)
            if source is not None:
                yield Route(tap.index, prefix, via, source)
        else:
            yield Route(tap.index, prefix, via, source, METRIC)


def tap_proxies(nic: Nic, tap: Link, uplink: Link | None, host: Host) -> Iterator[Proxy]:
    """What a guest cannot do without, the kernel answers itself, and goes on when no daemon runs: its IPv6 gateway,
    also when it is known by its link-local address, and this host."""
    if uplink is None or not any(isinstance(address, IPv6Address) for address in nic.addresses):
        return
    routers = {route.gateway for route in host.routes if route.device == uplink.index and not route.prefix.prefixlen}
    own = {interface.ip for interface in host.addresses.get(uplink.index, ()) if not interface.ip.is_link_local}
    for address in sorted(
        item for item in routers | own if isinstance(item, IPv6Address) and item not in nic.addresses
    ):
        yield Proxy(tap.index, address, router=address in routers)


def diff(wanted: Iterable[Thing], present: Iterable[Thing]) -> list[Operation]:
    """What to do, in order: first remove what is not wanted, last made first; then what is missing or different."""
    target = {thing.key: thing for thing in wanted}
    held = {thing.key: thing for thing in present}
    surplus = [Operation("remove", held[key]) for key in reversed(held) if key not in target]
    missing = [
        Operation("replace" if key in held else "add", thing) for key, thing in target.items() if held.get(key) != thing
    ]
    return surplus + missing
