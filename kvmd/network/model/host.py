"""What the host looks like: its interfaces, its addresses, its routes, and what follows from them for a guest. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Interface, IPv6Address, IPv6Interface

from kvmd.guest import Address, Network, Nic

Interface = IPv4Interface | IPv6Interface
IPV6_MTU_MIN = 1280  # RFC 8200 section 5


@dataclass(frozen=True, slots=True)
class Link:
    """A network interface; ``transient`` means a tap that goes with the last process that holds it open.

    ``lan``: there are neighbours, found by ARP and neighbour discovery; false of tunnels and of lo.
    """

    index: int
    name: str
    mac: str = ""
    mtu: int = 1500
    up: bool = False
    carrier: bool = False
    transient: bool = False
    lan: bool = True
    altnames: tuple[str, ...] = ()


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
class Wire:
    """An uplink as a sender needs it; ``source`` its link-local address, None while it has none."""

    link: Link
    source: IPv6Address | None = None


@dataclass(frozen=True, slots=True)
class Host:
    """The host's interfaces, its usable addresses by interface index, its default routes and on-link prefixes.

    ``learners``: interfaces that take router advertisements and would no longer do so on a forwarding host.
    ``four_only``: those on which IPv6 is switched off.
    """

    links: Mapping[int, Link] = field(default_factory=dict)
    addresses: Mapping[int, tuple[Interface, ...]] = field(default_factory=dict)
    routes: tuple[HostRoute, ...] = ()
    learners: tuple[int, ...] = ()
    four_only: tuple[int, ...] = ()

    def find(self, name: str) -> Link | None:
        """By its name, else by an alternative one."""
        links = self.links.values()
        own = next((link for link in links if link.name == name), None)
        return own or next((link for link in links if name in link.altnames), None)

    def uplink(self, nic: Nic, taps: Collection[str]) -> Link | None:
        """The interface ``nic`` reaches the LAN by: its own choice, else the default route's (IPv4 before IPv6).

        A default route through a guest (one of ``taps``) or a tunnel does not lead to the LAN.
        """
        if nic.uplink is not None:
            found = self.find(nic.uplink)
            return found if found and found.lan else None
        return next((link for link in self.default_links(taps) if link.lan), None)

    def default_links(self, taps: Collection[str]) -> list[Link]:
        """The interfaces of the default routes, the first the kernel would take, IPv4 before IPv6; none of ``taps``."""
        defaults = [
            (route.prefix.version, route.metric, link)
            for route in self.routes
            if route.prefix.prefixlen == 0 and (link := self.links.get(route.device)) and link.name not in taps
        ]
        return [link for _version, _metric, link in sorted(defaults, key=lambda item: item[:2])]

    def leads_out(self, uplink: Link, version: int) -> bool:
        """Whether a default route of this IP version does by ``uplink``."""
        return any(
            route.device == uplink.index and not route.prefix.prefixlen and route.prefix.version == version
            for route in self.routes
        )

    def speaks(self, uplink: Link, version: int) -> bool:
        """Whether the host itself does there. On an interface with less than its least MTU the kernel ends IPv6."""
        return version == 4 or (uplink.index not in self.four_only and uplink.mtu >= IPV6_MTU_MIN)

    def source(self, uplink: Link, target: Address) -> Address | None:
        """The address by which the host itself speaks to ``target``, a guest reached by ``uplink``'s LAN."""
        own = [
            interface
            for interface in self.addresses.get(uplink.index, ())
            if interface.version == target.version and not interface.ip.is_link_local
        ]
        own.sort(key=lambda interface: target not in interface.network)  # stable: the kernel's order otherwise
        return own[0].ip if own else None

    def wire(self, uplink: Link) -> Wire:
        own = [interface.ip for interface in self.addresses.get(uplink.index, ())]
        return Wire(uplink, next((ip for ip in own if isinstance(ip, IPv6Address) and ip.is_link_local), None))

    def strangers(self, nic: Nic, uplink: Link) -> list[Address]:
        """Addresses of ``nic`` that lie in no prefix of ``uplink``'s LAN: its machines will ask a router for them.

        Where the LAN has no prefix, as at a rented host, that is as it should be.
        """
        shared = {prefix.version for prefix in self.prefixes(uplink) if prefix.prefixlen < prefix.max_prefixlen}
        return [
            address for address in nic.addresses if address.version in shared and self.prefix(uplink, address) is None
        ]

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
