"""rtnetlink as bytes, compared with what was taken from a kernel: pyroute2 drops names it does not know in silence.

``requests`` has the bytes that kernel 6.18 was asked with, ``answers`` those it gave: reader, value, bytes in hex. Used
here, and on hosts with another pyroute2.
"""

from __future__ import annotations

import difflib
import importlib.metadata
from collections.abc import Iterator
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path
from typing import Literal

from kvmd.network.kernel import netlink, rtnetlink
from kvmd.network.model.things import LinkState, Neighbour, Operation, Proxy, Route, TapAddress, Thing

HERE = Path(__file__).parent
MAC = "52:54:00:00:00:01"
ROUTES = [
    ("192.0.2.42/32", None, "192.0.2.10", 0),
    ("192.0.2.42/32", None, None, 1024),
    ("198.18.0.0/16", "192.0.2.42", None, 1024),
    ("2001:db8:1::42/128", None, "2001:db8:1::10", 1024),
    ("2001:db8:9::/48", "2001:db8:1::42", None, 1024),
]
THINGS: list[Thing] = [
    LinkState(3, MAC, 1400),
    LinkState(3, MAC, 1400, up=False),
    *(
        Route(3, ip_network(to), ip_address(via) if via else None, ip_address(source) if source else None, metric)
        for to, via, source, metric in ROUTES
    ),
    *(TapAddress(3, ip_interface(text)) for text in ("169.254.171.171/32", "2001:db8:1::/64")),
    *(
        thing
        for own in map(ip_address, ("192.0.2.42", "2001:db8:1::42"))
        for thing in (Neighbour(3, own, MAC), Proxy(3, own), Proxy(3, own, router=True))
    ),
]


def requests() -> Iterator[str]:
    """Name and bytes of each, and of each dump."""
    actions: tuple[Literal["add", "replace", "remove"], ...] = ("add", "replace", "remove")
    asked = {repr(item): rtnetlink.request(item) for thing in THINGS for item in (Operation(a, thing) for a in actions)}
    asked |= {
        "links": rtnetlink.ask_links(),
        "addresses": rtnetlink.ask_addresses(),
        "addresses of 3": rtnetlink.ask_addresses(3),
        "routes": rtnetlink.ask_routes(2),
        "routes of ours to 3": rtnetlink.ask_routes(10, 171, 3),
        "neighbours": rtnetlink.ask_neighbours(),
        "neighbours on 3": rtnetlink.ask_neighbours(3),
        "proxies": rtnetlink.ask_proxies(),
    }
    for name, request in asked.items():
        yield f"{name}\t{request.encode(7).hex()}"


def answers() -> Iterator[str]:
    """Reader, what it makes of the bytes, and these."""
    for line in (HERE / "answers").read_text().splitlines():
        reader, _value, data = line.split("\t")
        (message,) = rtnetlink.messages(bytes.fromhex(data))
        match reader:
            case "events":
                found: object = list(rtnetlink.events(message.data))
            case "refusal":
                found = netlink.refusal(message)
            case _:
                found = getattr(rtnetlink, reader)(message.read())
        yield f"{reader}\t{found!r}\t{data}"


def differences() -> list[str]:
    """Lines of diff(1) between the files and what is written and read now."""
    found: list[str] = []
    for name, lines in (("requests", requests()), ("answers", answers())):
        found += difflib.unified_diff((HERE / name).read_text().splitlines(), list(lines), "kernel", name, n=0)
    return found


def version() -> str:
    return importlib.metadata.version("pyroute2")
