"""rtnetlink(7): requests out of operations, values out of answers and events.

What the bytes are, ``codec`` knows; it is imported when something is first written or read.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import ip_address, ip_interface, ip_network
from typing import Any, NamedTuple, TypeVar

from kvmd.guest import Address
from kvmd.network.model.host import HostRoute, Interface, Link
from kvmd.network.model.things import PROTOCOL, LinkState, Neighbour, Operation, Proxy, Route, Setting, TapAddress

# linux/rtnetlink.h, netlink.h, if.h, if_addr.h, if_link.h, neighbour.h
NEWLINK, DELLINK, GETLINK, NEWADDR, DELADDR, GETADDR = 16, 17, 18, 20, 21, 22
NEWROUTE, DELROUTE, GETROUTE, NEWNEIGH, DELNEIGH, GETNEIGH, NEWNETCONF = 24, 25, 26, 28, 29, 30, 80
NEWRULE, DELRULE = 32, 33
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP = 0x1, 0x4, 0x300
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE = 0x100, 0x200, 0x400
IFF_UP, IFF_LOWER_UP, RTEXT_FILTER_SKIP_STATS = 0x1, 0x10000, 8
IFF_LOOPBACK, IFF_POINTOPOINT, IFF_NOARP = 0x8, 0x10, 0x80
IFA_F_NODAD, IFA_F_NOPREFIXROUTE, INFINITE = 0x02, 0x200, 0xFFFFFFFF
IFA_F_TEMPORARY, IFA_F_UNUSABLE = 0x01, 0x08 | 0x20 | 0x40  # unusable: dadfailed, deprecated, tentative
RT_TABLE_MAIN, RTN_UNICAST, RT_SCOPE_UNIVERSE, RT_SCOPE_LINK, RT_SCOPE_HOST = 254, 1, 0, 253, 254
NTF_PROXY, NTF_ROUTER, NUD_PERMANENT = 0x08, 0x80, 0x80

WIDE = 4  # prefix length: VPNs put 0.0.0.0/1 and 128.0.0.0/1, or 2000::/4, before the default route

HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
MEMORY = 1 << 14  # messages whose values are kept: those of 1,500 guests


@dataclass(frozen=True, slots=True)
class LinkChanged:
    """RTM_NEWLINK, RTM_DELLINK."""

    link: Link
    gone: bool


@dataclass(frozen=True, slots=True)
class Changed:
    """An address, a route or a setting of interface ``device`` (0: of all). ``lost``: of ours, perhaps.

    ``ways``: packets to the world may go by another interface now, for a rule or a route of any table.
    """

    device: int
    lost: bool = False
    setting: bool = False
    ways: bool = False


Event = LinkChanged | Changed
T = TypeVar("T")


def load() -> None:
    """Import ``codec``, before it is needed: in a thread, for it takes 70 ms."""
    import kvmd.network.kernel.codec  # noqa: F401


# --- requests ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Request:
    """RTM_*, NLM_F_*, the fields that are not 0, the attributes in their order."""

    kind: int
    flags: int
    fields: Mapping[str, int] = field(default_factory=dict)
    attributes: Mapping[str, object] = field(default_factory=dict)

    def encode(self, sequence: int) -> bytes:
        from kvmd.network.kernel import codec

        return codec.encode(self.kind, NLM_F_REQUEST | self.flags, sequence, self.fields, self.attributes)


def request(operation: Operation) -> Request:
    """One that asks for an answer. Not for a Setting: that is written below /proc."""
    thing = operation.thing
    remove = operation.action == "remove"
    create = NLM_F_CREATE | (NLM_F_REPLACE if operation.action == "replace" else NLM_F_EXCL)
    fields: dict[str, int]
    attributes: dict[str, object]
    match thing:
        case LinkState():
            number, how = NEWLINK, 0
            fields = {"index": thing.device, "flags": IFF_UP * thing.up, "change": IFF_UP}
            attributes = {"IFLA_MTU": thing.mtu}
            if not (isinstance(operation.was, LinkState) and operation.was.mac == thing.mac):
                # Even the MAC that it has: the kernel forgets all neighbours, permanent ones, too (neigh_changeaddr).
                attributes["IFLA_ADDRESS"] = bytes.fromhex(thing.mac.replace(":", ""))
        case TapAddress():
            number, how = (DELADDR, 0) if remove else (NEWADDR, create)
            own, length = thing.interface.ip, thing.interface.network.prefixlen
            scope = RT_SCOPE_HOST if own.version == 4 else RT_SCOPE_UNIVERSE
            fields = {"family": _family(own), "prefixlen": length, "scope": scope, "index": thing.device}
            attributes = {"IFA_LOCAL": str(own), "IFA_ADDRESS": str(own), "IFA_PROTO": PROTOCOL}
            attributes["IFA_FLAGS"] = IFA_F_NODAD | IFA_F_NOPREFIXROUTE
            if own.version == 6:  # deprecated at once: the last to be chosen as source
                attributes["IFA_CACHEINFO"] = {"ifa_preferred": 0, "ifa_valid": INFINITE}
        case Route():
            number, how = (DELROUTE, 0) if remove else (NEWROUTE, create)
            target, length = thing.prefix.network_address, thing.prefix.prefixlen
            scope = RT_SCOPE_LINK if thing.via is None and target.version == 4 else RT_SCOPE_UNIVERSE
            fields = {"family": _family(target), "dst_len": length, "scope": scope}
            fields |= {"table": RT_TABLE_MAIN, "proto": PROTOCOL, "type": RTN_UNICAST}
            attributes = {"RTA_DST": str(target), "RTA_OIF": thing.device}
            attributes |= {"RTA_PRIORITY": thing.metric} if thing.metric else {}
            attributes |= {"RTA_GATEWAY": str(thing.via)} if thing.via else {}
            attributes |= {"RTA_PREFSRC": str(thing.source)} if thing.source else {}
        case Neighbour() | Proxy():
            # Whoever else has put an entry there is looked for before; NLM_F_EXCL is no error for proxies anyway.
            number, how = (DELNEIGH, 0) if remove else (NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE)
            flags = NTF_PROXY | NTF_ROUTER * thing.router if isinstance(thing, Proxy) else 0
            # A proxy entry without NUD_PERMANENT vanishes, silently, when the uplink loses its carrier.
            fields = {"family": _family(thing.address), "ifindex": thing.device, "state": NUD_PERMANENT, "flags": flags}
            attributes = {"NDA_DST": str(thing.address)}
            attributes |= {"NDA_LLADDR": thing.mac} if isinstance(thing, Neighbour) else {}
            attributes |= {} if remove else {"NDA_PROTOCOL": PROTOCOL}
        case Setting():
            raise TypeError(f"{thing} is no matter of netlink's")
    return Request(number, NLM_F_ACK | how, fields, attributes)


def ask_links() -> Request:
    return Request(GETLINK, NLM_F_DUMP, {}, {"IFLA_EXT_MASK": RTEXT_FILTER_SKIP_STATS})


def ask_addresses(device: int = 0) -> Request:
    return Request(GETADDR, NLM_F_DUMP, {"index": device})


def ask_routes(family: int, protocol: int = 0, device: int = 0) -> Request:
    """Of table main; the kernel itself leaves out what is not asked for (NETLINK_GET_STRICT_CHK)."""
    fields = {"family": family, "table": RT_TABLE_MAIN, "proto": protocol}
    return Request(GETROUTE, NLM_F_DUMP, fields, {"RTA_OIF": device} if device else {})


@dataclass(frozen=True, slots=True)
class Way:
    """Where would a packet go that comes in by ``device``? Written here: of all guests at once ``codec`` takes long."""

    device: int
    source: Address
    target: Address

    def encode(self, sequence: int) -> bytes:
        """linux/rtnetlink.h: struct rtmsg, RTA_SRC, RTA_DST, RTA_IIF."""
        bits, size = self.target.max_prefixlen, len(self.target.packed) + 4
        body = struct.pack("=BBB9x", _family(self.target), bits, bits)
        body += struct.pack("=HH", size, 2) + self.source.packed + struct.pack("=HH", size, 1) + self.target.packed
        body += struct.pack("=HHI", 8, 3, self.device)
        return HEADER.pack(HEADER.size + len(body), GETROUTE, NLM_F_REQUEST, sequence, 0) + body


def ask_neighbours(device: int = 0) -> Request:
    return Request(GETNEIGH, NLM_F_DUMP, {}, {"NDA_IFINDEX": device} if device else {})


def ask_proxies() -> Request:
    return Request(GETNEIGH, NLM_F_DUMP, {"flags": NTF_PROXY})


def ask_proxy(proxy: Proxy) -> Request:
    """Is there one like this?"""
    fields = {"family": _family(proxy.address), "ifindex": proxy.device, "flags": NTF_PROXY}
    return Request(GETNEIGH, 0, fields, {"NDA_DST": str(proxy.address)})


def _family(address: Address) -> int:
    return socket.AF_INET if address.version == 4 else socket.AF_INET6


# --- answers and events -----------------------------------------------------------------------------------------------


class Message(NamedTuple):
    """One of a datagram; ``data`` with its header."""

    kind: int
    flags: int
    sequence: int
    data: bytes

    @property
    def payload(self) -> bytes:
        return self.data[HEADER.size :]

    def read(self) -> Any:
        """Fields as items, attributes by ``get_attr(name)``. Takes 20 to 80 µs."""
        from kvmd.network.kernel import codec

        return codec.read(self.kind, self.data)

    def value(self, reader: Callable[[Any], T]) -> T:
        """What ``reader`` makes of it; read only if there was none with the same values: 3 to 20 µs."""
        from kvmd.network.kernel import codec

        found: T = _value(reader, self.kind, codec.lean(self.kind, self.data))
        return found

    def field(self, name: str) -> int:
        """One field only, in 1 µs."""
        from kvmd.network.kernel import codec

        return codec.field(self.kind, self.data, name)


@lru_cache(maxsize=MEMORY)
def _value(reader: Callable[[Any], Any], kind: int, data: bytes) -> Any:
    from kvmd.network.kernel import codec

    return reader(codec.read(kind, data))


def messages(data: bytes) -> Iterator[Message]:
    offset = 0
    while offset + HEADER.size <= len(data):
        length, kind, flags, sequence, _port = HEADER.unpack_from(data, offset)
        yield Message(kind, flags, sequence, data[offset : offset + length])
        offset += (length + 3) & ~3


def link(body: Any) -> Link:
    mac = body.get_attr("IFLA_ADDRESS") or b""
    info, properties = body.get_attr("IFLA_LINKINFO"), body.get_attr("IFLA_PROP_LIST")
    tun = info.get_attr("IFLA_INFO_DATA") if info and info.get_attr("IFLA_INFO_KIND") == "tun" else None
    return Link(
        body["index"],
        body.get_attr("IFLA_IFNAME"),
        mac.hex(":"),
        body.get_attr("IFLA_MTU", 0),
        bool(body["flags"] & IFF_UP),
        bool(body["flags"] & IFF_LOWER_UP),
        tun is not None and tun.get_attr("IFLA_TUN_PERSIST") == 0,
        not body["flags"] & (IFF_LOOPBACK | IFF_POINTOPOINT | IFF_NOARP),
        tuple(properties.get_attrs("IFLA_ALT_IFNAME")) if properties else (),
    )


def address(body: Any) -> tuple[int, Interface] | None:
    """Interface index and address; None for one the host does not speak by, or not for long."""
    flags = body.get_attr("IFA_FLAGS") or body["flags"]
    temporary = IFA_F_TEMPORARY if body["family"] == socket.AF_INET6 else 0
    if body.get_attr("IFA_PROTO") == PROTOCOL or flags & (IFA_F_UNUSABLE | temporary):
        return None
    return _interface(body)


def tap_address(body: Any) -> TapAddress | None:
    """An address of ours, None for any other."""
    return TapAddress(*_interface(body)) if body.get_attr("IFA_PROTO") == PROTOCOL else None


def _interface(body: Any) -> tuple[int, Interface]:
    own = body.get_attr("IFA_LOCAL") or body.get_attr("IFA_ADDRESS")
    return body["index"], ip_interface((own, body["prefixlen"]))


def host_route(body: Any) -> HostRoute | None:
    """A default route or an on-link prefix; None for any other: link-local, multicast."""
    if body["type"] != RTN_UNICAST:
        return None
    index, gateway = _next_hop(body)
    if not index or (body["dst_len"] and gateway is not None):
        return None
    anything = "0.0.0.0" if body["family"] == socket.AF_INET else "::"
    prefix = ip_network((body.get_attr("RTA_DST") or anything, body["dst_len"]))
    if prefix.is_link_local or prefix.is_multicast:
        return None
    return HostRoute(prefix, index, gateway, body.get_attr("RTA_PRIORITY", 0))


def way(body: Any) -> int:
    """The interface by which a packet goes on, 0 for none."""
    return _next_hop(body)[0] if body["type"] == RTN_UNICAST else 0


def route(body: Any) -> Route | None:
    """A route of ours, None for any other."""
    target = body.get_attr("RTA_DST")
    if body["proto"] != PROTOCOL or target is None:
        return None
    via, source = map(_address, (body.get_attr("RTA_GATEWAY"), body.get_attr("RTA_PREFSRC")))
    prefix = ip_network((target, body["dst_len"]))
    return Route(body.get_attr("RTA_OIF", 0), prefix, via, source, body.get_attr("RTA_PRIORITY", 0))


def neighbour(body: Any) -> tuple[Neighbour | Proxy, bool]:
    """A permanent neighbour or a proxy entry, and whether it is ours."""
    index, own = body["ifindex"], ip_address(body.get_attr("NDA_DST"))
    ours = body.get_attr("NDA_PROTOCOL") == PROTOCOL
    if body["flags"] & NTF_PROXY:
        return Proxy(index, own, bool(body["flags"] & NTF_ROUTER)), ours
    return Neighbour(index, own, body.get_attr("NDA_LLADDR", "")), ours and bool(body["state"] & NUD_PERMANENT)


def events(data: bytes) -> Iterator[Event]:
    """Nothing of what we make ourselves: routes that come."""
    return (event for message in messages(data) if (event := _event(message)) is not None)


def _event(message: Message) -> Event | None:
    kind = message.kind
    if kind in (NEWLINK, DELLINK) and message.field("family") == socket.AF_UNSPEC:  # bridges tell of their ports, too
        return LinkChanged(link(message.read()), gone=kind == DELLINK)
    if kind in (NEWADDR, DELADDR):
        lost = kind == DELADDR and message.read().get_attr("IFA_PROTO") == PROTOCOL
        return Changed(message.field("index"), lost)
    if kind in (NEWRULE, DELRULE):
        return Changed(0, ways=True)
    if kind in (NEWROUTE, DELROUTE):
        main, ours = message.field("table") == RT_TABLE_MAIN, message.field("proto") == PROTOCOL
        wide = message.field("dst_len") <= WIDE
        if (main or wide) and not (ours and kind == NEWROUTE):
            return Changed(_next_hop(message.read())[0] if main else 0, lost=ours, ways=wide)
    if kind == NEWNETCONF:
        body = message.read()
        off = 0 in (body.get_attr("NETCONFA_FORWARDING"), body.get_attr("NETCONFA_PROXY_NEIGH"))
        return Changed(max(body.get_attr("NETCONFA_IFINDEX", 0), 0), lost=off, setting=True)  # -1, -2: all, default
    return None


def _next_hop(body: Any) -> tuple[int, Address | None]:
    """Interface and gateway; of a multipath route the first one's."""
    hops = body.get_attr("RTA_MULTIPATH")
    if hops:
        return hops[0]["oif"], _gateway(hops[0])
    return body.get_attr("RTA_OIF", 0), _gateway(body)


def _gateway(body: Any) -> Address | None:
    """RTA_VIA: an IPv4 route by an IPv6 router."""
    via = body.get_attr("RTA_VIA")
    return _address(via["addr"] if via else body.get_attr("RTA_GATEWAY"))


def _address(text: str | None) -> Address | None:
    return ip_address(text) if text else None
