"""The guests' addresses on the LAN: asked for before they are claimed, announced, answered for, defended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address
from itertools import chain

from kvmd.errors import AddressInUse
from kvmd.guest import Address, Nic
from kvmd.network.model.host import Link, Wire
from kvmd.network.model.survey import Survey
from kvmd.network.wire import vicinity
from kvmd.network.wire.announcements import Announcements
from kvmd.network.wire.neighbours import Neighbours
from kvmd.network.wire.vicinity import Vicinity

CONFLICT_MEMORY = 60.0  # seconds without another sign after which a conflict counts as over
DEFEND_INTERVAL = 10.0  # seconds, RFC 5227
NEWS_INTERVAL = 10.0  # seconds for which the MAC that was named stays, whatever others there are


@dataclass(frozen=True, slots=True, eq=False)
class _View:
    """One guest's, and what it follows from."""

    nic: Nic
    tap: Link
    uplink: Link | None
    addresses: frozenset[Address]
    vicinity: Vicinity


class Presence:
    """Of all guests that run, by the uplinks that ``survey`` knows."""

    def __init__(
        self, survey: Survey, changed: Callable[[str], None], stranger: Callable[[str, Address], None]
    ) -> None:
        """``changed(tap)``: there is another ``conflict``. ``stranger(tap, address)``: the guest speaks ARP with one
        that is not its own. Needs a running loop. Raises OSError.
        """
        self._survey, self._changed, self._stranger = survey, changed, stranger
        self._neighbours = Neighbours(self._conflicting, self._sent)
        self._announcements = Announcements(self._say)
        self._guests: Collection[tuple[Nic, Link]] = ()
        self._host = survey.host
        self._own: frozenset[Address] = frozenset()  # of the host itself
        self._local: set[Address] = set()  # all on this host
        self._views: dict[int, _View] = {}  # by tap
        self._conflicts: dict[str, tuple[float, str]] = {}  # by tap: until when, and the sentence
        self._named: dict[str, float] = {}  # by tap: until when the sentence stays
        self._defended: dict[Address, float] = {}  # until when not again

    async def close(self) -> None:
        self._announcements.close()
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
        """These run, each with its tap: answer them, and answer and defend their addresses on their uplinks.

        What one may be told of its neighbours is judged anew only when it, or the host, is another one.
        """
        self._guests = guests
        host = self._survey.host
        if host is not self._host:
            self._host, self._own, self._views = host, vicinity.own_addresses(host), {}
        before, self._views = self._views, {}
        for nic, tap in guests:
            uplink = self._survey.uplink(nic)
            view = before.get(tap.index)
            if view is None or view.nic is not nic or (view.tap, view.uplink) != (tap, uplink):
                own = vicinity.vicinity(nic, tap, uplink, host, self._local)
                view = _View(nic, tap, uplink, frozenset(nic.addresses), own)
            self._views[tap.index] = view
        self._local.clear()
        self._local.update(self._own, *(view.addresses for view in self._views.values()))
        claims: dict[int, set[Address]] = {}
        wires: dict[int, Wire] = {}
        for view in self._views.values():
            if (uplink := view.uplink) is not None:
                wires[uplink.index] = wires.get(uplink.index) or host.wire(uplink)
                claims.setdefault(uplink.index, set()).update(view.addresses)
        self._announcements.keep(claims)
        taps = {index: view.vicinity for index, view in self._views.items()}
        self._neighbours.serve(taps, wires, claims, (link.mac for link in self._survey.links.values()))

    def announce(self, uplink: Link, addresses: Iterable[Address]) -> None:
        """Now, and as long as they are served there some more times."""
        self._announcements.begin(uplink.index, addresses)

    def announce_all(self, uplink: Link) -> None:
        """The addresses of all guests that reach the LAN by ``uplink``."""
        owners = (
            nic
            for nic, _tap in self._guests
            if (own := self._survey.uplink(nic)) is not None and own.index == uplink.index
        )
        self.announce(uplink, chain.from_iterable(nic.addresses for nic in owners))

    def _say(self, uplink: int, addresses: Iterable[Address]) -> None:
        """Once. From an interface that has gone there is nothing to say."""
        if link := self._survey.links.get(uplink):
            self._neighbours.announce(self._survey.host.wire(link), addresses)

    def conflict(self, tap: str) -> str:
        """A sentence about the machine that uses an address of the guest as well, or ""."""
        return self._conflicts.get(tap, (0.0, ""))[1]

    def forget(self, tap: str) -> None:
        self._conflicts.pop(tap, None)
        self._named.pop(tap, None)

    def expire(self) -> None:
        """Conflicts that nothing has been heard of for long are over."""
        now = asyncio.get_running_loop().time()
        self._defended = {address: until for address, until in self._defended.items() if until >= now}
        for tap in [tap for tap, (until, _sentence) in self._conflicts.items() if until < now]:
            del self._conflicts[tap]
            self._changed(tap)

    def _sent(self, tap: int, address: IPv4Address) -> None:
        if (view := self._views.get(tap)) is None or address in view.addresses:
            return
        nobody = address.is_unspecified or address.is_link_local or address.is_loopback
        if not nobody and not any(address in prefix for prefix in view.nic.routes):
            self._stranger(view.nic.tap, address)

    def _conflicting(self, uplink: int, address: Address, mac: str) -> None:
        """Told, and defended as RFC 5227 section 2.4 (c) has it: the address is configured, not to be given up."""
        now = asyncio.get_running_loop().time()
        for nic, _tap in self._guests:
            if address in nic.addresses:
                if now > self._defended.get(address, 0.0):
                    self._defended[address] = now + DEFEND_INTERVAL
                    self._say(uplink, [address])
                sentence = f"{address} is also used by the machine with MAC {mac} on {self._survey.name(uplink)}"
                known = self.conflict(nic.tap)
                if known and now < self._named.get(nic.tap, 0.0):
                    sentence = known
                self._conflicts[nic.tap] = now + CONFLICT_MEMORY, sentence
                if sentence != known:
                    self._named[nic.tap] = now + NEWS_INTERVAL
                    self._changed(nic.tap)
