"""ARP (RFC 826, 5227) and IPv6 neighbour discovery (RFC 4861, 4862) that the kernel does not speak for the guests.

* On a tap: the guest may solicit any address of its LAN; the kernel answers only for listed ones, we for the rest.
* On an uplink: announcements of a guest's addresses, the question whether an address is in use before it is claimed,
  the answer to other machines' ARP probes (sender 0.0.0.0: the kernel keeps silent), and an ear for conflicts.

Two packet sockets (packet(7)) serve all taps and uplinks: closing one takes 16 ms. Their filters, in the kernel, let
pass only what concerns a guest; they are made anew when taps come and go.
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import socket
import struct
from collections.abc import Callable, Iterable, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from itertools import chain

from kvmd.guest import Address
from kvmd.network.model.host import Link, Wire
from kvmd.network.model.plan import TAP_MAC
from kvmd.network.wire.frames import (
    ADVERTISEMENT,
    ALL_NODES,
    DROP,
    ETH_P_ARP,
    ETH_P_IPV6,
    OVERRIDE,
    REPLY,
    REQUEST,
    SOLICITATION,
    SOLICITED,
    UNSPECIFIED,
    advertise,
    arp,
    arp_filter,
    group_mac,
    link_local,
    mac_bytes,
    nd_filter,
    pack,
    solicit,
)
from kvmd.network.wire.vicinity import Verdict, Vicinity

PROBES, INTERVAL = 3, 0.08  # RFC 5227 waits some seconds; a start does not: a machine on the LAN answers in 1 ms
SO_ATTACH_FILTER = 26
SIOCGIFHWADDR = 0x8927  # netdevice(7)
LOT = 64  # frames read before other tasks have their turn
RATE, BURST = 100.0, 300.0  # solicitations answered per second and tap; an honest guest asks for a handful
CROWD = 10  # times as much for an uplink: there is a whole LAN at it
CURIOUS = 0.02  # of it, where the LAN is asked: that takes two new filters, each of 5 ms for 1,000 guests
MUTE = 1.0  # seconds for which the kernel's filter drops those of an interface with more


@dataclass(slots=True)
class _Bucket:
    many: float
    level: float = BURST
    since: float = 0.0

    def take(self, now: float) -> bool:
        self.level = min(BURST * self.many, self.level + (now - self.since) * RATE * self.many)
        self.since = now
        if self.level < 1:
            return False
        self.level -= 1
        return True


@dataclass(slots=True, eq=False)
class _Question:
    """An address somebody waits for; ``answer`` is the MAC that has it."""

    uplink: int
    address: Address
    answer: asyncio.Future[str] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Neighbours:
    """What is said on taps and uplinks in the guests' name."""

    def __init__(self, conflict: Callable[[int, Address, str], None], sent: Callable[[int, IPv4Address], None]) -> None:
        """``conflict(uplink index, guest's address, MAC)``: another machine uses it. ``sent(tap index, address)``: the
        sender of a guest's ARP, to which the kernel gives no answer unless it is the guest's own. Needs a running loop.

        Raises OSError.
        """
        self._conflict, self._sent = conflict, sent
        self._taps: Mapping[int, Vicinity] = {}
        self._claims: Mapping[int, Set[Address]] = {}
        self._uplinks: Mapping[int, Wire] = {}
        self._macs: frozenset[str] = frozenset()
        self._buckets: dict[int, _Bucket] = {}
        self._curious: dict[int, _Bucket] = {}
        self._muted: dict[int, asyncio.TimerHandle] = {}
        self._questions: list[_Question] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._filters: tuple[bytes, bytes] | None = None
        self._arp, self._nd = _packet_socket(ETH_P_ARP), _packet_socket(ETH_P_IPV6)
        self._filter()
        loop = asyncio.get_running_loop()
        loop.add_reader(self._arp.fileno(), self._read, self._arp, self._heard_arp)
        loop.add_reader(self._nd.fileno(), self._read, self._nd, self._heard_nd)

    async def close(self) -> None:
        loop = asyncio.get_running_loop()
        for handle in self._muted.values():
            handle.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for sock in (self._arp, self._nd):
            loop.remove_reader(sock.fileno())
        await asyncio.gather(*(asyncio.to_thread(sock.close) for sock in (self._arp, self._nd)))

    def serve(
        self,
        taps: Mapping[int, Vicinity],
        uplinks: Mapping[int, Wire],
        claims: Mapping[int, Set[Address]],
        macs: Iterable[str],
    ) -> None:
        """From now on: answer the guests behind ``taps``; defend ``claims``, sets of their addresses by uplink.

        All keys are interface indices. ``macs``: the host's own, which are in conflict with nobody.
        """
        same = taps.keys() == self._taps.keys() and claims == self._claims
        self._taps, self._uplinks, self._claims, self._macs = taps, uplinks, claims, frozenset(macs)
        if not same:
            many = {**dict.fromkeys(claims, CROWD), **dict.fromkeys(taps, 1)}
            self._buckets = {index: self._buckets.get(index) or _Bucket(each) for index, each in many.items()}
            self._curious = {index: self._curious.get(index) or _Bucket(CURIOUS) for index in taps}
            self._filter()

    def announce(self, wire: Wire, addresses: Iterable[Address]) -> None:
        """Tell the LAN at once where ``addresses`` are: gratuitous ARP, unsolicited advertisement with Override.

        Without, a neighbour that knew another MAC is cut off for some 8 s. The uplink's MAC is that of this moment: the
        event that tells of another one may still wait to be read.
        """
        try:
            mac = fcntl.ioctl(self._arp, SIOCGIFHWADDR, struct.pack("40s", wire.link.name.encode()))[18:24]
        except OSError:
            return  # gone, or renamed
        for address in addresses:
            if isinstance(address, IPv4Address):
                self._send(self._arp, wire.link, ETH_P_ARP, arp(mac, REQUEST, address, address))
            else:
                frame = advertise(mac, wire.source or address, ALL_NODES, group_mac(ALL_NODES), address, OVERRIDE)
                self._send(self._nd, wire.link, ETH_P_IPV6, frame)

    async def holders(self, wire: Wire, addresses: Iterable[Address]) -> dict[Address, str]:
        """Which of ``addresses`` other machines of the LAN hold, and their MACs; takes 0.24 s, less if one answers."""
        questions = [_Question(wire.link.index, address) for address in addresses]
        self._questions += questions
        self._filter()
        try:
            for _ in range(PROBES):
                for question in questions:
                    self._ask(wire, question.address)
                waiting = [question.answer for question in questions]
                if questions and (await asyncio.wait(waiting, timeout=INTERVAL, return_when="FIRST_COMPLETED"))[0]:
                    break
        finally:
            for question in questions:
                self._questions.remove(question)
            self._filter()
        return {question.address: question.answer.result() for question in questions if question.answer.done()}

    def _ask(self, wire: Wire, address: Address) -> None:
        mac = mac_bytes(wire.link.mac)
        if isinstance(address, IPv4Address):
            self._send(self._arp, wire.link, ETH_P_ARP, arp(mac, REQUEST, IPv4Address(0), address))
        else:
            self._send(self._nd, wire.link, ETH_P_IPV6, solicit(mac, UNSPECIFIED, address))

    def _send(self, sock: socket.socket, link: Link, protocol: int, frame: bytes) -> None:
        """An interface that is down or gone hears nothing: the event that says so is on its way."""
        with suppress(OSError):
            sock.sendto(frame, (link.name, protocol))

    def _read(self, sock: socket.socket, heard: Callable[[bytes, int, str], None]) -> None:
        for _ in range(LOT):
            try:
                frame, (name, _protocol, _type, _hatype, _mac) = sock.recvfrom(256)
                heard(frame, socket.if_nametoindex(name), name)
            except BlockingIOError:
                return
            except OSError:
                continue  # the interface went down (ENETDOWN) or away since

    def _heard_arp(self, frame: bytes, index: int, name: str) -> None:
        """On a tap; on an uplink, from or for an address of a guest, or one that is asked for."""
        if len(frame) < 42 or frame[22:28].hex(":") in self._macs or not self._room(index):
            return
        sender, target = IPv4Address(frame[28:32]), IPv4Address(frame[38:42])
        if index in self._taps:
            self._sent(index, sender)
            return
        probe = int(sender) == 0
        self._somebody_has(index, target if probe else sender, frame[22:28].hex(":"), claim=not probe)
        if probe and target in self._claims.get(index, ()) and (wire := self._uplinks.get(index)):
            # The kernel does not answer a probe for a proxied address (net/ipv4/arp.c, arp_process).
            answer = arp(mac_bytes(wire.link.mac), REPLY, target, IPv4Address(0), frame[22:28], frame[22:28])
            self._send(self._arp, wire.link, ETH_P_ARP, answer)

    def _heard_nd(self, frame: bytes, index: int, name: str) -> None:
        """A solicitation on a tap, or on an uplink an advertisement or DAD of an address of a guest, or asked for."""
        if len(frame) < 78 or not self._room(index):
            return
        source, target, kind = IPv6Address(frame[22:38]), IPv6Address(frame[62:78]), frame[54]
        if index in self._taps:
            if kind == SOLICITATION:
                self._solicited(index, name, frame[6:12], source, target)
        elif frame[6:12].hex(":") not in self._macs:
            self._somebody_has(index, target, frame[6:12].hex(":"), claim=kind == ADVERTISEMENT)

    def _room(self, index: int) -> bool:
        """All interfaces share one socket: a guest's flood, or a LAN's, must not displace the others' questions."""
        if index in self._muted:
            return False
        loop = asyncio.get_running_loop()
        bucket = self._buckets.get(index)
        if bucket is None or bucket.take(loop.time()):
            return True
        self._muted[index] = loop.call_later(MUTE, self._unmute, index)
        self._filter()
        return False

    def _unmute(self, index: int) -> None:
        del self._muted[index]
        self._filter()

    def _solicited(self, index: int, name: str, mac: bytes, source: IPv6Address, target: IPv6Address) -> None:
        vicinity, tap = self._taps[index], Link(index, name)
        match vicinity.judge(source, target):
            case Verdict.ANSWER:
                self._advertise(tap, source, mac, target, SOLICITED)
            case Verdict.TAKEN:
                self._advertise(tap, ALL_NODES, group_mac(ALL_NODES), target, OVERRIDE)
            case Verdict.ASK if (wire := self._uplinks.get(vicinity.uplink)) is not None and len(self._tasks) < LOT:
                if self._curious[index].take(asyncio.get_running_loop().time()):
                    task = asyncio.create_task(self._relay(tap, wire, target))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)

    async def _relay(self, tap: Link, wire: Wire, target: IPv6Address) -> None:
        """The guest's duplicate address detection, for an address not assigned to it: ask the LAN."""
        if await self.holders(wire, [target]):
            self._advertise(tap, ALL_NODES, group_mac(ALL_NODES), target, OVERRIDE)

    def _advertise(self, tap: Link, to: IPv6Address, to_mac: bytes, target: IPv6Address, flags: int) -> None:
        frame = advertise(mac_bytes(TAP_MAC), link_local(TAP_MAC), to, to_mac, target, flags)
        self._send(self._nd, tap, ETH_P_IPV6, frame)

    def _somebody_has(self, uplink: int, address: Address, mac: str, claim: bool) -> None:
        """``claim`` false: somebody is only about to take it (it probes); in time for a question, no conflict yet."""
        for question in self._questions:
            if (question.uplink, question.address) == (uplink, address) and not question.answer.done():
                question.answer.set_result(mac)
        if claim and address in self._claims.get(uplink, ()):
            self._conflict(uplink, address, mac)

    def _filter(self) -> None:
        """Both sockets' classic BPF programs, attached if they differ from those at work."""
        uplinks = sorted({*self._claims, *(question.uplink for question in self._questions)} - self._muted.keys())
        taps = list(self._taps.keys() - self._muted)
        watched = [*chain(*self._claims.values()), *(question.address for question in self._questions)]
        four = [int(address) for address in watched if address.version == 4]
        six = [int(address) & 0xFFFFFFFF for address in watched if address.version == 6]
        programs = (
            pack(arp_filter(taps, uplinks, four)),
            pack(nd_filter(taps, uplinks, six)),
        )
        if programs != self._filters:
            _attach(self._arp, programs[0])
            _attach(self._nd, programs[1])
            self._filters = programs


def _packet_socket(protocol: int) -> socket.socket:
    """Hears ``protocol`` on all interfaces, received frames only, once it has a filter that passes something."""
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    sock = socket.socket(socket.AF_PACKET, kind, socket.htons(protocol))
    _attach(sock, pack([DROP]))
    with suppress(BlockingIOError):  # what came in before the filter
        while sock.recv(1):
            pass
    return sock


def _attach(sock: socket.socket, program: bytes) -> None:
    buffer = ctypes.create_string_buffer(program, len(program))
    sock.setsockopt(
        socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer))
    )
