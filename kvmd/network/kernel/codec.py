"""Netlink messages by pyroute2, which keeps the kernel's structures: written as bytes, and read.

The one room that knows it. To import it takes 65 ms and 12 MiB, most of it for what is not used here: who needs the
network does so in a function. pyroute2 passes over the name of an attribute that it does not know in silence; here it
is an error.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

from pyroute2.netlink import NLMSG_ERROR, nla, nlmsg, nlmsgerr, rtnl
from pyroute2.netlink.nfnetlink import NFNL_SUBSYS_NFTABLES, nfgen_msg
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.ndmsg import ndmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

_HEADER, _ATTRIBUTE = struct.Struct("=IHHII"), struct.Struct("=HH")  # linux/netlink.h, struct nlmsghdr, nlattr
NLA_TYPE_MASK = 0x3FFF
NFT_MSG_MAX = 64  # linux/netfilter/nf_tables.h has 36


def _only(base: type[nlmsg], *names: str) -> tuple[tuple[int, str, str], ...]:
    """Of the attributes of ``base``: to read the others as well costs time for nothing."""
    return tuple((number, each[0], each[1]) for number, each in enumerate(base.nla_map) if each[0] in names)


class _Link(ifinfmsg):
    class linkinfo(nla):
        class tun(nla):
            nla_map = ((6, "IFLA_TUN_PERSIST", "uint8"),)

        nla_map = ((1, "IFLA_INFO_KIND", "asciiz"), (2, "IFLA_INFO_DATA", "tun"))

    class properties(nla):
        nla_map = ((53, "IFLA_ALT_IFNAME", "asciiz"),)

    nla_map = (
        *_only(ifinfmsg, "IFLA_IFNAME", "IFLA_MTU", "IFLA_EXT_MASK"),
        (52, "IFLA_PROP_LIST", "properties"),
        (1, "IFLA_ADDRESS", "cdata"),  # of whatever length: tunnels and InfiniBand have no MACs
        (18, "IFLA_LINKINFO", "linkinfo"),
    )


class _Address(ifaddrmsg):
    nla_map = (
        *_only(ifaddrmsg, "IFA_ADDRESS", "IFA_LOCAL", "IFA_CACHEINFO", "IFA_FLAGS"),
        (11, "IFA_PROTO", "uint8"),  # unknown before 0.9
    )


class _Route(rtmsg):
    nla_map = _only(
        rtmsg, "RTA_DST", "RTA_OIF", "RTA_GATEWAY", "RTA_PRIORITY", "RTA_PREFSRC", "RTA_MULTIPATH", "RTA_VIA"
    )


class _Neighbour(ndmsg):
    nla_map = (
        *_only(ndmsg, "NDA_DST", "NDA_LLADDR", "NDA_IFINDEX"),
        (12, "NDA_PROTOCOL", "uint8"),  # unknown before 0.9
    )


class _NetConf(nlmsg):
    """linux/netconf.h, which pyroute2 has not."""

    fields = (("family", "B"), ("__pad", "3x"))
    nla_map = (
        (1, "NETCONFA_IFINDEX", "int32"),
        (2, "NETCONFA_FORWARDING", "int32"),
        (5, "NETCONFA_PROXY_NEIGH", "int32"),
    )


class _Answer(nlmsg):
    """With NETLINK_CAP_ACK: after the error comes the header of the request, and no more of it."""

    fields = (("error", "i"), ("request", "16s"))
    nla_map = _only(nlmsgerr, "NLMSGERR_ATTR_MSG")


class _Ruleset(nfgen_msg):
    """linux/netfilter/nf_tables.h: the table's name is the first attribute of them all."""

    nla_map = ((1, "NFTA_TABLE_NAME", "asciiz"),)


_CLASSES: dict[int, type[nlmsg]] = {
    **dict.fromkeys((rtnl.RTM_NEWLINK, rtnl.RTM_DELLINK, rtnl.RTM_GETLINK), _Link),
    **dict.fromkeys((rtnl.RTM_NEWADDR, rtnl.RTM_DELADDR, rtnl.RTM_GETADDR), _Address),
    **dict.fromkeys((rtnl.RTM_NEWROUTE, rtnl.RTM_DELROUTE, rtnl.RTM_GETROUTE), _Route),
    **dict.fromkeys((rtnl.RTM_NEWNEIGH, rtnl.RTM_DELNEIGH, rtnl.RTM_GETNEIGH), _Neighbour),
    rtnl.RTM_NEWNETCONF: _NetConf,
    NLMSG_ERROR: _Answer,
    **dict.fromkeys((NFNL_SUBSYS_NFTABLES << 8 | number for number in range(NFT_MSG_MAX)), _Ruleset),
}


def _places(base: type[nlmsg]) -> dict[str, tuple[int, str]]:
    """Offset and format of each field, as pyroute2's own decoder goes through them."""
    places, offset = {}, sum(struct.calcsize(each[1]) for each in base.header)
    for name, form in base.fields:
        places[name] = offset, form
        offset += struct.calcsize(form)
    return places


def _wanted(base: type[nlmsg]) -> tuple[int, set[int]]:
    """Where the attributes begin, and which of them are read."""
    size = sum(struct.calcsize(each[1]) for each in (*base.header, *base.fields))
    return size + 3 & ~3, {each[0] for each in base.nla_map if not each[1].endswith("CACHEINFO")}


_PLACES = {kind: _places(known) for kind, known in _CLASSES.items()}
_LEAN = {kind: _wanted(known) for kind, known in _CLASSES.items()}


def encode(kind: int, flags: int, sequence: int, fields: Mapping[str, int], attributes: Mapping[str, object]) -> bytes:
    """One message. Raises KeyError for an attribute of which there is no class here."""
    message = _CLASSES[kind]()
    message["header"] = {"type": kind, "flags": flags, "sequence_number": sequence}
    message.update(fields)
    if unknown := [name for name in attributes if not message.valid_nla(name)]:
        raise KeyError(*unknown)
    message["attrs"] = list(attributes.items())
    message.encode()
    return bytes(message.data) + bytes(-len(message.data) % 4)


def lean(kind: int, data: bytes) -> bytes:
    """The message as one that is equal as long as its values are: without ages and what nobody here reads.

    pyroute2 makes an object of every attribute, known or not; an interface has sixty.
    """
    start, wanted = _LEAN[kind]
    kept = [data[_HEADER.size : start]]
    offset = start
    while offset + _ATTRIBUTE.size <= len(data):
        length, number = _ATTRIBUTE.unpack_from(data, offset)
        end = offset + max(length + 3 & ~3, _ATTRIBUTE.size)
        if number & NLA_TYPE_MASK in wanted:
            kept.append(data[offset:end])
        offset = end
    body = b"".join(kept)
    return _HEADER.pack(_HEADER.size + len(body), kind, 0, 0, 0) + body


def read(kind: int, data: bytes) -> Any:
    """One message: its fields as items, its attributes by ``get_attr(name)``, None where there is none.

    Raises KeyError for a message of which there is no class here.
    """
    message = _CLASSES[kind](lean(kind, data))
    message.decode()
    return message


def field(kind: int, data: bytes, name: str) -> int:
    """One of the fields of a message, which is not read for it."""
    offset, form = _PLACES[kind][name]
    value: int = struct.unpack_from(form, data, offset)[0]
    return value
