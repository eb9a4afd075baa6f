"""Netlink messages by pyroute2, which keeps the kernel's structures: written as bytes, and read.

The one room that knows it. To import it takes 65 ms and 12 MiB, most of it for what is not used here: who needs the
network does so in a function. pyroute2 passes over the name of an attribute that it does not know in silence; here it
is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyroute2.netlink import NLMSG_ERROR, nla, nlmsg, nlmsgerr, rtnl
from pyroute2.netlink.nfnetlink import NFNL_SUBSYS_NFTABLES, nfgen_msg
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.ndmsg import ndmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg


def _only(base: type[nlmsg], *names: str) -> tuple[tuple[int, str, str], ...]:
    """Of the attributes of ``base``: to read the others as well costs time for nothing."""
    return tuple((number, each[0], each[1]) for number, each in enumerate(base.nla_map) if each[0] in names)


class _Link(ifinfmsg):
    class linkinfo(nla):
        class tun(nla):
            nla_map = ((6, "IFLA_TUN_PERSIST", "uint8"),)

        nla_map = ((1, "IFLA_INFO_KIND", "asciiz"), (2, "IFLA_INFO_DATA", "tun"))

    nla_map = (
        *_only(ifinfmsg, "IFLA_IFNAME", "IFLA_MTU", "IFLA_EXT_MASK"),
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
    nla_map = nlmsgerr.nla_map


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
}


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


def read(kind: int, data: bytes) -> Any:
    """One message: its fields as items, its attributes by ``get_attr(name)``, None where there is none.

    Raises KeyError for a message of which there is no class here.
    """
    message = (_Ruleset if kind >> 8 == NFNL_SUBSYS_NFTABLES else _CLASSES[kind])(data)
    message.decode()
    return message
