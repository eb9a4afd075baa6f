"""The host as last seen: what the kernel said when it was asked, and what it has told since. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from kvmd.guest import Nic
from kvmd.network.model.host import Host, HostRoute, Interface, Link
from kvmd.network.model.things import LinkState

NAMED = 8  # interfaces in a sentence


class Survey:
    """``host`` is another object after each look, and when the learners change; its interfaces are those of now."""

    def __init__(self) -> None:
        self.links: dict[int, Link] = {}  # by interface index
        self.host = Host(self.links)
        self.stale = False  # addresses and routes have to be asked for
        self._taps: Collection[str] = ()
        self._uplinks: dict[str | None, Link | None] = {}  # by what a guest file says, found since the last change
        self._renamed: dict[str, int] = {}  # interfaces by the name that they had last

    def expect(self, taps: Collection[str]) -> None:
        """The names of the guests' taps."""
        self._taps = taps
        self._uplinks.clear()

    def look(
        self,
        links: Iterable[Link] | None,
        addresses: Mapping[int, tuple[Interface, ...]],
        routes: tuple[HostRoute, ...],
    ) -> bool:
        """All there is; ``links`` None: those heard of. Whether addresses or routes are different from before."""
        if links is not None:
            self.links = {link.index: link for link in links}
        before, self.host = self.host, Host(self.links, addresses, routes)
        self.stale = False
        self._uplinks.clear()
        return (addresses, routes) != (before.addresses, before.routes)

    def taps(self) -> dict[int, str]:
        """Those of the guests that are there: name by interface index."""
        return {index: link.name for index, link in self.links.items() if link.name in self._taps}

    def hear(self, link: Link, gone: bool) -> Link | None:
        """One interface is so now, or gone. Returns what it was before, None if it was not known."""
        before = self.links.get(link.index)
        if before is not None and before.name != link.name:
            self._renamed[before.name] = link.index
        if gone:
            self.links.pop(link.index, None)
        else:
            self.links[link.index] = link
        if link.name not in self._taps:
            self.stale |= before is None or gone or replace(before, carrier=link.carrier) != link
            self._uplinks.clear()
        return before

    def made(self, state: LinkState) -> None:
        """By ourselves, just now: the event is on its way."""
        if link := self.links.get(state.device):
            self.links[link.index] = replace(link, mac=state.mac, mtu=state.mtu, up=state.up)

    def learn(self, learners: tuple[int, ...], four_only: tuple[int, ...]) -> None:
        """See ``Host``."""
        if (learners, four_only) != (self.host.learners, self.host.four_only):
            self.host = replace(self.host, learners=learners, four_only=four_only)

    def others(self) -> list[Link]:
        """Interfaces that are no guest's tap."""
        return [link for link in self.links.values() if link.name not in self._taps]

    def uplink(self, nic: Nic) -> Link | None:
        """See ``Host.uplink``."""
        if nic.uplink not in self._uplinks:
            self._uplinks[nic.uplink] = self.host.uplink(nic, self._taps)
        return self._uplinks[nic.uplink]

    def no_uplink(self, nic: Nic) -> str:
        """Why ``nic`` has none."""
        mute = "speaks neither ARP nor neighbour discovery, as a tunnel"
        if nic.uplink is None:
            ways = self.host.default_links(self._taps)
            return (
                f"this host's default route leads by {ways[0].name}, which {mute}"
                if ways
                else "this host has no default route"
            )
        if (link := self.host.find(nic.uplink)) is not None:
            return f"the uplink {link.name} {mute}"
        if now := self.name(self._renamed.get(nic.uplink, 0)):
            return f"the uplink {nic.uplink} does not exist, it is called {now} now (name that in the guest's file)"
        there = [link.name for link in self.others() if link.lan]
        names = ", ".join([*there[:NAMED], *(["…"] if there[NAMED:] else [])]) or "none"
        return f"the uplink {nic.uplink} does not exist (there are: {names})"

    def name(self, index: int) -> str | None:
        """Of the interface with this index, while there is one."""
        return link.name if (link := self.links.get(index)) else None
