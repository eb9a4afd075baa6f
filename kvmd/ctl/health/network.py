"""Uplinks, forwarding, and what was left over."""

from __future__ import annotations

from collections.abc import Iterator

from kvmd.ctl.health.facts import Facts, Link
from kvmd.ctl.health.finding import Finding, ok, warning


def judge(facts: Facts) -> Iterator[Finding]:
    if facts.uplinks is None:
        yield warning("uplink", "routes and interfaces cannot be seen without ip", "package iproute2")
    else:
        for version, link in facts.uplinks.items():
            yield _uplink(version, link)
    known = {version: value for version, value in facts.forwarding.items() if value is not None}
    shown = ", ".join(f"IPv{version} {'on' if value else 'off'}" for version, value in known.items())
    yield ok("forwarding", f"{shown or 'it cannot be seen'}; kvmd sets it for its own interfaces while guests run")
    yield from _leftovers(facts)


def _uplink(version: int, link: Link | None) -> Finding:
    check = f"uplink IPv{version}"
    if link is None:
        return warning(
            check, "there is no default route: guests need an uplink of their own", "uplink under [[network]]"
        )
    if not link.lan:
        text = f"the default route is by {link.name}, a tunnel without ARP: no LAN to be on"
        return warning(check, text, "uplink = the interface of the LAN, under [[network]]")
    return ok(check, f"guests are on the LAN of {link.name}")


def _leftovers(facts: Facts) -> Iterator[Finding]:
    """Only the daemon knows whose a tap is, and it removes what is left over at its start."""
    if not facts.bus.daemon:
        if facts.taps or facts.tagged:
            yield ok("leftovers", "taps and routes of kvmd's are there; whose they are only kvmd knows")
        return
    on = [guest for guest in facts.bus.guests if guest.on]
    known = {network.get("tap") for guest in on for network in guest.networks}
    taps = [tap for tap in facts.taps if tap not in known]
    for tap in taps:
        yield warning("leftovers", f"the tap {tap} belongs to no running guest", f"ip link delete {tap}")
    for entry in () if on else facts.tagged:
        yield warning("leftovers", f"no guest runs, but there is: {entry}", "systemctl restart kvmd removes it")
    if not taps and (on or not facts.tagged):
        yield ok("leftovers", "none")
