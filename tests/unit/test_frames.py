"""Frames against bytes taken from a wire, filters run by a BPF machine of a few lines."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv6Address

import pytest

from kvmd.network.wire.frames import (
    ALL_NODES,
    BPF_MAXINSNS,
    IFINDEX,
    OVERRIDE,
    REPLY,
    REQUEST,
    UNSPECIFIED,
    Program,
    advertise,
    arp,
    arp_filter,
    group_mac,
    link_local,
    mac_bytes,
    nd_filter,
    ranges,
    solicit,
)

MAC = mac_bytes("52:54:00:12:34:56")
FOUR, OTHER4 = IPv4Address("192.0.2.42"), IPv4Address("192.0.2.43")
SIX, OTHER6 = IPv6Address("2001:db8:1::42"), IPv6Address("2001:db8:1::43")
TAP, UPLINK, ELSEWHERE = 7, 2, 3


def passes(program: Program, frame: bytes, index: int) -> bool:
    """net/core/filter.c in small: a load beyond the frame drops it."""
    accumulator, at = 0, 0
    while True:
        code, yes, no, value = program[at]
        at += 1
        if code == 0x06:
            return value > 0
        if code == 0x05:
            at += value
        elif code in (0x15, 0x25, 0x35):
            true = {0x15: accumulator == value, 0x25: accumulator > value, 0x35: accumulator >= value}[code]
            at += yes if true else no
        elif value == IFINDEX:
            accumulator = index
        else:
            width = {0x20: 4, 0x28: 2, 0x30: 1}[code]
            if value + width > len(frame):
                return False
            accumulator = int.from_bytes(frame[value : value + width], "big")


def test_frames_are_as_others_make_them() -> None:
    assert link_local("52:54:00:12:34:56") == IPv6Address("fe80::5054:ff:fe12:3456")
    assert arp(MAC, REQUEST, FOUR, FOUR).hex() == (
        "ffffffffffff52540012345608060001080006040001525400123456c000022a000000000000c000022a"
    )
    frame = solicit(MAC, UNSPECIFIED, SIX)
    assert frame[:6].hex() == "3333ff000042"
    assert len(frame) == 14 + 40 + 24


@pytest.mark.parametrize(
    "frame",
    [
        solicit(MAC, UNSPECIFIED, SIX),
        solicit(MAC, SIX, OTHER6),
        advertise(MAC, SIX, ALL_NODES, group_mac(ALL_NODES), SIX, OVERRIDE),
    ],
)
def test_checksum(frame: bytes) -> None:
    body = frame[54:]
    words = frame[22:54] + struct.pack("!IxxxB", len(body), 58) + body
    total = sum(struct.unpack(f"!{len(words) // 2}H", words))
    while total >> 16:
        total = (total >> 16) + (total & 0xFFFF)
    assert total == 0xFFFF


def test_arp_filter() -> None:
    program = arp_filter([TAP, 8], [UPLINK, 9], [int(FOUR), int(IPv4Address("192.0.2.99"))])
    nobody = IPv4Address(0)
    assert passes(program, arp(MAC, REQUEST, FOUR, OTHER4), UPLINK)
    assert passes(program, arp(MAC, REPLY, FOUR, OTHER4), 9)
    assert passes(program, arp(MAC, REQUEST, nobody, FOUR), UPLINK)
    assert not passes(program, arp(MAC, REQUEST, nobody, OTHER4), UPLINK)
    assert not passes(program, arp(MAC, REQUEST, OTHER4, FOUR), UPLINK)
    assert not passes(program, arp(MAC, REQUEST, FOUR, OTHER4), ELSEWHERE)
    assert passes(program, arp(MAC, REQUEST, OTHER4, FOUR), TAP)  # whatever a guest says
    assert not passes(arp_filter([], [], []), arp(MAC, REQUEST, FOUR, OTHER4), UPLINK)


def test_nd_filter() -> None:
    program = nd_filter([TAP, 8], [UPLINK, 9], [int(SIX) & 0xFFFFFFFF])
    claim = advertise(MAC, SIX, ALL_NODES, group_mac(ALL_NODES), SIX, OVERRIDE)
    assert passes(program, solicit(MAC, SIX, OTHER6), TAP)
    assert passes(program, solicit(MAC, UNSPECIFIED, OTHER6), 8)
    assert passes(program, claim, UPLINK)
    assert passes(program, solicit(MAC, UNSPECIFIED, SIX), 9)
    assert not passes(program, solicit(MAC, OTHER6, SIX), UPLINK)  # the LAN resolves: the kernel's business
    assert not passes(program, solicit(MAC, UNSPECIFIED, OTHER6), UPLINK)
    assert not passes(program, claim, TAP)
    assert not passes(program, claim, ELSEWHERE)
    assert not passes(program, solicit(MAC, SIX, OTHER6), ELSEWHERE)
    assert not passes(program, claim[:21] + b"\x40" + claim[22:], UPLINK)  # has been forwarded: hop limit 64
    assert not passes(program, claim[:60], UPLINK)


def test_many_guests() -> None:
    """The jumps reach, and the kernel's limit holds however many there are."""
    addresses = list(range(1, 700))
    assert passes(arp_filter([], [UPLINK], addresses), arp(MAC, REQUEST, IPv4Address(699), FOUR), UPLINK)
    assert not passes(arp_filter([], [UPLINK], addresses), arp(MAC, REQUEST, IPv4Address(700), FOUR), UPLINK)
    scattered = [number * number for number in range(3, 5000)]
    program = arp_filter([], [UPLINK], scattered)
    assert all(passes(program, arp(MAC, REQUEST, IPv4Address(each), FOUR), UPLINK) for each in scattered[::99])
    assert not passes(program, arp(MAC, REQUEST, IPv4Address(8), FOUR), UPLINK)
    assert len(program) < BPF_MAXINSNS
    assert len(arp_filter(scattered, [UPLINK], scattered)) < BPF_MAXINSNS
    assert len(nd_filter(scattered, [UPLINK], scattered)) < BPF_MAXINSNS


def test_ranges() -> None:
    """Each by itself where there is room; else together where the gaps between are smallest."""
    assert ranges([]) == []
    assert ranges([5, 1, 5]) == [(1, 1), (5, 5)]
    assert ranges([1, 2, 10, 12, 100], most=2) == [(1, 12), (100, 100)]
    assert ranges([1, 2, 10, 12, 100], most=3) == [(1, 2), (10, 12), (100, 100)]
    assert ranges([7, 9], most=1) == [(7, 9)]
