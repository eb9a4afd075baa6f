"""Uplinks other than a cable: whatever the shape, the LAN hears one MAC address, the host's.

A switch port that is bound to one address, or a wifi access point, would drop every other frame. VLANs and bonds are
tried in a whole machine (tests/system/test_vm.py): not every kernel that tests run on has them.
"""

from __future__ import annotations

import json

import pytest

from kvmd.network.lan import Lan

from .conftest import HOST4, HOST6, ROUTER4, ROUTER6, Bottle, host_reaches, run, script, settle
from .test_lan import texts, up

SHAPES = {
    "cable": "ip link add up0 type veth peer name wire netns {lan}",
    "bridge": """
        ip link add up0 type bridge forward_delay 0
        ip link add port type veth peer name wire netns {lan}
        ip link set port up master up0
    """,
    "macvlan": """
        ip link add nic0 type veth peer name wire netns {lan}
        sysctl -q net.ipv6.conf.nic0.disable_ipv6=1
        ip link set nic0 up
        ip link add up0 link nic0 type macvlan mode bridge
    """,
}


@pytest.mark.parametrize("shape", SHAPES)
async def test_one_mac_address_on_the_wire(bottle: Bottle, lan: Lan, shape: str) -> None:
    script("ip link del up0")
    script(SHAPES[shape].format(lan=bottle.lan.name))
    bottle.address()
    [uplink] = json.loads(run("ip", "-j", "link", "show", "up0"))
    bottle.lan.run(
        "nft",
        f"""table netdev port {{
            chain ingress {{
                type filter hook ingress device wire priority 0; policy accept;
                ether saddr {uplink["address"]} counter accept
                counter drop
            }}
        }}""",
    )
    settle()
    one, first = bottle.guest(1)
    _two, second = bottle.guest(2)
    await up(lan, first, second)
    assert await bottle.lan.reaches(*texts(first), *texts(second))
    assert await one.reaches(ROUTER4, ROUTER6, HOST4, HOST6, *texts(second))
    assert await host_reaches(*texts(first), *texts(second))
    bottle.lan.run("ip", "neigh", "flush", "dev", "wire")
    assert await bottle.lan.reaches(*texts(first))
    rules = json.loads(bottle.lan.run("nft", "-j", "list", "chain", "netdev", "port", "ingress"))["nftables"]
    expressions = [each for rule in rules if "rule" in rule for each in rule["rule"]["expr"]]
    own, foreign = (each["counter"]["packets"] for each in expressions if "counter" in each)
    assert own > 10
    assert foreign == 0
    known = json.loads(bottle.lan.run("ip", "-j", "neigh", "show", "dev", "wire"))
    assert {entry["lladdr"] for entry in known} == {uplink["address"]}
