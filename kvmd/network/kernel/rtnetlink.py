"""rtnetlink(7) as bytes: requests out of operations, values out of answers and events."""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address, ip_interface, ip_network

from kvmd.guest import Address
from kvmd.network.model.host import HostRoute, Interface, Link
from kvmd.network.model.things import PROTOCOL, LinkState, Neighbour, Operation, Proxy, Route, Setting, TapAddress

# linux/rtnetlink.h, netlink.h, if.h, if_addr.h, if_link.h, neighbour.h
NEWLINK, DELLINK, GETLINK, NEWADDR, DELADDR, GETADDR = 16, 17, 18, 20, 21, 22
NEWROUTE, DELROUTE, GETROUTE, NEWNEIGH, DELNEIGH, GETNEIGH, NEWNETCONF = 24, 25, 26, 28, 29, 30, 80
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP = 0x1, 0x4, 0x300
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE = 0x100, 0x200, 0x400
IFF_UP, IFF_LOWER_UP = 0x1, 0x10000
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_LINKINFO, IFLA_EXT_MASK = 1, 3, 4, 18, 29
IFLA_INFO_KIND, IFLA_INFO_DATA, IFLA_TUN_PERSIST, RTEXT_FILTER_SKIP_STATS = 1, 2, 6, 8
IFA_ADDRESS, IFA_LOCAL, IFA_CACHEINFO, IFA_FLAGS, IFA_PROTO = 1, 2, 6, 8, 11
IFA_F_NODAD, IFA_F_NOPREFIXROUTE, INFINITE = 0x02, 0x200, 0xFFFFFFFF
IFA_F_TEMPORARY, IFA_F_UNUSABLE = 0x01, 0x08 | 0x20 | 0x40  # unusable: dadfailed, deprecated, tentative
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY, RTA_PREFSRC, RTA_MULTIPATH, RTA_VIA = 1, 4, 5, 6, 7, 9, 18
RT_TABLE_MAIN, RTN_UNICAST, RT_SCOPE_UNIVERSE, RT_SCOPE_LINK, RT_SCOPE_HOST = 254, 1, 0, 253, 254
NDA_DST, NDA_LLADDR, NDA_IFINDEX, NDA_PROTOCOL = 1, 2, 8, 12
NTF_PROXY, NTF_ROUTER, NUD_PERMANENT = 0x08, 0x80, 0x80
NETCONFA_IFINDEX, NETCONFA_FORWARDING, NETCONFA_PROXY_NEIGH = 1, 2, 5

HEADER = struct.Struct("=IHHII")
OURS = bytes([PROTOCOL])


@dataclass(frozen=True, slots=True)
class LinkChanged:
    """RTM_NEWLINK, RTM_DELLINK."""

    link: Link
    gone: bool


@dataclass(frozen=True, slots=True)
class Changed:
    """An address, a route or a setting of interface ``device`` (0: of all). ``lost``: of ours, perhaps."""

    device: int
    lost: bool = False
    setting: bool = False


Event = LinkChanged | Changed


# --- requests ---------------------------------------------------------------------------------------------------------


def encode(operation: Operation, sequence: int) -> bytes:
    """One request that asks for an answer. Not for a Setting: that is written below /proc."""
    thing = operation.thing
    remove = operation.action == "remove"
    create = NLM_F_CREATE | (NLM_F_REPLACE if operation.action == "replace" else NLM_F_EXCL)
    match thing:
        case LinkState():
            number, how = NEWLINK, 0
            fixed = struct.pack("=BxHiII", 0, 0, thing.device, IFF_UP * thing.up, IFF_UP)
            found = {IFLA_MTU: _u32(thing.mtu), IFLA_ADDRESS: _mac(thing.mac)}
        case TapAddress():
            number, how = (DELADDR, 0) if remove else (NEWADDR, create)
            own, length = thing.interface.ip, thing.interface.network.prefixlen
            scope = RT_SCOPE_HOST if own.version == 4 else RT_SCOPE_UNIVERSE
            fixed = struct.pack("=BBBBI", _family(own), length, 0, scope, thing.device)
            found = {IFA_LOCAL: own.packed, IFA_ADDRESS: own.packed, IFA_PROTO: OURS}
            found[IFA_FLAGS] = _u32(IFA_F_NODAD | IFA_F_NOPREFIXROUTE)
            if own.version == 6:  # deprecated at once: the last to be chosen as source
                found[IFA_CACHEINFO] = struct.pack("=IIII", 0, INFINITE, 0, 0)
        case Route():
            number, how = (DELROUTE, 0) if remove else (NEWROUTE, create)
            target, length = thing.prefix.network_address, thing.prefix.prefixlen
            scope = RT_SCOPE_LINK if thing.via is None and target.version == 4 else RT_SCOPE_UNIVERSE
            kind = (RT_TABLE_MAIN, PROTOCOL, scope, RTN_UNICAST)
            fixed = struct.pack("=BBBBBBBBI", _family(target), length, 0, 0, *kind, 0)
            found = {RTA_DST: target.packed, RTA_OIF: _u32(thing.device)}
            found |= {RTA_PRIORITY: _u32(thing.metric)} if thing.metric else {}
            found |= {RTA_GATEWAY: thing.via.packed} if thing.via else {}
            found |= {RTA_PREFSRC: thing.source.packed} if thing.source else {}
        case Neighbour() | Proxy():
            # Whoever else has put an entry there is looked for before; NLM_F_EXCL is no error for proxies anyway.
            number, how = (DELNEIGH, 0) if remove else (NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE)
            flags = NTF_PROXY | NTF_ROUTER * thing.router if isinstance(thing, Proxy) else 0
            # A proxy entry without NUD_PERMANENT vanishes, silently, when the uplink loses its carrier.
            fixed = struct.pack("=BxxxiHBB", _family(thing.address), thing.device, NUD_PERMANENT, flags, 0)
            found = {NDA_DST: thing.address.packed}
            found |= {NDA_LLADDR: _mac(thing.mac)} if isinstance(thing, Neighbour) else {}
            found |= {} if remove else {NDA_PROTOCOL: OURS}
        case Setting():
            raise TypeError(f"{thing} is no matter of netlink's")
    body = fixed + b"".join(_attribute(kind, value) for kind, value in found.items())
    return HEADER.pack(HEADER.size + len(body), number, NLM_F_REQUEST | NLM_F_ACK | how, sequence, 0) + body


def ask_links() -> bytes:
    return struct.pack("=BxHiIIHHI", 0, 0, 0, 0, 0, 8, IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS)


def ask_addresses(device: int = 0) -> bytes:
    return struct.pack("=BBBBi", 0, 0, 0, 0, device)


def ask_routes(family: int, protocol: int = 0, device: int = 0) -> bytes:
    """Of table main; the kernel itself leaves out what is not asked for (NETLINK_GET_STRICT_CHK)."""
    oif = struct.pack("=HHI", 8, RTA_OIF, device) if device else b""
    return struct.pack("=BBBBBBBBI", family, 0, 0, 0, RT_TABLE_MAIN, protocol, 0, 0, 0) + oif


def ask_neighbours(device: int = 0, proxies: bool = False) -> bytes:
    index = struct.pack("=HHI", 8, NDA_IFINDEX, device) if device else b""
    return struct.pack("=BxxxiHBB", 0, 0, 0, NTF_PROXY * proxies, 0) + index


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def _u32(number: int) -> bytes:
    return struct.pack("=I", number)


def _mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def _family(address: Address) -> int:
    return socket.AF_INET if address.version == 4 else socket.AF_INET6


# --- answers ----------------------------------------------------------------------------------------------------------


def messages(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """(type, flags, sequence, body) of each message of a datagram."""
    offset = 0
    while offset + HEADER.size <= len(data):
        length, kind, flags, sequence, _port = HEADER.unpack_from(data, offset)
        yield kind, flags, sequence, data[offset + HEADER.size : offset + length]
        offset += (length + 3) & ~3


def attributes(body: bytes, offset: int) -> dict[int, bytes]:
    """By number, those after the fixed part of ``offset`` bytes; of equal ones the last."""
    found = {}
    while offset + 4 <= len(body):
        length, kind = struct.unpack_from("=HH", body, offset)
        if length < 4:
            break
        found[kind & 0x3FFF] = body[offset + 4 : offset + length]  # without NLA_F_NESTED, NLA_F_NET_BYTEORDER
        offset += (length + 3) & ~3
    return found


def link(body: bytes) -> Link:
    index, flags = struct.unpack_from("=iI", body, 4)
    found = attributes(body, 16)
    info = attributes(found.get(IFLA_LINKINFO, b""), 0)
    tun = attributes(info.get(IFLA_INFO_DATA, b""), 0) if info.get(IFLA_INFO_KIND) == b"tun\0" else {}
    return Link(
        index,
        found[IFLA_IFNAME].rstrip(b"\0").decode(),
        found.get(IFLA_ADDRESS, b"").hex(":"),
        _number(found, IFLA_MTU),
        bool(flags & IFF_UP),
        bool(flags & IFF_LOWER_UP),
        tun.get(IFLA_TUN_PERSIST) == b"\0",
    )


def address(body: bytes) -> tuple[int, Interface] | None:
    """Interface index and address; None for one the host does not speak by, or not for long."""
    family, _length, flags, _scope, _index = struct.unpack_from("=BBBBI", body)
    found = attributes(body, 8)
    flags = _number(found, IFA_FLAGS) or flags
    if found.get(IFA_PROTO) == OURS or flags & (IFA_F_UNUSABLE | (IFA_F_TEMPORARY if family == socket.AF_INET6 else 0)):
        return None
    return _interface(body, found)


def tap_address(body: bytes) -> TapAddress | None:
    """An address of ours, None for any other."""
    found = attributes(body, 8)
    return TapAddress(*_interface(body, found)) if found.get(IFA_PROTO) == OURS else None


def _interface(body: bytes, found: dict[int, bytes]) -> tuple[int, Interface]:
    _family, length, _flags, _scope, index = struct.unpack_from("=BBBBI", body)
    return index, ip_interface((found.get(IFA_LOCAL) or found[IFA_ADDRESS], length))


def host_route(body: bytes) -> HostRoute | None:
    """A default route or an on-link prefix; None for any other: ours, link-local, multicast."""
    family, length, protocol, kind = body[0], body[1], body[5], body[7]
    found = attributes(body, 12)
    index, gateway = _next_hop(found)
    if kind != RTN_UNICAST or protocol == PROTOCOL or not index or (length and gateway is not None):
        return None
    prefix = ip_network((found.get(RTA_DST, bytes(4 if family == socket.AF_INET else 16)), length))
    if prefix.is_link_local or prefix.is_multicast:
        return None
    return HostRoute(prefix, index, gateway, _number(found, RTA_PRIORITY))


def route(body: bytes) -> Route | None:
    """A route of ours, None for any other."""
    found = attributes(body, 12)
    if body[5] != PROTOCOL or RTA_DST not in found:
        return None
    via, source = (ip_address(found[kind]) if kind in found else None for kind in (RTA_GATEWAY, RTA_PREFSRC))
    prefix = ip_network((found[RTA_DST], body[1]))
    return Route(_number(found, RTA_OIF), prefix, via, source, _number(found, RTA_PRIORITY))


def neighbour(body: bytes) -> tuple[Neighbour | Proxy, bool]:
    """A permanent neighbour or a proxy entry, and whether it is ours."""
    index, state, flags = struct.unpack_from("=iHB", body, 4)
    found = attributes(body, 12)
    ours = found.get(NDA_PROTOCOL) == OURS
    if flags & NTF_PROXY:
        return Proxy(index, ip_address(found[NDA_DST]), bool(flags & NTF_ROUTER)), ours
    mac = found.get(NDA_LLADDR, b"").hex(":")
    return Neighbour(index, ip_address(found[NDA_DST]), mac), ours and bool(state & NUD_PERMANENT)


def events(data: bytes) -> Iterator[Event]:
    for number, _flags, _sequence, body in messages(data):
        if number in (NEWLINK, DELLINK) and body[0] == socket.AF_UNSPEC:  # bridges tell of their ports, too
            yield LinkChanged(link(body), gone=number == DELLINK)
        elif number in (NEWADDR, DELADDR):
            lost = number == DELADDR and tap_address(body) is not None
            yield Changed(struct.unpack_from("=I", body, 4)[0], lost)
        elif number in (NEWROUTE, DELROUTE) and body[4] == RT_TABLE_MAIN:
            index, _gateway = _next_hop(attributes(body, 12))
            yield Changed(index, lost=number == DELROUTE and body[5] == PROTOCOL)
        elif number == NEWNETCONF:
            found = attributes(body, 4)
            off = any(
                kind in found and not _number(found, kind) for kind in (NETCONFA_FORWARDING, NETCONFA_PROXY_NEIGH)
            )
            index = int.from_bytes(found.get(NETCONFA_IFINDEX, b""), sys.byteorder, signed=True)
            yield Changed(max(index, 0), lost=off, setting=True)  # -1, -2: all, default


def _next_hop(found: dict[int, bytes]) -> tuple[int, Address | None]:
    """Interface and gateway; of a multipath route the first one's."""
    if RTA_MULTIPATH in found:
        hop = found[RTA_MULTIPATH]
        length, _flags, _hops, index = struct.unpack_from("=HBBi", hop)
        return index, _gateway(attributes(hop[:length], 8))
    return _number(found, RTA_OIF), _gateway(found)


def _gateway(found: dict[int, bytes]) -> Address | None:
    """RTA_VIA: an IPv4 route by an IPv6 router."""
    raw = found.get(RTA_GATEWAY) or found.get(RTA_VIA, b"")[2:]
    return ip_address(raw) if raw else None


def _number(found: dict[int, bytes], kind: int) -> int:
    return int.from_bytes(found.get(kind, b""), sys.byteorder)
