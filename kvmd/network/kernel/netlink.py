"""Requests to the kernel's network and its events, by rtnetlink(7); taps by their ioctl(2).

The kernel runs a request inside sendmsg(2); its answers wait in the socket when that returns. So requests go over a
*blocking* socket, many in one datagram, and cost what the kernel costs: there is nothing to wait for. Events have a
socket of their own: the kernel puts the sequence number of whoever caused them into them.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import suppress

from kvmd.errors import StartFailed
from kvmd.guest import Address
from kvmd.network.kernel import rtnetlink
from kvmd.network.kernel.rtnetlink import NEWNEIGH, NEWROUTE, NUD_PERMANENT, Event, Message, Request, Way, messages
from kvmd.network.model.host import HostRoute, Interface, Link
from kvmd.network.model.things import PROTOCOL, Failure, Neighbour, Operation, Proxy, Route, TapAddress, Thing

NLM_F_DUMP_INTR, NLMSG_ERROR, NLMSG_DONE = 0x10, 2, 3
SOL_NETLINK, ADD_MEMBERSHIP, CAP_ACK, EXT_ACK, GET_STRICT_CHK = 270, 1, 10, 11, 12
# LINK, IPV4_IFADDR, IPV4_ROUTE, IPV4_RULE, IPV6_IFADDR, IPV6_ROUTE, IPV6_RULE, IPV4_NETCONF, IPV6_NETCONF
GROUPS = (1, 5, 7, 8, 9, 11, 19, 24, 25)
SO_RCVBUFFORCE = 33
BUFFER = 4 << 20  # bytes of the socket's receive queue; a link event takes 2.3 kB of it: some 3,600 taps at once
GONE = (errno.ESRCH, errno.ENOENT, errno.ENODEV, errno.ENXIO, errno.EADDRNOTAVAIL)
BATCH = 64  # requests in one datagram: their answers fit into the receive queue
DATAGRAM = 1 << 16

TUNSETIFF, TUNSETOWNER, TUNGETIFF = 0x400454CA, 0x400454CC, 0x800454D2  # linux/if_tun.h
IFF_TAP, IFF_MULTI_QUEUE, IFF_PERSIST, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x0100, 0x0800, 0x1000, 0x4000


class Kernel:
    """Requests in the network namespace it was made in. Every call blocks, for 20 to 40 µs per request."""

    def __init__(self) -> None:
        """Raises OSError."""
        self._socket = _open()
        self._sequence = 0

    def close(self) -> None:
        self._socket.close()

    def links(self) -> list[Link]:
        return [message.value(rtnetlink.link) for message in self._dump(rtnetlink.ask_links())]

    def addresses(self, taps: Container[int] = ()) -> dict[int, tuple[Interface, ...]]:
        """Addresses the host may use as source, by interface index, in the kernel's order: primary ones first.

        Not those of ``taps``.
        """
        found: dict[int, list[Interface]] = {}
        for message in self._dump(rtnetlink.ask_addresses()):
            if message.field("index") not in taps and (item := message.value(rtnetlink.address)) is not None:
                found.setdefault(item[0], []).append(item[1])
        return {index: tuple(interfaces) for index, interfaces in found.items()}

    def tap_addresses(self, device: int = 0) -> list[TapAddress]:
        """Addresses of ours, on ``device`` or (0) on any."""
        dump = self._dump(rtnetlink.ask_addresses(device))
        return [found for message in dump if (found := message.value(rtnetlink.tap_address)) is not None]

    def host_routes(self) -> tuple[HostRoute, ...]:
        """Default routes and on-link prefixes of the main table, without ours."""
        return tuple(
            found
            for family in (socket.AF_INET, socket.AF_INET6)
            for message in self._dump(rtnetlink.ask_routes(family))
            if message.field("proto") != PROTOCOL and (found := message.value(rtnetlink.host_route)) is not None
        )

    def routes(self, device: int = 0) -> list[Route]:
        """Routes of ours, to ``device`` or (0) to any."""
        return [
            found
            for family in (socket.AF_INET, socket.AF_INET6)
            for message in self._dump(rtnetlink.ask_routes(family, PROTOCOL, device))
            if (found := message.value(rtnetlink.route)) is not None
        ]

    def ways(self, journeys: Sequence[tuple[int, Address, Address]]) -> list[int]:
        """By which interface packets leave, 0 for none, that come in by one, from an address, to an address."""
        answers = self._request([Way(*journey) for journey in journeys])
        return [answer.value(rtnetlink.way) if answer.kind == NEWROUTE else 0 for answer in answers]

    def neighbours(self, device: int = 0) -> list[Neighbour]:
        """Permanent neighbours of ours, on ``device`` or (0) on any."""
        return [
            found
            for message in self._dump(rtnetlink.ask_neighbours(device))
            if message.field("state") & NUD_PERMANENT
            for found, ours in (message.value(rtnetlink.neighbour),)
            if ours and isinstance(found, Neighbour)
        ]

    def proxies(self) -> tuple[list[Proxy], list[Proxy]]:
        """Proxy entries: ours, and those of others."""
        return _owned(self._dump(rtnetlink.ask_proxies()))

    def proxies_like(self, wanted: Sequence[Proxy]) -> tuple[list[Proxy], list[Proxy]]:
        """Of these interfaces and addresses; as ``proxies``."""
        answers = self._request([rtnetlink.ask_proxy(proxy) for proxy in wanted])
        return _owned(answer for answer in answers if answer.kind == NEWNEIGH)

    def proxies_unread(self) -> bytes:
        """All proxy entries, only to be compared with what this was before."""
        return b"".join(message.payload for message in self._dump(rtnetlink.ask_proxies()))

    def apply(self, operations: Sequence[Operation]) -> list[Failure]:
        """All of them, in order; one that fails stops none. What was to be removed and is gone is no failure."""
        failures = []
        answers = self._request([rtnetlink.request(operation) for operation in operations])
        for operation, (code, text) in zip(operations, map(refusal, answers), strict=True):
            gone = operation.action == "remove" and code in GONE
            if code and not gone and not (code == errno.EEXIST and self._present(operation.thing)):
                failures.append(Failure(operation, code, text))
        return failures

    def _present(self, thing: Thing) -> bool:
        """A dump of many IPv6 routes misses some while the kernel makes its own for new interfaces."""
        return isinstance(thing, Route) and thing in self.routes(thing.device)

    def _request(self, requests: Sequence[Request | Way]) -> list[Message]:
        """The answer to each."""
        answers: dict[int, Message] = {}
        first = self._sequence + 1
        for start in range(0, len(requests), BATCH):
            batch = requests[start : start + BATCH]
            self._socket.send(b"".join(item.encode(first + start + place) for place, item in enumerate(batch)))
            self._sequence += len(batch)
            while len(answers) < start + len(batch):
                for message in self._receive():
                    if message.sequence >= first:
                        answers[message.sequence] = message
        return [answers[first + place] for place in range(len(requests))]

    def _dump(self, request: Request) -> list[Message]:
        """Raises OSError. A table that changed meanwhile is read again: what is missed would be made twice."""
        while (found := self._dump_once(request)) is None:
            pass
        return found

    def _dump_once(self, request: Request) -> list[Message] | None:
        self._sequence += 1
        self._socket.send(request.encode(self._sequence))
        found: list[Message] = []
        consistent = True
        while True:
            for message in self._receive():
                if message.sequence != self._sequence:
                    continue
                consistent &= not message.flags & NLM_F_DUMP_INTR
                if message.kind == NLMSG_ERROR:
                    code, text = refusal(message)
                    if code in GONE:
                        return []  # the interface asked for has just gone
                    raise OSError(code, text)
                if message.kind == NLMSG_DONE:
                    return found if consistent else None
                found.append(message)

    def _receive(self) -> Iterator[Message]:
        return messages(self._socket.recv(DATAGRAM))


def refusal(message: Message) -> tuple[int, str]:
    """errno, 0 if the request is done, and why, in the kernel's own words if it has any (NETLINK_EXT_ACK)."""
    if not message.field("error"):
        return 0, ""
    body = message.read()
    code = -body["error"]
    return code, body.get_attr("NLMSGERR_ATTR_MSG") or os.strerror(code)


def _owned(messages: Iterable[Message]) -> tuple[list[Proxy], list[Proxy]]:
    """Of neighbour entries the proxies: ours, and those of others."""
    found: tuple[list[Proxy], list[Proxy]] = ([], [])
    for proxy, ours in (message.value(rtnetlink.neighbour) for message in messages):
        if isinstance(proxy, Proxy):
            found[0 if ours else 1].append(proxy)
    return found


class Events:
    """What changes in the kernel, as it changes, given to ``heard`` in lots; ``overflow`` when some were lost."""

    def __init__(self, heard: Callable[[list[Event]], None], overflow: Callable[[], None]) -> None:
        """Listens from now on; needs a running loop. Raises OSError."""
        self._heard, self._overflow = heard, overflow
        self._socket = _open(GROUPS)
        self._socket.setblocking(False)
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self.read)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._socket.fileno())
        self._socket.close()

    def read(self) -> None:
        """Pass on all that is waiting; the loop calls it, and who must not overlook anything."""
        events: list[Event] = []
        lost = False
        while True:
            try:
                events += rtnetlink.events(self._socket.recv(DATAGRAM))
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                lost = True  # the socket itself goes on
        if events:
            self._heard(events)
        if lost:  # not before: what still waited is older than what a look at the kernel shows
            self._overflow()


def open_tap(name: str, queues: int = 1) -> list[int]:
    """Make the tap, or attach to it; the descriptors, one for each queue, hold it in existence: QEMU's ``fds=``.

    Virtio header, not persistent, close-on-exec, non-blocking, root's, as anybody may attach to nobody's. A tap
    that somebody has made with a single queue keeps to that. Takes 0.3 ms. Closing the last descriptor blocks for 16 ms
    and more (RCU). Raises StartFailed. Source: linux/if_tun.h, tuntap.rst.
    """
    fds: list[int] = []
    flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | (IFF_MULTI_QUEUE if queues > 1 else 0)
    try:
        while len(fds) < queues:
            fds.append(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK))
            fcntl.ioctl(fds[-1], TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
        if not struct.unpack_from("H", fcntl.ioctl(fds[0], TUNGETIFF, bytes(40)), 16)[0] & IFF_PERSIST:
            fcntl.ioctl(fds[0], TUNSETOWNER, 0)
    except OSError as error:
        close_all(fds)
        if error.errno == errno.EINVAL and flags & IFF_MULTI_QUEUE:
            return open_tap(name)
        hints = {errno.EBUSY: "another process has it open", errno.ENOENT: "is the module tun loaded?"}
        hint = f" ({hints[error.errno]})" if error.errno in hints else ""
        raise StartFailed(f"cannot open the tap {name}: {error.strerror}{hint}") from error
    return fds


def open_vhost(queues: int) -> list[int]:
    """Descriptors of /dev/vhost-net, one for each queue: the kernel then moves the frames itself. None where it is not.

    The kernel loads the module when the device is opened.
    """
    fds: list[int] = []
    try:
        while len(fds) < queues:
            fds.append(os.open("/dev/vhost-net", os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        close_all(fds)
        return []
    return fds


def close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


def _open(groups: Iterable[int] = ()) -> socket.socket:
    result = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
    with suppress(PermissionError):  # in a user namespace of its own
        result.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
    for option in (CAP_ACK, EXT_ACK, GET_STRICT_CHK):
        result.setsockopt(SOL_NETLINK, option, 1)
    result.bind((0, 0))
    for group in groups:
        result.setsockopt(SOL_NETLINK, ADD_MEMBERSHIP, group)
    return result
