"""Requests, byte by byte as pyroute2 writes them: the same attributes in the same order."""

from __future__ import annotations

import socket
from ipaddress import ip_address, ip_interface, ip_network
from typing import Any

import pytest
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.ndmsg import ndmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from kvmd.network.kernel.rtnetlink import encode
from kvmd.network.model.things import LinkState, Neighbour, Operation, Proxy, Route, TapAddress, Thing

REQUEST, ACK, REPLACE, EXCL, CREATE = 1, 4, 0x100, 0x200, 0x400
MAC = "52:54:00:00:00:01"


def family(text: str) -> dict[str, Any]:
    return {"family": socket.AF_INET6 if ":" in text else socket.AF_INET}


def expected(kind: Any, number: int, how: int, attributes: list[tuple[str, object]], **fields: object) -> bytes:
    message = kind()
    message["header"]["type"], message["header"]["flags"] = number, REQUEST | ACK | how
    message["header"]["sequence_number"] = 7
    message.update(fields)
    message["attrs"] = [list(attribute) for attribute in attributes]
    message.encode()
    return bytes(message.data) + bytes(-len(message.data) % 4)


def check(action: Any, thing: Thing, wanted: bytes) -> None:
    assert encode(Operation(action, thing), 7).hex() == wanted.hex()


def test_tap() -> None:
    attributes: list[tuple[str, object]] = [("IFLA_MTU", 1400), ("IFLA_ADDRESS", MAC)]
    wanted = expected(ifinfmsg, 16, 0, attributes, index=3, flags=1, change=1)
    check("replace", LinkState(3, MAC, 1400), wanted)


@pytest.mark.parametrize(
    ("action", "number", "how"),
    [("add", 24, CREATE | EXCL), ("replace", 24, CREATE | REPLACE), ("remove", 25, 0)],
)
@pytest.mark.parametrize(
    ("prefix", "via", "source", "metric"),
    [
        ("192.0.2.42/32", None, "192.0.2.10", 0),
        ("192.0.2.42/32", None, None, 1024),
        ("198.18.0.0/16", "192.0.2.42", None, 1024),
        ("2001:db8:1::42/128", None, "2001:db8:1::10", 1024),
        ("2001:db8:9::/48", "2001:db8:1::42", None, 1024),
    ],
)
def test_route(
    action: str, number: int, how: int, prefix: str, via: str | None, source: str | None, metric: int
) -> None:
    target, length = prefix.split("/")
    attributes: list[tuple[str, object]] = [("RTA_DST", target), ("RTA_OIF", 3)]
    attributes += [("RTA_PRIORITY", metric)] if metric else []
    attributes += [("RTA_GATEWAY", via)] if via else []
    attributes += [("RTA_PREFSRC", source)] if source else []
    scope = 253 if via is None and ":" not in prefix else 0
    fields = {**family(prefix), "dst_len": int(length), "table": 254, "proto": 171, "type": 1, "scope": scope}
    route = Route(
        3, ip_network(prefix), ip_address(via) if via else None, ip_address(source) if source else None, metric
    )
    check(action, route, expected(rtmsg, number, how, attributes, **fields))


@pytest.mark.parametrize("address", ["192.0.2.42", "2001:db8:1::42"])
@pytest.mark.parametrize(("action", "number", "how"), [("add", 28, CREATE | REPLACE), ("remove", 29, 0)])
def test_neighbour_and_proxy(action: str, number: int, how: int, address: str) -> None:
    tag: list[tuple[str, object]] = [("NDA_PROTOCOL", 171)] if action == "add" else []
    fields = {**family(address), "ifindex": 3, "state": 0x80}
    own: list[tuple[str, object]] = [("NDA_DST", address)]
    wanted = expected(ndmsg, number, how, [*own, ("NDA_LLADDR", MAC), *tag], **fields)
    check(action, Neighbour(3, ip_address(address), MAC), wanted)
    check(action, Proxy(3, ip_address(address)), expected(ndmsg, number, how, [*own, *tag], flags=0x08, **fields))
    wanted = expected(ndmsg, number, how, [*own, *tag], flags=0x88, **fields)
    check(action, Proxy(3, ip_address(address), router=True), wanted)


@pytest.mark.parametrize(("action", "number", "how"), [("add", 20, CREATE | EXCL), ("remove", 21, 0)])
@pytest.mark.parametrize("text", ["169.254.171.171/32", "2001:db8:1::/64"])
def test_address_of_a_tap(action: str, number: int, how: int, text: str) -> None:
    address, length = text.split("/")
    attributes: list[tuple[str, object]] = [("IFA_LOCAL", address), ("IFA_ADDRESS", address), ("IFA_PROTO", 171)]
    attributes += [("IFA_FLAGS", 0x202)]
    attributes += [("IFA_CACHEINFO", {"ifa_preferred": 0, "ifa_valid": 0xFFFFFFFF})] if ":" in text else []
    fields = {**family(text), "prefixlen": int(length), "index": 3, "scope": 0 if ":" in text else 254}
    check(action, TapAddress(3, ip_interface(text)), expected(ifaddrmsg, number, how, attributes, **fields))
