"""The guests' network interfaces, reconciled: one ``Lan`` keeps the kernel as the guest files want it.

Level-triggered. Whatever happens - a tap appears, an uplink goes and comes back, an address changes, somebody removes
a piece - ends in the same pass: look at the host, say what is wanted, look at what is present, apply the difference.
A pass that finds nothing to do changes nothing. What the kernel does not tell (proxy entries) is looked at by and by.

The kernel's state outlives this object, and a new one adopts it by its tag: a daemon restart disturbs no guest.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from ipaddress import IPv6Address
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Self

from kvmd import dhcp, netlink, network, vicinity
from kvmd.barriers import Passage
from kvmd.errors import AddressInUse, StartFailed, Unavailable
from kvmd.firewall import Firewall
from kvmd.forwarding import Forwarding
from kvmd.guest import Address, Nic
from kvmd.host import Host, Link
from kvmd.neighbours import Neighbours, Wire
from kvmd.netlink import Events, Kernel
from kvmd.nicstatus import NicStatus, assess
from kvmd.rtnetlink import Changed, Event, LinkChanged
from kvmd.sysbus import SystemBus
from kvmd.sysctl import Sysctls
from kvmd.things import Failure, LinkState, Operation, Proxy, Setting, Thing, diff

JOURNAL = Path("/run/kvmd/sysctl.json")
POLL = 1.8  # seconds between looks at what makes no event: proxy entries, settings
CONFLICT_MEMORY = 60.0  # seconds without another sign after which a conflict counts as over
DEFEND_INTERVAL = 10.0  # seconds, RFC 5227
ERROR, WARNING, NOTICE = 3, 4, 5  # syslog(3)


class Lan:
    """All guests' network interfaces of this host. Use as ``async with``; belongs to one event loop."""

    def __init__(
        self,
        report: Callable[[str, str, int], None],
        on_change: Callable[[NicStatus], None] = lambda status: None,
        journal: Path = JOURNAL,
        bus: SystemBus | None = None,
    ) -> None:
        """``report(tap, sentence, priority)``: for a person, priority as in syslog(3). ``on_change(status)``.

        ``journal`` must outlive the daemon, not the boot (RuntimeDirectoryPreserve=yes). ``bus``: to reach firewalld.
        """
        self._bus = bus
        self._report, self._on_change = report, on_change
        self._sysctls = Sysctls(journal, self._name)
        self._nics: dict[str, Nic] = {}
        self._open_firewalls = False
        self._over: set[str] = set()  # taps whose guest has ended, or is just starting: nothing is wanted yet
        self._host = Host()
        self._links: dict[int, Link] = {}
        self._uplinks: dict[str | None, Link | None] = {}  # by what a guest file says, found since the last change
        self._taps: dict[str, Link] = {}  # declared, present, not over
        self._held: dict[str, dict[object, Thing]] = {}  # by tap, what the last pass left
        self._plans: dict[str, tuple[Host, tuple[Nic, Link, Link | None], list[Thing]]] = {}
        self._statuses: dict[str, NicStatus] = {}
        self._conflicts: dict[str, tuple[float, str]] = {}
        self._waiting: dict[str, set[asyncio.Future[None]]] = {}
        self._defended: dict[Address, float] = {}
        self._filter_gone = False  # somebody removed the table, or a piece of it
        self._stale = False  # addresses and routes of the host have to be asked for
        self._all, self._deep = False, False  # look at all taps; and at their settings too
        self._new: set[str] = set()  # look at these
        self._seen: tuple[bytes, list[Setting]] = (b"", [])
        self._closed = False
        self._pass: asyncio.Handle | None = None
        self._poll: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        """Looks at the host, changes nothing. Raises Unavailable."""
        try:
            async with AsyncExitStack() as stack:
                self._kernel = Kernel()
                stack.callback(self._kernel.close)
                self._events = Events(self._heard, self._overflowed)
                stack.callback(self._events.close)
                self._neighbours = Neighbours(self._conflicting)
                stack.push_async_callback(self._neighbours.close)
                self._firewall = Firewall(self._filter_lost)
                stack.callback(self._firewall.close)
                self._forwarding = Forwarding(lambda: self._schedule(every=True), self._bus)
                stack.push_async_callback(self._forwarding.close)
                await self._forwarding.begin()
                self._survey(links=True)
                self._open = stack.pop_all()
        except OSError as error:
            hint = "are CAP_NET_ADMIN and CAP_NET_RAW there, and the package libnftables1?"
            raise Unavailable(f"cannot talk to the kernel's network: {error} ({hint})") from error
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stops listening. The kernel keeps what it has; guests' solicitations of LAN hosts stay unanswered."""
        self._closed = True
        for handle in (self._pass, self._poll):
            if handle is not None:
                handle.cancel()
        self._links.clear()  # nobody waits for the end of a tap from here on: it would not be heard
        for future in set().union(*self._waiting.values()):
            future.cancel()
        await self._open.aclose()

    # --- what others want ---------------------------------------------------------------------------------------------

    def declare(self, nics: Iterable[Nic], open_firewalls: bool = False) -> None:
        """All NICs there are, of guest files and of running guests, by tap name; replaces what was declared before.

        ``open_firewalls``: let the guests' packets pass where others' firewalls on this host would drop them.
        Taps that exist are set up before it returns, leftovers of others removed. Refusals of the kernel are reported.
        """
        self._nics = {nic.tap: nic for nic in nics}
        self._open_firewalls = open_firewalls
        self._uplinks.clear()
        self._over &= self._nics.keys()
        self._schedule(every=True, deep=True)
        self._reconcile()

    def open_tap(self, nic: Nic, queues: int = 1) -> list[int]:
        """As ``netlink.open_tap``. Nothing is claimed for it before ``ready``: the LAN has to be asked first."""
        self._over.add(nic.tap)
        return netlink.open_tap(nic.tap, queues)

    def mtu(self, nic: Nic) -> int:
        """Of its LAN, in bytes; 0 while there is no uplink."""
        uplink = self._uplink(nic)
        return uplink.mtu if uplink else 0

    async def check(self, nic: Nic) -> None:
        """Ask the LAN whether an address of ``nic`` is in use; takes 0.25 s. Raises AddressInUse, naming the MAC.

        An uplink that is missing or has no carrier is not asked.
        """
        for index, interfaces in self._host.addresses.items():
            for interface in interfaces:
                if interface.ip in nic.addresses:
                    raise AddressInUse(f"{interface.ip} of {nic.tap} is this host's own, on {self._name(index)}")
        uplink = self._uplink(nic)
        if uplink is None or not uplink.carrier or not nic.addresses:
            return
        for address, mac in (await self._neighbours.holders(self._wire(uplink), nic.addresses)).items():
            raise AddressInUse(
                f"{address} of {nic.tap} is in use on {uplink.name} by the machine with MAC {mac}"
                " (stop that machine or give the guest another address)"
            )

    async def ready(self, tap: str) -> None:
        """Return when everything for ``tap`` is applied: some milliseconds after it has been opened.

        Raises Unavailable if its uplink is missing, StartFailed if the kernel refuses something or there is no tap.
        """
        if tap not in self._nics:
            raise StartFailed(f"no guest has a network interface {tap}")
        self._over.discard(tap)
        self._schedule({tap})
        self._reconcile()
        status = self.status(tap)
        match status.state:
            case "absent":
                raise StartFailed(f"the tap {tap} does not exist (nobody has opened it)")
            case "no-uplink":
                raise Unavailable(status.detail)
            case "failed":
                raise StartFailed(status.detail)

    def give_up(self, tap: str) -> None:
        """The guest is about to end: from now on the LAN is told no more about it."""
        self._conflicts.pop(tap, None)
        if tap in self._over:
            return
        self._over.add(tap)
        self._schedule(every=True)
        self._reconcile()

    async def withdraw(self, tap: str) -> None:
        """The guest is over: the LAN is told no more about it, the uplink is as before if it was the last.

        Returns when the tap has gone; at once if it is not one that goes with its last holder.
        """
        self.give_up(tap)
        while (link := self._find(tap)) is not None and link.transient:
            future = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(tap, set()).add(future)
            try:
                await future
            finally:
                self._waiting.get(tap, set()).discard(future)

    def status(self, tap: str) -> NicStatus:
        return self._statuses.get(tap) or NicStatus(tap)

    # --- what happens -------------------------------------------------------------------------------------------------

    def _heard(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, LinkChanged):
                self._link_changed(event.link, event.gone)
            else:
                self._something_changed(event)

    def _link_changed(self, link: Link, gone: bool) -> None:
        before = self._links.get(link.index)
        if link.name not in self._nics:
            self._uplinks.clear()
        if gone:
            self._links.pop(link.index, None)
        else:
            self._links[link.index] = link
        if link.name not in self._nics:
            self._stale |= before is None or gone or replace(before, carrier=link.carrier) != link
            self._schedule(every=before != link or gone)
            known = before is None or gone or (link.carrier, link.mac) == (before.carrier, before.mac)
            if link.carrier and not known:
                self._announce(link.index)  # whoever listens on that wire now may not have heard
            return
        if gone:
            self._over.discard(link.name)
            for future in self._waiting.pop(link.name, ()):
                if not future.done():
                    future.set_result(None)
            self._schedule(every=True)
        elif before != link:
            self._schedule({link.name})
            uplink = self._uplink(self._nics[link.name])
            if before is not None and link.carrier and not before.carrier and uplink is not None:
                self._neighbours.announce(self._wire(uplink), self._nics[link.name].addresses)

    def _something_changed(self, event: Changed) -> None:
        link = self._links.get(event.device)
        if link is None and event.device:
            return  # not heard of yet: settings are told of before the interface that is born with them
        if link is not None and link.name in self._nics:
            if event.lost:
                self._schedule({link.name})
        elif event.setting:
            self._schedule(every=True)
        else:
            self._stale = True
            self._schedule()

    def _overflowed(self) -> None:
        self._survey(links=True)
        self._schedule(every=True, deep=True)

    def _polled(self) -> None:
        """Proxy entries and settings make no events. A pass over a thousand taps takes long: only if they differ."""
        self._poll = None
        self._keep_looking()
        seen = self._kernel.proxies_unread(), self._sysctls.remembered()
        if seen != self._seen:
            self._seen = seen
            self._schedule(every=True)
        now = asyncio.get_running_loop().time()
        over = {name for name, (until, _sentence) in self._conflicts.items() if until < now}
        for name in over:
            del self._conflicts[name]
        if over:
            self._schedule(over)

    def _keep_looking(self) -> None:
        if self._taps and self._poll is None:
            self._poll = asyncio.get_running_loop().call_later(POLL, self._polled)

    def _filter_lost(self) -> None:
        self._filter_gone = True
        self._schedule(every=True)

    def _conflicting(self, uplink: int, address: Address, mac: str) -> None:
        """Told, and defended as RFC 5227 section 2.4 (c) has it: the address is configured, not to be given up."""
        now = asyncio.get_running_loop().time()
        for name in self._taps:
            if address in self._nics[name].addresses:
                link = self._links.get(uplink)
                if link and now > self._defended.get(address, 0.0) + DEFEND_INTERVAL:
                    self._defended[address] = now
                    self._neighbours.announce(self._wire(link), [address])
                sentence = f"{address} is also used by the machine with MAC {mac} on {self._name(uplink)}"
                _until, known = self._conflicts.get(name, (0.0, ""))
                self._conflicts[name] = now + CONFLICT_MEMORY, sentence
                if sentence != known:
                    self._schedule({name})

    # --- the pass -----------------------------------------------------------------------------------------------------

    def _schedule(self, names: Iterable[str] = (), every: bool = False, deep: bool = False) -> None:
        """A pass over these taps, or all, once everything has been heard that is there to be heard."""
        self._new.update(names)
        self._all, self._deep = self._all or every, self._deep or deep
        if self._pass is None:
            self._pass = asyncio.get_running_loop().call_soon(self._reconcile)

    def _survey(self, links: bool = False) -> None:
        if links:
            self._links = {link.index: link for link in self._kernel.links()}
        host = Host(self._links, self._kernel.addresses(), self._kernel.host_routes())
        changed = (host.addresses, host.routes) != (self._host.addresses, self._host.routes)
        self._host, self._stale = host, False
        self._uplinks.clear()
        self._all, self._deep = self._all or changed, self._deep or changed

    def _reconcile(self) -> None:
        if self._closed:
            return
        if self._pass is not None:
            self._pass.cancel()
            self._pass = None
        self._events.read()
        if self._stale:
            self._survey()
        names, every, deep = self._new, self._all, self._deep
        self._new, self._all, self._deep = set(), False, False
        found = {link.name: link for link in self._links.values() if link.name in self._nics}
        self._taps = {name: link for name, link in found.items() if name not in self._over}
        self._keep_looking()
        scope = {name: link for name, link in self._taps.items() if every or name in names}
        unguarded = self._guard()  # before their first frame
        dropped = self._forwarding.apply(self._open_firewalls, frozenset(map(self._passage, self._taps)))
        things = self._wanted(scope)
        wanted = [thing for each in things.values() for thing in each]
        settled = set() if deep else {link.index for name, link in scope.items() if name not in names}
        failures = self._apply(self._difference(wanted, scope, settled, every), things)
        self._events.read()  # what we have just caused ourselves
        self._serve()
        for name in self._nics if every else names & self._nics.keys():
            tap = self._links.get(found[name].index) if name in found else None
            self._tell(name, tap, things.get(name, []), failures, unguarded, dropped.get(name, ""))

    def _passage(self, name: str) -> Passage:
        nic = self._nics[name]
        uplink = self._uplink(nic)
        return Passage(name, uplink.name if uplink else "", tuple(sorted(nic.families)))

    def _guard(self) -> str:
        nics = [self._nics[name] for name in self._taps]
        uplinks = {uplink.index: uplink for nic in nics if (uplink := self._uplink(nic)) is not None}
        lans = frozenset(prefix for uplink in uplinks.values() for prefix in self._host.on_link(uplink))
        refusal = self._firewall.apply(nics, lans)
        if self._filter_gone and nics and not refusal:
            self._report(
                nics[0].tap, "the filter against forged addresses: restored after it was removed or changed", NOTICE
            )
        self._filter_gone = self._filter_gone and bool(refusal)
        return refusal

    def _wanted(self, scope: dict[str, Link]) -> dict[str, list[Thing]]:
        nics = [self._nics[name] for name in scope]
        if any(6 in nic.families for nic in nics):
            others = [link.index for link in self._links.values() if link.name not in self._nics]
            learners = self._sysctls.learners(others)
            if learners != self._host.learners:
                self._host = replace(self._host, learners=learners)
        return {nic.tap: self._plan(nic, scope[nic.tap]) for nic in nics}

    def _plan(self, nic: Nic, tap: Link) -> list[Thing]:
        """Made once for as long as everything it depends on is the same: most passes find nothing new."""
        ground = (nic, tap, self._uplink(nic))
        host, known, things = self._plans.get(nic.tap, (None, None, []))
        if host is not self._host or known != ground:
            things = network.wanted(*ground, self._host)
            self._plans[nic.tap] = self._host, ground, things
        return things

    def _difference(
        self, wanted: list[Thing], scope: dict[str, Link], settled: set[int], every: bool
    ) -> list[Operation]:
        """What to do. Present is, in the order it is made in: settings, taps, neighbours, routes, proxies.

        ``settled`` taps have had their settings; only those that the journal has are read again.
        """
        settings = self._sysctls.remembered() if every else []
        known = {setting.key for setting in settings}
        asked = [
            thing
            for thing in wanted
            if isinstance(thing, Setting) and thing.key not in known and thing.device not in settled
        ]
        settings += self._sysctls.present(asked)
        readable = {setting.key for setting in settings}
        present: list[Thing] = [*settings]
        present += [LinkState(link.index, link.mac, link.mtu, link.up) for link in scope.values()]
        for device in (0,) if every else [link.index for name, link in scope.items() if self._nics[name].configure]:
            present += self._kernel.tap_addresses(device)
        for device in (0,) if every else [link.index for link in scope.values()]:
            present += self._kernel.neighbours(device)
            present += self._kernel.routes(device)
        proxies, foreign = self._kernel.proxies()
        aim = {thing.key for thing in wanted}
        present += [proxy for proxy in proxies if every or proxy.key in aim]
        taken = {proxy.key for proxy in foreign}  # answers already, and stays its owner's
        return diff(
            [
                thing
                for thing in wanted
                if thing.key not in taken and (not isinstance(thing, Setting) or thing.key in readable)
            ],
            present,
        )

    def _apply(self, operations: list[Operation], things: Mapping[str, list[Thing]]) -> list[Failure]:
        """In order; settings by /proc, the rest by netlink. New proxy entries are announced."""
        volatile = [link.index for link in self._taps.values() if link.transient]
        failures: list[Failure] = []
        for setting, group in groupby(operations, lambda operation: isinstance(operation.thing, Setting)):
            lot = list(group)
            failures += self._sysctls.apply(lot, volatile) if setting else self._kernel.apply(lot)
        refused = {failure.operation for failure in failures}
        done = [item.thing for item in operations if item not in refused and item.action != "remove"]
        for thing in done:
            if isinstance(thing, LinkState) and (link := self._links.get(thing.device)):
                self._links[link.index] = replace(link, mac=thing.mac, mtu=thing.mtu, up=thing.up)
            elif isinstance(thing, Proxy) and (link := self._links.get(thing.device)) and link.name not in self._nics:
                self._neighbours.announce(self._wire(link), [thing.address])
        self._tell_mended(done, things)
        return failures

    def _tell_mended(self, done: list[Thing], things: Mapping[str, list[Thing]]) -> None:
        """What was there after an earlier pass, and has not been now; shared pieces once."""
        owners = {thing.key: name for name, mine in things.items() for thing in mine} if done else {}
        mended: dict[str, list[str]] = {}
        for thing in done:
            name = owners.get(thing.key, "")
            if self._held.get(name, {}).get(thing.key) == thing:
                mended.setdefault(name, []).append(str(thing))
        for name, pieces in mended.items():
            self._report(name, f"{name}: restored after it was removed or changed: {', '.join(pieces)}", NOTICE)
        self._held.update({name: {thing.key: thing for thing in mine} for name, mine in things.items()})
        for name in self._held.keys() - self._taps.keys():
            del self._held[name]

    def _serve(self) -> None:
        """Tell the neighbours' room who is there, whom to answer and what to defend."""
        local = vicinity.local_addresses(self._host, (self._nics[name] for name in self._taps))
        views: dict[int, vicinity.Vicinity] = {}
        claims: dict[int, frozenset[Address]] = {}
        wires: dict[int, Wire] = {}
        for name, tap in self._taps.items():
            nic = self._nics[name]
            uplink = self._uplink(nic)
            views[tap.index] = vicinity.vicinity(nic, tap, uplink, self._host, local)
            if uplink is not None:
                wires[uplink.index] = wires.get(uplink.index) or self._wire(uplink)
                claims[uplink.index] = claims.get(uplink.index, frozenset()) | frozenset(nic.addresses)
        self._neighbours.serve(views, wires, claims, (link.mac for link in self._links.values()))

    def _tell(
        self,
        name: str,
        tap: Link | None,
        things: list[Thing],
        failures: list[Failure],
        unguarded: str,
        dropped: str,
    ) -> None:
        nic, before = self._nics[name], self.status(name)
        uplink = self._uplink(nic)
        _until, conflict = self._conflicts.get(name, (0.0, ""))
        status = assess(nic, tap, uplink, conflict, things, failures, unguarded, dropped)
        if nic.configure and nic.addresses and name in self._taps and uplink:
            status = replace(status, terms=dhcp.terms(nic, uplink, self._host))
        if status == before:
            return
        self._statuses[name] = status
        if before.state == "absent" and uplink is not None and (strangers := self._host.strangers(nic, uplink)):
            text = ", ".join(map(str, strangers))
            self._report(name, f"{text} of {name}: not in a prefix of {uplink.name}, only routers can find it", NOTICE)
        if status.detail and status.detail != before.detail:
            self._report(name, status.detail, ERROR if status.state == "failed" else WARNING)
        elif before.detail and status.state == "up":
            self._report(name, f"{name} is up again on {status.uplink}", NOTICE)
        self._on_change(status)

    def _announce(self, uplink: int) -> None:
        """The addresses of all guests on ``uplink``."""
        for name in self._taps:
            link = self._uplink(self._nics[name])
            if link is not None and link.index == uplink:
                self._neighbours.announce(self._wire(link), self._nics[name].addresses)

    def _uplink(self, nic: Nic) -> Link | None:
        if nic.uplink not in self._uplinks:
            self._uplinks[nic.uplink] = self._host.uplink(nic, self._nics)
        return self._uplinks[nic.uplink]

    def _wire(self, uplink: Link) -> Wire:
        own = [interface.ip for interface in self._host.addresses.get(uplink.index, ())]
        return Wire(uplink, next((ip for ip in own if isinstance(ip, IPv6Address) and ip.is_link_local), None))

    def _name(self, index: int) -> str | None:
        return link.name if (link := self._links.get(index)) else None

    def _find(self, name: str) -> Link | None:
        return next((link for link in self._links.values() if link.name == name), None)
