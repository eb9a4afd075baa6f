"""What the kernel should hold for the guests' network: a pure function of their NICs and of what the host looks like.

No bridge. For each address of a guest: a host route to its tap, a permanent neighbour on the tap, a proxy entry on the
uplink. The tap has no address of the host's: nothing on it goes stale when the uplink's address changes. (A guest that
is to be configured has a DHCP server on its tap, which does not work without addresses there.) What is wanted is a
*sequence*, in the order of application, which ``things.diff`` keeps.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv6Address, IPv6Interface, ip_address, ip_interface, ip_network

from kvmd.guest import Address, Nic
from kvmd.network.model.host import IPV6_MTU_MIN, Host, Interface, Link
from kvmd.network.model.things import ALL, LinkState, Neighbour, Proxy, Route, Setting, TapAddress, Thing, describe

TAP_MAC = "fe:6b:76:6d:64:00"  # of every tap, host's side: a guest's neighbour cache survives restart and migration
TAP_MTU_MAX = 65521  # drivers/net/tun.c: MAX_MTU - ETH_HLEN
METRIC = 1024  # of IPv6 routes (the kernel's own default), and of the IPv4 routes that name no source
# Of either half of IPv4, as VPNs have routes to; nothing is sent there.
WORLD = (ip_address("9.9.9.9"), ip_address("198.41.0.4"), ip_address("2620:fe::9"))
DHCP_SERVER = IPv4Interface("169.254.171.171/32")  # on taps whose guest is configured: never stale, none of the LAN


@dataclass(frozen=True, slots=True)
class Plan:
    """All that is wanted for one NIC, by key in the order of application, and what it follows from."""

    nic: Nic
    tap: Link
    uplink: Link | None
    host: Host
    things: Mapping[object, Thing]


def plan(nic: Nic, tap: Link, uplink: Link | None, host: Host, before: Plan | None = None) -> Plan:
    """Made once for as long as everything it depends on is the same: most passes find nothing new."""
    if before and before.host is host and (before.nic, before.tap, before.uplink) == (nic, tap, uplink):
        return before
    return Plan(nic, tap, uplink, host, {thing.key: thing for thing in wanted(nic, tap, uplink, host)})


def journeys(plan: Plan) -> Iterator[tuple[Address, Address]]:
    """From which address of the guest, and where to, it is to be asked whether the uplink is the way."""
    for source in {address.version: address for address in reversed(plan.nic.addresses)}.values():
        if plan.uplink and plan.host.leads_out(plan.uplink, source.version):
            yield from ((source, target) for target in WORLD if target.version == source.version)


def mended(done: Collection[Thing], plans: Mapping[str, Plan], before: Mapping[str, Plan]) -> dict[str, str]:
    """Of what has just been made, what had been made already when ``before`` were carried out: sentences, by tap.

    A thing that several taps share is told once. When an interface's MTU changes the kernel itself may remove some.
    """
    owners = {key: tap for tap, plan in plans.items() for key in plan.things} if done else {}
    found: dict[str, list[str]] = {}
    for thing in done:
        tap = owners[thing.key]
        own = plans[tap]
        if tap in before and before[tap].things.get(thing.key) == thing and _mtus(own) == _mtus(before[tap]):
            link = own.host.links.get(thing.device)
            found.setdefault(tap, []).append(describe(thing, link.name if link else ""))
    return {
        tap: f"{tap}: restored after it was removed or changed: {', '.join(pieces)}" for tap, pieces in found.items()
    }


def _mtus(plan: Plan) -> tuple[int, int]:
    return plan.tap.mtu, plan.uplink.mtu if plan.uplink else 0


def narrowed(plans: Mapping[str, Plan], before: Mapping[str, Plan]) -> dict[str, str]:
    """Guests that run, and go on sending larger packets than their LAN takes now: sentences, by tap.

    One that is configured by DHCP and router advertisements is told.
    """
    return {
        tap: f"{tap}: its uplink {now.uplink.name} has an MTU of {now.uplink.mtu} now, the guest keeps {was.uplink.mtu}"
        f" until it is restarted (or set it within: ip link set dev INTERFACE mtu {now.uplink.mtu})"
        for tap, now in plans.items()
        if (was := before.get(tap)) is not None
        and now.uplink is not None
        and was.uplink is not None
        and (now.uplink.index, now.nic.configure) == (was.uplink.index, False)
        and now.uplink.mtu < was.uplink.mtu
        and now.tap.carrier
    }


def wanted(nic: Nic, tap: Link, uplink: Link | None, host: Host) -> list[Thing]:
    """Everything the kernel should hold for ``nic`` while ``tap`` exists, in the order of application.

    Without an uplink the guest still reaches the host and the other guests.
    """
    return [
        *_host_settings(nic.families, host.learners),
        *(_uplink_settings(uplink.index, nic.families) if uplink else ()),
        *_tap_guard(tap.index, nic.families),
        LinkState(tap.index, TAP_MAC, _mtu(nic, uplink) if uplink else tap.mtu),
        *(TapAddress(tap.index, interface) for interface in _servers(nic, uplink, host)),
        *(Neighbour(tap.index, address, nic.mac) for address in nic.addresses),
        *_routes(nic, tap, uplink, host),
        *_tap_forwarding(tap.index, nic.families),
        *tap_proxies(nic, tap, uplink, host),
        # Last: from here on the LAN sends. An uplink that is down, or has its IPv6 switched off, forgets its entries;
        # they follow when it is up.
        *(
            Proxy(uplink.index, address)
            for address in nic.addresses
            if uplink and uplink.up and host.speaks(uplink, address.version)
        ),
    ]


def _mtu(nic: Nic, uplink: Link) -> int:
    """The uplink's; for a guest with IPv6 at least what the kernel speaks it with."""
    return max(min(uplink.mtu, TAP_MTU_MAX), IPV6_MTU_MIN if 6 in nic.families else 0)


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
