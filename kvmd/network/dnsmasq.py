"""Guests that are told their addresses: a dnsmasq for each tap, run and restarted by systemd, not by us.

What is wanted is compared with what the transient unit was given: so the next daemon finds the same, and leaves it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import defaultdict
from pathlib import Path
from syslog import LOG_WARNING

from kvmd.errors import StartFailed
from kvmd.guest import Address, Guest, Nic
from kvmd.network.model import dhcp
from kvmd.network.model.dhcp import Terms
from kvmd.systemd.journal import Event, Journal
from kvmd.systemd.sysbus import BusError
from kvmd.systemd.units import Systemd

# systemd-resolved's own view first: where it runs, /etc/resolv.conf may name only its stub.
RESOLV_CONF = (Path("/run/systemd/resolve/resolv.conf"), Path("/etc/resolv.conf"))


def resolvers() -> list[Address]:
    """The host's name servers, those that a guest can reach."""
    for path in RESOLV_CONF:
        with contextlib.suppress(OSError):
            return dhcp.resolvers(path.read_text(errors="replace"))
    return []


def resolver_directories() -> set[Path]:
    """Where a change may mean other name servers."""
    places = {directory for path in RESOLV_CONF for directory in (path.parent, path.resolve().parent)}
    return {place for place in places if place.is_dir()}


class Dnsmasq:
    """All of them."""

    def __init__(self, systemd: Systemd, journal: Journal) -> None:
        self._systemd, self._journal = systemd, journal
        self._busy: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._forgetting: set[str] = set()  # taps whose guest boots anew and waits for its turn

    async def serve(self, guest: Guest, terms: Terms) -> None:
        """Have the guest told ``terms``; returns once dnsmasq serves. Raises ``StartFailed``."""
        unit = dhcp.unit(terms.tap)
        async with self._busy[terms.tap]:
            servers = resolvers()
            wanted = dhcp.configuration(terms, servers)
            if await self._systemd.standard_input(unit) == wanted.encode():
                return
            if not os.access(dhcp.PROGRAM, os.X_OK):
                raise StartFailed("configure = true needs dnsmasq, which is not installed (install dnsmasq-base)")
            if not servers:
                message = f"Guest {guest.name} is given no DNS server: {RESOLV_CONF[1]} names none that it could reach"
                self._journal.say(Event.NETWORK, message, guest.name, LOG_WARNING)
            await self._stop(unit)
            try:
                await self._systemd.start_transient(unit, dhcp.properties(terms.tap, guest.name, guest.scope, wanted))
            except StartFailed as error:
                await self._stop(unit)  # or systemd would go on trying
                hint = f"journalctl -u {unit} says why; a DHCP server for all interfaces of this host?"
                raise StartFailed(f"dnsmasq does not serve {terms.tap}: {error} ({hint})") from error

    async def forget(self, nic: Nic) -> None:
        """The guest boots anew, and DHCPv6 may not know it again: to dnsmasq its address would be another's still.

        A Linux that reboots by the keyboard controller asks for it again and again until it is heard, and each time
        QEMU says RESET.
        """
        if nic.configure and nic.tap not in self._forgetting:
            self._forgetting.add(nic.tap)
            async with self._busy[nic.tap]:
                self._forgetting.discard(nic.tap)
                with contextlib.suppress(BusError):  # not served
                    await self._systemd.restart_unit(dhcp.unit(nic.tap))

    async def end(self, nic: Nic) -> None:
        """Returns once there is none for ``nic``."""
        if nic.configure:
            async with self._busy[nic.tap]:
                await self._stop(dhcp.unit(nic.tap))

    async def _stop(self, unit: str) -> None:
        with contextlib.suppress(BusError):  # there is none
            await self._systemd.stop_unit(unit)
        await self._systemd.reset_failed(unit)
