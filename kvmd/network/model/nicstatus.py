"""How a guest's network interface is doing: one word for programs, one sentence for people. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from kvmd.guest import Address, Nic
from kvmd.network.model.dhcp import Terms
from kvmd.network.model.host import IPV6_MTU_MIN, Host, Link
from kvmd.network.model.things import Failure, Thing, describe

ERROR, WARNING, NOTICE = 3, 4, 5  # syslog(3)

State = Literal["absent", "up", "down", "no-uplink", "uplink-down", "conflict", "blocked", "failed"]


@dataclass(frozen=True, slots=True)
class NicStatus:
    """``index`` and ``uplink`` are 0 and "" while there is none; ``detail`` is a sentence about what is wrong, or "".

    absent: no such tap. up: all is applied; a detail says by what packets to the world leave, if not by the uplink.
    down: the same, but no QEMU holds the tap. no-uplink, uplink-down: the guest reaches this host and its guests only,
    by IPv6 or at all.
    conflict: another machine uses an address. blocked: another firewall of this host drops what is forwarded.
    failed: the kernel refused a piece. ``terms``: what the guest is to be told, where it is to be told anything.
    """

    tap: str
    index: int = 0
    uplink: str = ""
    state: State = "absent"
    detail: str = ""
    terms: Terms | None = None


def assess(
    nic: Nic,
    tap: Link | None,
    uplink: Link | None,
    conflict: str,
    things: Collection[Thing],
    failures: Iterable[Failure],
    unguarded: str = "",
    dropped: str = "",
    missing: str = "this host has no default route",
    astray: str = "",
    four_only: bool = False,
) -> NicStatus:
    """``conflict``: the sentence about one. ``unguarded``: why the guests' filter could not be made.
    ``dropped``: the sentence about another firewall. ``missing``: why there is no uplink. ``astray``: the sentence
    about packets to the world that leave by another interface. ``four_only``: the uplink speaks no IPv6.

    ``things``: all that is wanted for ``nic``; ``failures`` may be others'.
    """
    names = {link.index: link.name for link in (tap, uplink) if link}
    refused = [
        f"{describe(thing, names.get(thing.device, f'interface {thing.device}'))}: {failure.text}"
        for failure in failures
        if (thing := failure.operation.thing) in things
    ]
    state: State
    if tap is None:
        state, detail = "absent", ""
    elif unguarded and nic.addresses:
        state, detail = "failed", f"{nic.tap}: nftables refused the filter against forged addresses: {unguarded}"
    elif refused:
        state, detail = "failed", f"{nic.tap}: the kernel refused {'; '.join(refused)}"
    elif nic.addresses and uplink is None:
        state, detail = "no-uplink", f"{nic.tap} does not reach the LAN: {missing}"
    elif nic.addresses and uplink and not (uplink.up and uplink.carrier):
        why = "has no carrier" if uplink.up else "is down"
        state, detail = "uplink-down", f"{nic.tap} does not reach the LAN: its uplink {uplink.name} {why}"
    elif uplink and four_only and 6 in nic.families:
        why = f"has an MTU of {uplink.mtu}" if uplink.mtu < IPV6_MTU_MIN else "has IPv6 switched off (disable_ipv6)"
        state, detail = "uplink-down", f"{nic.tap} does not reach the LAN by IPv6: its uplink {uplink.name} {why}"
    elif conflict:
        state, detail = "conflict", conflict
    elif dropped:
        state, detail = "blocked", dropped
    else:
        state, detail = ("up" if tap.carrier else "down"), astray
    return NicStatus(nic.tap, tap.index if tap else 0, uplink.name if uplink else "", state, detail)


def news(nic: Nic, uplink: Link | None, host: Host, before: NicStatus, now: NicStatus) -> Iterator[tuple[str, int]]:
    """What a person is told when ``before`` has become ``now``: sentences, each with its priority as in syslog(3)."""
    if before.state == "absent" and uplink is not None and (strangers := host.strangers(nic, uplink)):
        text = ", ".join(map(str, strangers))
        yield f"{text} of {nic.tap}: not in a prefix of {uplink.name}, only routers can find it", NOTICE
    if now.state == before.state == "no-uplink":
        return  # what other interfaces there are is in the status
    if now.detail and now.detail != before.detail:
        yield now.detail, ERROR if now.state == "failed" else WARNING
    elif before.detail and now.state == before.state == "up":
        yield f"{nic.tap}: packets to the world leave by {now.uplink} again", NOTICE
    elif before.detail and now.state == "up":
        yield f"{nic.tap} is up again on {now.uplink}", NOTICE


def stranger(nic: Nic, source: str | Address, last: bool) -> str:
    """What a person is told of a MAC or an address that ``nic`` sends from and may not. ``last``: of no other one."""
    if isinstance(source, str):
        what = f"the MAC address {source}, its own is {nic.mac}"
    elif source in nic.kin:
        what = f"{source}, which its file lists for another interface"
    else:
        what = f"{source}, which its file does not list"
    more = ", and no more of these are told of" if last else ""
    return f"{nic.tap}: the guest sends from {what} (it is dropped{more})"
