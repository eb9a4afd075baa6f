"""Which interface is an uplink, by what name, and whether packets to the world leave by it: VPNs, other names."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvmd.errors import Unavailable
from kvmd.guest import Nic
from kvmd.network.lan import Lan

from .conftest import ROUTER4, ROUTER6, Bottle, eventually, run, script
from .test_lan import proxies, texts, up

TUNNEL = """
    ip tuntap add tun0 mode tun
    ip link set tun0 up
    ip addr add 10.8.0.2/24 dev tun0
    ip addr add fd00:8::2/64 dev tun0 nodad
"""
VPNS = {
    "halves, as OpenVPN": ("ip route add 0.0.0.0/1 via 10.8.0.1 dev tun0", "ip route add 128.0.0.0/1 dev tun0"),
    "one half": ("ip route add 128.0.0.0/1 via 10.8.0.1 dev tun0",),
    "IPv6, as OpenVPN": ("ip -6 route add 2000::/4 dev tun0",),
    "a better metric": ("ip route add default dev tun0",),
    "a table, as wg-quick": (
        "ip route add default dev tun0 table 51820",
        "ip rule add not fwmark 51820 table 51820",
        "ip rule add table main suppress_prefixlength 0",
    ),
}


def by(lan: Lan, nic: Nic) -> tuple[str, str, str]:
    status = lan.status(nic.tap)
    return status.state, status.uplink, status.detail.partition(" (")[0]


@pytest.mark.parametrize("vpn", VPNS)
async def test_a_vpn_on_the_host(bottle: Bottle, lan: Lan, vpn: str) -> None:
    """The uplink stays the LAN's interface; a sentence says by what the guest's packets leave, while they do."""
    guest, nic = bottle.guest(1)
    script(f"ip route replace default via {ROUTER4} metric 100\nip route del default via {ROUTER4} metric 0")
    script(TUNNEL)
    await up(lan, nic)
    assert by(lan, nic) == ("up", "up0", "")
    script("\n".join(VPNS[vpn]))
    away = f"{nic.tap}: packets to the world leave by tun0, not by up0"
    await eventually(lambda: by(lan, nic) == ("up", "up0", away))
    assert proxies() == set(texts(nic))
    assert await bottle.lan.reaches(*texts(nic))
    assert await guest.reaches(ROUTER4, ROUTER6)
    script("\n".join(line.replace(" add ", " del ") for line in reversed(VPNS[vpn])))
    await eventually(lambda: by(lan, nic) == ("up", "up0", ""))
    assert [text.partition(" (")[0] for _tap, text, _ in bottle.reports] == [
        away,
        f"{nic.tap}: packets to the world leave by up0 again",
    ]


async def test_a_vpn_that_is_there_before_the_guest(bottle: Bottle, lan: Lan) -> None:
    _guest, nic = bottle.guest(1)
    script(TUNNEL + "\n".join(VPNS["halves, as OpenVPN"]))
    await up(lan, nic)
    assert by(lan, nic)[2] == f"{nic.tap}: packets to the world leave by tun0, not by up0"


async def test_a_tunnel_is_no_uplink(bottle: Bottle, lan: Lan) -> None:
    """Neither the only default route's nor the one that a file names."""
    _one, first = bottle.guest(1)
    _two, second = bottle.guest(2)
    script(TUNNEL + "ip route del default\nip -6 route del default\nip route add default dev tun0")
    second = replace(second, uplink="tun0")
    lan.declare([first, second])
    for nic, what in ((first, "this host's default route leads by"), (second, "the uplink")):
        with pytest.raises(Unavailable) as refused:
            await lan.ready(nic.tap)
        mute = f"{what} tun0, which speaks" if nic is first else f"{what} tun0 speaks"
        assert str(refused.value).startswith(f"{nic.tap} does not reach the LAN: {mute} neither ARP nor neighbour")
    assert "proxy" not in run("ip", "neigh", "show", "proxy", "dev", "tun0")


async def test_alternative_names(bottle: Bottle, lan: Lan) -> None:
    """Of any length they may have, that come and go."""
    long = "enx" + "0" * 60
    guest, nic = bottle.guest(1)
    _two, other = bottle.guest(2)
    nic, other = replace(nic, uplink="enp1s0"), replace(other, uplink=long)
    script(f"ip link property add dev up0 altname enp1s0 altname {long}")
    await up(lan, nic, other)
    assert await guest.reaches(ROUTER4, ROUTER6)
    assert proxies() == {*texts(nic), *texts(other)}
    script("ip link property del dev up0 altname enp1s0")
    await eventually(lambda: lan.status(nic.tap).state == "no-uplink" and proxies() == set(texts(other)))
    script("ip link property add dev up0 altname enp1s0")
    await eventually(lambda: lan.status(nic.tap).state == "up")


async def test_an_uplink_that_was_renamed(bottle: Bottle, lan: Lan) -> None:
    """The state says what there is now; it is told once, whatever else comes and goes."""
    _guest, nic = bottle.guest(1)
    nic = replace(nic, uplink="up0")
    await up(lan, nic)
    script("ip link set up0 name enp1s0")
    there = f"{nic.tap} does not reach the LAN: the uplink up0 does not exist"
    await eventually(lambda: by(lan, nic) == ("no-uplink", "", f"{there}, it is called enp1s0 now"))
    script("ip link add br7 type bridge\nip link set br7 name br8\nip link del br8")
    script("ip link set enp1s0 name up0")
    await eventually(lambda: lan.status(nic.tap).state == "up")
    assert len(bottle.reports) == 2


async def test_what_there_is_instead(bottle: Bottle, lan: Lan) -> None:
    _guest, nic = bottle.guest(1)
    lan.declare([replace(nic, uplink="eth7")])
    with pytest.raises(Unavailable, match=r"the uplink eth7 does not exist \(there are: up0\)"):
        await lan.ready(nic.tap)


async def test_rules_that_lead_a_guest_by_its_uplink(bottle: Bottle, lan: Lan) -> None:
    """Those of kvmd(8)."""
    guest, nic = bottle.guest(1)
    _two, other = bottle.guest(2)
    bottle.lan.script("ip addr add 203.0.113.99/32 dev lo")
    script(TUNNEL + "\n".join(VPNS["halves, as OpenVPN"]))
    await up(lan, nic, other)
    assert lan.status(nic.tap).detail
    assert not await guest.reaches("203.0.113.99")
    script(f"""
        ip route add default via {ROUTER4} dev up0 table 100
        ip rule add iif {nic.tap} lookup main suppress_prefixlength 1 pref 100
        ip rule add iif {nic.tap} lookup 100 pref 101
    """)
    await eventually(lambda: by(lan, nic) == ("up", "up0", ""))
    assert await guest.reaches("203.0.113.99", ROUTER4, ROUTER6, *texts(other))
