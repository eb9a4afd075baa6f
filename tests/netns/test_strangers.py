"""What a guest sends from and may not is dropped, and told: once, and of a flood only some."""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import replace
from ipaddress import ip_address

import pytest

from kvmd.network.lan import STRANGERS, Lan
from kvmd.network.model.plan import TAP_MAC

from .conftest import ROUTER4, ROUTER6, Bottle, eventually, run, settle
from .test_lan import texts, up

# From as many addresses and MACs as there are numbers; to the tap, without asking for a neighbour.
FLOOD = f"""
import itertools, socket, struct, sys, time
sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
sock.bind(("eth0", 0))
tap, own, end = bytes.fromhex("{TAP_MAC.replace(":", "")}"), bytes.fromhex("525400000001"), time.monotonic() + 4
for number in itertools.count():
    if time.monotonic() > end:
        break
    head = struct.pack("!BBHHHBBHI4s", 0x45, 0, 28, 0, 0, 64, 17, 0, 0xc6120000 + number, socket.inet_aton("192.0.2.1"))
    total = sum(struct.unpack("!10H", head))
    total = ~((total & 0xffff) + (total >> 16)) & 0xffff
    packet = b"\\x08\\x00" + head[:10] + struct.pack("!H", total) + head[12:] + bytes.fromhex("0009000900080001")
    if sys.argv[1] == "ARP":
        sock.send(b"\\xff" * 6 + own + bytes.fromhex("08060001080006040001") + own + head[12:16] + bytes(6) + head[16:])
        continue
    sock.send(tap + own + packet)
    sock.send(tap + b"\\x02\\x01" + struct.pack("!I", number) + packet)
print(number)
"""


def told(bottle: Bottle) -> list[str]:
    return [text for _tap, text, _priority in bottle.reports if "sends from" in text]


async def test_told_once(bottle: Bottle, lan: Lan) -> None:
    """As of VRRP, or a container of the guest's on the LAN; and each anew of a guest that is started again."""
    guest, nic = bottle.guest(1)
    _two, other = bottle.guest(2)
    nic = replace(nic, kin=(ip_address("192.0.2.71"),))
    await up(lan, nic, other)
    settle(guest.name)
    await asyncio.sleep(2)
    assert not told(bottle)  # what systems say on their own
    for address in ("192.0.2.60", "192.0.2.71"):
        guest.script(f"ip addr add {address}/24 dev eth0")
        for _round in range(3):
            guest.run("ping", "-n", "-c", "1", "-W", "0.1", "-I", address, ROUTER4, check=False)
    guest.script("ip addr add 2001:db8:1::60/64 dev eth0 nodad")
    guest.run("ping", "-n", "-c", "1", "-W", "0.1", "-I", "2001:db8:1::60", ROUTER6, check=False)
    wanted = {
        "tap1: the guest sends from 192.0.2.60, which its file does not list (it is dropped)",
        "tap1: the guest sends from 192.0.2.71, which its file lists for another interface (it is dropped)",
        "tap1: the guest sends from 2001:db8:1::60, which its file does not list (it is dropped)",
    }
    await eventually(lambda: {*told(bottle)} == wanted)
    guest.script("ip link set eth0 address 52:54:00:66:66:66")
    guest.run("ping", "-n", "-c", "1", "-W", "0.1", ROUTER4, check=False)
    last = f"tap1: the guest sends from the MAC address 52:54:00:66:66:66, its own is {nic.mac} (it is dropped)"
    await eventually(lambda: {*told(bottle)} == {*wanted, last})
    await asyncio.sleep(2)
    assert len(told(bottle)) == 4
    lan.give_up(nic.tap)
    await lan.ready(nic.tap)
    guest.run("ping", "-n", "-c", "1", "-W", "0.1", ROUTER4, check=False)
    await eventually(lambda: told(bottle).count(last) == 2)


@pytest.mark.parametrize("kind", ["ARP", "IP"])
async def test_a_flood_of_forged_sources(bottle: Bottle, lan: Lan, kind: str) -> None:
    """Few lines, no time of the daemon's, and another guest's are told of all the same."""
    guest, nic = bottle.guest(1)
    two, other = bottle.guest(2)
    await up(lan, nic, other)
    settle(two.name)
    two.script("ip addr add 192.0.2.60/24 dev eth0")
    used = time.process_time()
    flood = asyncio.create_task(asyncio.to_thread(guest.run, "python3", "-c", FLOOD, kind))
    longest = 0.0
    while not flood.done():
        before = time.monotonic()
        await asyncio.sleep(0.01)
        longest = max(longest, time.monotonic() - before)
    assert int(flood.result()) > 10_000
    assert time.process_time() - used < 1
    assert longest < 0.2
    two.run("ping", "-n", "-c", "1", "-W", "0.1", "-I", "192.0.2.60", ROUTER4, check=False)
    await eventually(lambda: any("tap2" in text and "192.0.2.60" in text for text in told(bottle)))
    assert 4 < len([text for text in told(bottle) if "tap1" in text]) <= STRANGERS
    sets = "".join(run("nft", "list", "set", "inet", "kvmd", name) for name in ("strange4", "strange_macs"))
    assert kind == "ARP" or 8 <= len(re.findall('"tap1"', sets)) < 20
    assert await two.reaches(ROUTER4)
    assert await bottle.lan.reaches(*texts(other))
