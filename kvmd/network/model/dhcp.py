"""What a guest with ``configure = true`` is told, and the dnsmasq(8) that tells it: one for each tap. Pure.

DHCPv4 hands out address, prefix length, gateway, DNS servers and MTU. Most clients have no use for a gateway outside of
their prefix, whatever RFC 3442 says: where that is the host's own, as on rented hosts, which have a /32, the prefix is
made wide enough, or another address of it stands in; on the tap the host answers for all of them, and routes. Router
advertisements name this host as the router, with DNS servers and MTU; they say that addresses come by DHCPv6 (M), are
not to be made up (no A), and that all traffic goes to the router (no L): so the guest asks for no neighbours, and
nobody has to answer for them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv6Interface, ip_address

from kvmd.guest import Address, Nic
from kvmd.network.model.host import Host, HostRoute, Interface, Link
from kvmd.network.model.plan import TAP_MTU_MAX, interfaces

PROGRAM = "/usr/sbin/dnsmasq"
LEASE = "10m"  # a guest learns of a change within half of it
# dnsmasq's shortest: so long a guest waits that has become another to DHCPv6, by booting another system.
LEASE6 = "2m"
LONGEST, WIDEST = 30, 16  # IPv4 prefix lengths: some clients know no longer one; a wider one holds half the world
ROUTER_LIFETIME = 1800  # seconds
ADVERTISE_INTERVAL = 60  # seconds
SERVERS = 8  # name servers
# capability.h; Ambient, so that dnsmasq never is root.
CAP_NET_BIND_SERVICE, CAP_NET_ADMIN, CAP_NET_RAW = 10, 12, 13
CAPABILITIES = 1 << CAP_NET_BIND_SERVICE | 1 << CAP_NET_ADMIN | 1 << CAP_NET_RAW

# No state: leases follow from the configuration, and with authoritative (and a DUID that stays the same) a guest renews
# what another dnsmasq has given it. broadcast: dnsmasq would otherwise overwrite the tap's permanent neighbour entry.
# 32473: RFC 5612.
GENERAL = """\
port=0
no-hosts
no-resolv
bind-interfaces
except-interface=lo
leasefile-ro
pid-file
no-ping
quiet-dhcp
quiet-dhcp6
quiet-ra
dhcp-authoritative
dhcp-broadcast
dhcp-duid=32473,6b:76:6d:64
"""


@dataclass(frozen=True, slots=True)
class Terms:
    """``router``: the LAN's IPv4 gateway. ``default6``: whether there is a way out of the LAN by IPv6."""

    tap: str
    mac: str
    mtu: int
    interfaces: tuple[Interface, ...]
    router: IPv4Address | None = None
    default6: bool = False


def terms(nic: Nic, uplink: Link, host: Host) -> Terms | None:
    """What ``nic`` is told about the LAN of ``uplink``.

    None while that is not known: the uplink is down, or the host itself has nothing there yet. Nor of one family: what
    a guest is told wrong it believes until it renews.
    """
    families = {prefix.version for prefix in host.prefixes(uplink)}
    told = tuple(interface for interface in interfaces(nic, uplink, host) if interface.version in families)
    if not (told and uplink.up and uplink.carrier):
        return None
    defaults = _defaults(uplink, host)
    default4 = next((route for route in defaults if route.prefix.version == 4), None)
    router = None
    if default4 and isinstance(told[0], IPv4Interface):
        four, router = with_gateway(told[0], default4.gateway)
        told = (four, *told[1:])
    return Terms(
        nic.tap,
        nic.mac,
        min(uplink.mtu, TAP_MTU_MAX),
        told,
        router,
        any(route.prefix.version == 6 for route in defaults),
    )


def _defaults(uplink: Link, host: Host) -> list[HostRoute]:
    found = (route for route in host.routes if route.device == uplink.index and not route.prefix.prefixlen)
    return sorted(found, key=lambda route: route.metric)


def default_gateways(uplink: Link, host: Host) -> tuple[Address | None, Address | None]:
    """Of IPv4 and of IPv6, by ``uplink``."""
    defaults = _defaults(uplink, host)
    four = next((route.gateway for route in defaults if route.prefix.version == 4), None)
    six = next((route.gateway for route in defaults if route.prefix.version == 6), None)
    return four, six


def with_gateway(own: IPv4Interface, gateway: Address | None) -> tuple[IPv4Interface, IPv4Address]:
    """The address with a prefix that holds a gateway: the host's if that is near, else any other address of it."""
    alone = own.network.prefixlen > LONGEST
    wider = [
        IPv4Interface((own.ip, length)) for length in (range(LONGEST, 0, -1) if alone else [own.network.prefixlen])
    ]
    usable = [interface for interface in wider if _is_host(own.ip, interface)] or wider
    for interface in usable:
        near = not alone or interface.network.prefixlen >= WIDEST
        if near and isinstance(gateway, IPv4Address) and gateway != own.ip and _is_host(gateway, interface):
            return interface, gateway
    return usable[0], next(address for address in usable[0].network.hosts() if address != own.ip)


def _is_host(address: IPv4Address, interface: IPv4Interface) -> bool:
    network = interface.network
    return address in network and address not in (network.network_address, network.broadcast_address)


def resolvers(text: str) -> list[Address]:
    """The first name servers of a resolv.conf(5) that a guest can reach as well: none of this host's loopback.

    The LAN may announce any number; libc asks three, and no option of DHCP holds more than 63.
    """
    found = []
    for line in text.splitlines():
        match line.split():
            case ["nameserver", word, *_] if "%" not in word:
                try:
                    found.append(ip_address(word))
                except ValueError:
                    continue
    return [address for address in found if not (address.is_loopback or address.is_unspecified)][:SERVERS]


def configuration(terms: Terms, servers: Iterable[Address]) -> str:
    """The text of dnsmasq.conf; see ``--help dhcp`` and dnsmasq(8)."""
    four = [interface for interface in terms.interfaces if isinstance(interface, IPv4Interface)]
    six = [interface for interface in terms.interfaces if isinstance(interface, IPv6Interface)]
    names = [server for server in servers if server.version == 4], [server for server in servers if server.version == 6]
    lines = [f"interface={terms.tap}"]
    addresses = [str(interface.ip) for interface in four] + [f"[{interface.ip}]" for interface in six]
    lines.append(f"dhcp-host={','.join([terms.mac, *addresses])}")
    for interface in four:
        lines += [
            # The tap has no address of that network.
            f"shared-network={terms.tap},{interface.ip}",
            f"dhcp-range={interface.ip},static,{interface.network.netmask},{LEASE}",
            # Without a value dnsmasq sends none; without the line it would send its own address.
            f"dhcp-option=option:router{_list([terms.router] if terms.router else [])}",
            f"dhcp-option=option:dns-server{_list(names[0])}",
            f"dhcp-option=option:mtu,{terms.mtu}",
        ]
    if six:
        lifetime = ROUTER_LIFETIME if terms.default6 else 0
        lines += [
            "enable-ra",
            f"ra-param={terms.tap},mtu:{terms.mtu},{ADVERTISE_INTERVAL},{lifetime}",
            f"dhcp-option=option6:dns-server{_list(f'[{server}]' for server in names[1])}",
        ]
    for network in [interface.network for interface in six]:
        # Without a router there is no other way to the neighbours than to ask for them.
        off_link = "off-link," if terms.default6 else ""
        lines.append(f"dhcp-range={network.network_address},static,{off_link}{network.prefixlen},{LEASE6}")
    return GENERAL + "".join(f"{line}\n" for line in lines)


def _list(items: Iterable[object]) -> str:
    return "".join(f",{item}" for item in items)


def unit(tap: str) -> str:
    """The transient service that runs dnsmasq for ``tap``."""
    return f"kvmd-dhcp-{tap}.service"


def properties(tap: str, guest: str, scope: str, configuration: str) -> list[tuple[str, str, object]]:
    """What StartTransientUnit is told: name, D-Bus signature and value of each property.

    BindsTo the scope that holds QEMU: it goes with the guest, also when there is no daemon. ``forking`` because dnsmasq
    lets go only when it can serve.
    """
    return [
        ("Description", "s", f"DHCP and router advertisements for guest {guest} on {tap}"),
        ("BindsTo", "as", [scope]),
        ("After", "as", [scope]),
        ("CollectMode", "s", "inactive-or-failed"),
        ("Type", "s", "forking"),
        ("ExecStart", "a(sasb)", [[PROGRAM, [PROGRAM, "--conf-file=-"], False]]),
        ("StandardInput", "s", "data"),
        ("StandardInputData", "ay", configuration.encode()),
        ("LogExtraFields", "aay", [f"KVMD_GUEST={guest}".encode()]),
        ("Restart", "s", "always"),
        ("RestartUSec", "t", 500_000),
        ("StartLimitIntervalUSec", "t", 0),
        ("DynamicUser", "b", True),
        ("AmbientCapabilities", "t", CAPABILITIES),
        ("CapabilityBoundingSet", "t", CAPABILITIES),
        ("ProtectHome", "s", "yes"),
        ("PrivateDevices", "b", True),
        ("ProtectKernelModules", "b", True),
        ("ProtectKernelTunables", "b", True),
        ("ProtectControlGroups", "b", True),
        ("MemoryDenyWriteExecute", "b", True),
        ("LockPersonality", "b", True),
        ("RestrictRealtime", "b", True),
        ("RestrictAddressFamilies", "(bas)", [True, ["AF_UNIX", "AF_NETLINK", "AF_INET", "AF_INET6"]]),
        ("SystemCallArchitectures", "as", ["native"]),
        ("SystemCallFilter", "(bas)", [True, ["@system-service"]]),
    ]
