"""ARP (RFC 826) and neighbour discovery (RFC 4861) as bytes: frames to send, and filters for what to hear.

Offsets in frames count from the Ethernet header. A filter is a classic BPF program (linux/filter.h): it runs in the
kernel, and a daemon that is not concerned sleeps on.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address

ETH_P_ARP, ETH_P_IPV6 = 0x0806, 0x86DD
REQUEST, REPLY = 1, 2  # ARP
SOLICITATION, ADVERTISEMENT = 135, 136  # ICMPv6
SOLICITED, OVERRIDE = 0x40, 0x20  # flags of an advertisement
ALL_NODES = IPv6Address("ff02::1")
UNSPECIFIED = IPv6Address("::")
BROADCAST, ZERO = b"\xff" * 6, bytes(6)

Program = list[tuple[int, int, int, int]]  # struct sock_filter
LD_W, LD_H, LD_B, JEQ, JGT, JGE, JA, RET = 0x20, 0x28, 0x30, 0x15, 0x25, 0x35, 0x05, 0x06
IFINDEX = 0xFFFFF000 + 8  # SKF_AD_OFF + SKF_AD_IFINDEX
PASS, DROP = (RET, 0, 0, 256), (RET, 0, 0, 0)
BPF_MAXINSNS = 4096
RANGES = 128  # in one filter; what lies between guests' addresses passes with them: who reads looks again


def arp(
    mac: bytes, operation: int, sender: IPv4Address, target: IPv4Address, to: bytes = BROADCAST, tha: bytes = ZERO
) -> bytes:
    """An Ethernet frame; ``operation`` 1 request, 2 reply."""
    header = struct.pack("!HHHBBH", ETH_P_ARP, 1, 0x0800, 6, 4, operation)
    return to + mac + header + mac + sender.packed + tha + target.packed


def solicit(mac: bytes, source: IPv6Address, target: IPv6Address) -> bytes:
    """A multicast neighbour solicitation; from ``::`` it is duplicate address detection and names no MAC."""
    group = IPv6Address(int(IPv6Address("ff02::1:ff00:0")) | int(target) & 0xFFFFFF)
    option = b"" if source.is_unspecified else b"\x01\x01" + mac
    return _icmp(mac, source, group, group_mac(group), SOLICITATION, bytes(4) + target.packed + option)


def advertise(
    mac: bytes, source: IPv6Address, to: IPv6Address, to_mac: bytes, target: IPv6Address, flags: int
) -> bytes:
    """A neighbour advertisement: ``mac`` has ``target``."""
    body = bytes([flags, 0, 0, 0]) + target.packed + b"\x02\x01" + mac
    return _icmp(mac, source, to, to_mac, ADVERTISEMENT, body)


def link_local(mac: str) -> IPv6Address:
    """The kernel's own choice for an interface of that MAC (addr_gen_mode 0; RFC 4291 appendix A)."""
    raw = mac_bytes(mac)
    return IPv6Address(b"\xfe\x80" + bytes(6) + bytes([raw[0] ^ 2]) + raw[1:3] + b"\xff\xfe" + raw[3:])


def _icmp(mac: bytes, source: IPv6Address, to: IPv6Address, to_mac: bytes, kind: int, body: bytes) -> bytes:
    pseudo = source.packed + to.packed + struct.pack("!IxxxB", 4 + len(body), socket.IPPROTO_ICMPV6)
    words = pseudo + struct.pack("!BBH", kind, 0, 0) + body
    total = sum(struct.unpack(f"!{len(words) // 2}H", words))
    total = (total >> 16) + (total & 0xFFFF)
    checksum = ~(total + (total >> 16)) & 0xFFFF
    header = struct.pack("!HIHBB", ETH_P_IPV6, 6 << 28, 4 + len(body), socket.IPPROTO_ICMPV6, 255)
    return to_mac + mac + header + source.packed + to.packed + struct.pack("!BBH", kind, 0, checksum) + body


def mac_bytes(text: str) -> bytes:
    """``aa:bb:…`` as it goes over the wire."""
    return bytes.fromhex(text.replace(":", ""))


def group_mac(group: IPv6Address) -> bytes:
    """RFC 2464 section 7."""
    return b"\x33\x33" + group.packed[12:]


def ranges(values: Iterable[int], most: int = RANGES) -> list[tuple[int, int]]:
    """First and last of ``most`` ranges at most that hold them all, with as little between as can be."""
    ordered = sorted(set(values))
    if not ordered:
        return []
    gaps = sorted(range(1, len(ordered)), key=lambda place: ordered[place - 1] - ordered[place])[: most - 1]
    starts = [0, *sorted(gaps)]
    ends = [*starts[1:], len(ordered)]
    return [(ordered[start], ordered[end - 1]) for start, end in zip(starts, ends, strict=True)]


def _pass_if(values: Iterable[int]) -> Program:
    return [step for first, last in ranges(values) for step in ((JGE, 0, 2, first), (JGT, 1, 0, last), PASS)]


def _require(*values: int) -> Program:
    """Go on if equal to one of them. The far jump goes by JA: conditional ones reach 255 steps."""
    steps = [
        step
        for place, value in enumerate(values)
        for step in ((JEQ, 0, 1, value), (JA, 0, 0, 2 * (len(values) - place) - 1))
    ]
    return [*steps, DROP]


def arp_filter(taps: list[int], uplinks: list[int], addresses: list[int]) -> Program:
    """On ``uplinks``: sender one of ``addresses``, or a probe (sender 0.0.0.0) for one. On ``taps``: all."""
    claims = _pass_if(addresses)
    return [
        *[(LD_W, 0, 0, IFINDEX), *_pass_if(taps), *_require(*uplinks)],
        *[(LD_W, 0, 0, 28), *claims, *_require(0)],
        *[(LD_W, 0, 0, 38), *claims, DROP],
    ]


def nd_filter(taps: list[int], uplinks: list[int], suffixes: list[int]) -> Program:
    """Solicitations on ``taps``; on ``uplinks`` advertisements and DAD of targets that end in one of ``suffixes``."""
    solicitation = [(LD_W, 0, 0, IFINDEX), *_pass_if(taps)]
    solicitation += [step for offset in (22, 26, 30, 34) for step in ((LD_W, 0, 0, offset), *_require(0))]
    return [
        *[(LD_B, 0, 0, 20), *_require(socket.IPPROTO_ICMPV6), (LD_B, 0, 0, 21), *_require(255)],
        *[(LD_H, 0, 0, 54), *_require(SOLICITATION << 8, ADVERTISEMENT << 8)],
        *[(JEQ, 1, 0, SOLICITATION << 8), (JA, 0, 0, len(solicitation)), *solicitation],
        *[(LD_W, 0, 0, IFINDEX), *_require(*uplinks)],
        *[(LD_W, 0, 0, 74), *_pass_if(suffixes), DROP],
    ]


def pack(program: Program) -> bytes:
    """As SO_ATTACH_FILTER wants it."""
    return b"".join(struct.pack("=HBBI", *step) for step in program)
