"""The guests' addresses on the LAN: asked for before they are claimed, announced, answered for, defended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable

from kvmd.errors import AddressInUse
from kvmd.guest import Address, Nic
from kvmd.network.model.host import Link, Wire
from kvmd.network.model.survey import Survey
from kvmd.network.wire import vicinity
from kvmd.network.wire.neighbours import Neighbours

CONFLICT_MEMORY = 60.0  # seconds without another sign after which a conflict counts as over
DEFEND_INTERVAL = 10.0  # seconds, RFC 5227


class Presence:
    """Of all guests that run, by the uplinks that ``survey`` knows."""

    def __init__(self, survey: Survey, changed: Callable[[str], None]) -> None:
        """``changed(tap)``: there is another ``conflict``. Needs a running loop. Raises OSError."""
        self._survey, self._changed = survey, changed
        self._neighbours = Neighbours(self._conflicting)
        self._guests: Collection[tuple[Nic, Link]] = ()
        self._conflicts: dict[str, tuple[float, str]] = {}  # by tap: until when, and the sentence
        self._defended: dict[Address, float] = {}  # until when not again

    async def close(self) -> None:
        await self._neighbours.close()

    async def check(self, nic: Nic) -> None:
        """Ask the LAN whether an address of ``nic`` is in use; takes 0.25 s. Raises AddressInUse, naming the MAC.

        An uplink that is missing or has no carrier is not asked.
        """
        for index, interfaces in self._survey.host.addresses.items():
            for interface in interfaces:
                if interface.ip in nic.addresses:
                    name = self._survey.name(index)
                    raise AddressInUse(f"{interface.ip} of {nic.tap} is this host's own, on {name}")
        uplink = self._survey.uplink(nic)
        if uplink is None or not uplink.carrier or not nic.addresses:
            return
        for address, mac in (await self._neighbours.holders(self._survey.host.wire(uplink), nic.addresses)).items():
            raise AddressInUse(
                f"{address} of {nic.tap} is in use on {uplink.name} by the machine with MAC {mac}"
                " (stop that machine or give the guest another address)"
            )

    def serve(self, guests: Collection[tuple[Nic, Link]]) -> None:
        """These run, each with its tap: answer them, and answer and defend their addresses on their uplinks."""
        self._guests = guests
        host = self._survey.host
        local = vicinity.local_addresses(host, (nic for nic, _tap in guests))
        views: dict[int, vicinity.Vicinity] = {}
        claims: dict[int, frozenset[Address]] = {}
        wires: dict[int, Wire] = {}
        for nic, tap in guests:
            uplink = self._survey.uplink(nic)
            views[tap.index] = vicinity.vicinity(nic, tap, uplink, host, local)
            if uplink is not None:
                wires[uplink.index] = wires.get(uplink.index) or host.wire(uplink)
                claims[uplink.index] = claims.get(uplink.index, frozenset()) | frozenset(nic.addresses)
        self._neighbours.serve(views, wires, claims, (link.mac for link in self._survey.links.values()))

    def announce(self, uplink: Link, addresses: Iterable[Address]) -> None:
        """As ``Neighbours.announce``."""
        self._neighbours.announce(self._survey.host.wire(uplink), addresses)

    def announce_all(self, uplink: Link) -> None:
        """The addresses of all guests that reach the LAN by ``uplink``."""
        for nic, _tap in self._guests:
            if (own := self._survey.uplink(nic)) is not None and own.index == uplink.index:
                self.announce(own, nic.addresses)

    def conflict(self, tap: str) -> str:
        """A sentence about the machine that uses an address of the guest as well, or ""."""
        return self._conflicts.get(tap, (0.0, ""))[1]

    def forget(self, tap: str) -> None:
        self._conflicts.pop(tap, None)

    def expire(self) -> None:
        """Conflicts that nothing has been heard of for long are over."""
        now = asyncio.get_running_loop().time()
        self._defended = {address: until for address, until in self._defended.items() if until >= now}
        for tap in [tap for tap, (until, _sentence) in self._conflicts.items() if until < now]:
            del self._conflicts[tap]
            self._changed(tap)

    def _conflicting(self, uplink: int, address: Address, mac: str) -> None:
        """Told, and defended as RFC 5227 section 2.4 (c) has it: the address is configured, not to be given up."""
        now = asyncio.get_running_loop().time()
        for nic, _tap in self._guests:
            if address in nic.addresses:
                link = self._survey.links.get(uplink)
                if link and now > self._defended.get(address, 0.0):
                    self._defended[address] = now + DEFEND_INTERVAL
                    self.announce(link, [address])
                sentence = f"{address} is also used by the machine with MAC {mac} on {self._survey.name(uplink)}"
                known = self.conflict(nic.tap)
                self._conflicts[nic.tap] = now + CONFLICT_MEMORY, sentence
                if sentence != known:
                    self._changed(nic.tap)
