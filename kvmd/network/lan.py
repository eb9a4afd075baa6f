"""The guests' network interfaces, reconciled: one ``Lan`` keeps the kernel as the guest files want it.

Level-triggered. Whatever happens - a tap appears, an uplink goes and comes back, an address changes, somebody removes
a piece - ends in the same pass: look at the host, say what is wanted, look at what is present, apply the difference.
A pass that finds nothing to do changes nothing. What the kernel does not tell (proxy entries) is looked at by and by.

The kernel's state outlives this object, and a new one adopts it by its tag: a daemon restart disturbs no guest.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Self

from kvmd.errors import StartFailed, Unavailable
from kvmd.guest import Address, Nic
from kvmd.network.firewalls.barriers import Passage
from kvmd.network.firewalls.firewall import Firewall
from kvmd.network.firewalls.forwarding import Forwarding
from kvmd.network.holdings import Holdings
from kvmd.network.kernel import netlink, rtnetlink
from kvmd.network.kernel.netlink import Events, Kernel
from kvmd.network.kernel.rtnetlink import Changed, Event, LinkChanged
from kvmd.network.kernel.sysctl import Sysctls
from kvmd.network.model import dhcp
from kvmd.network.model.host import Link
from kvmd.network.model.nicstatus import NOTICE, WARNING, NicStatus, assess, news, stranger
from kvmd.network.model.plan import Plan, journeys, mended, narrowed, plan
from kvmd.network.model.settings import Settings, settings
from kvmd.network.model.survey import Survey
from kvmd.network.model.things import Failure, LinkState, Proxy
from kvmd.network.wire.presence import Presence
from kvmd.systemd.sysbus import SystemBus

JOURNAL = Path("/run/kvmd/sysctl.json")
STRANGERS = 8  # addresses that are not a guest's own, of each guest
POLL = 1.8  # seconds between looks at what makes no event: proxy entries, settings


@contextmanager
def _reachable() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        hint = "are CAP_NET_ADMIN and CAP_NET_RAW there, and the package libnftables1?"
        raise Unavailable(f"cannot talk to the kernel's network: {error} ({hint})") from error


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
        self._survey = Survey()
        self._sysctls = Sysctls(journal, self._survey.name)
        self._nics: dict[str, Nic] = {}
        self._open_firewalls = False
        self._over: set[str] = set()  # taps whose guest has ended, or is just starting: nothing is wanted yet
        self._running: dict[str, tuple[Nic, Link]] = {}  # declared, present, not over
        self._passages: dict[str, Passage] = {}  # of those
        self._statuses: dict[str, NicStatus] = {}
        self._ways: dict[str, tuple[Plan, str]] = {}  # by tap: where its packets to the world go, if that is odd
        self._waiting: dict[str, set[asyncio.Future[None]]] = {}
        self._all, self._deep = False, False  # look at all taps; and at their settings too
        self._new: set[str] = set()  # look at these
        self._begun = asyncio.Event()
        self._declared = False  # until then nothing is known to be wanted, and nothing may be removed
        self._closed = False
        self._pass: asyncio.Handle | None = None
        self._poll: asyncio.TimerHandle | None = None
        self._strangers: dict[str, set[str | Address]] = {}  # by tap: what it sent from, as has been told

    async def __aenter__(self) -> Self:
        """Opens what can fail; nothing is heard, looked at or changed before ``begin``. Raises Unavailable."""
        with _reachable():
            async with AsyncExitStack() as stack:
                self._kernel = Kernel()
                stack.callback(self._kernel.close)
                self._holdings = Holdings(self._kernel, self._sysctls)
                self._presence = Presence(self._survey, lambda tap: self._schedule({tap}), self._stranger)
                stack.push_async_callback(self._presence.close)
                self._open = stack.pop_all()
        return self

    async def begin(self) -> None:
        """Look at the host, listen to it from now on, and carry out what has been declared. Raises Unavailable.

        Takes some 0.1 s, most of it for a library: what need not wait for the network goes before.
        """
        await asyncio.to_thread(rtnetlink.load)
        with _reachable():
            self._events = Events(self._heard, self._overflowed)
            self._open.callback(self._events.close)
            self._firewall = Firewall(lambda: self._schedule(every=True))
            self._open.callback(self._firewall.close)
            self._forwarding = Forwarding(lambda: self._schedule(every=True), self._bus)
            self._open.push_async_callback(self._forwarding.close)
            await self._forwarding.begin()
            self._look(links=True)
        self._begun.set()
        self._reconcile()

    async def begun(self) -> None:
        """Return once the host has been looked at: no tap is opened before."""
        await self._begun.wait()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stops listening. The kernel keeps what it has; guests' solicitations of LAN hosts stay unanswered."""
        self._closed = True  # nobody waits for the end of a tap from here on: it would not be heard
        self._begun.set()
        for handle in (self._pass, self._poll):
            if handle is not None:
                handle.cancel()
        for future in set().union(*self._waiting.values()):
            if not future.done():
                future.set_result(None)
        await self._open.aclose()

    # --- what others want ---------------------------------------------------------------------------------------------

    def declare(self, nics: Iterable[Nic], open_firewalls: bool = False) -> None:
        """All NICs there are, of guest files and of running guests, by tap name; replaces what was declared before.

        ``open_firewalls``: let the guests' packets pass where others' firewalls on this host would drop them.
        Taps that exist are set up before it returns, leftovers of others removed; or by ``begin``, if that comes later.
        Refusals of the kernel are reported.
        """
        self._declared = True
        self._nics = {nic.tap: nic for nic in nics}
        self._open_firewalls = open_firewalls
        self._survey.expect(self._nics.keys())
        self._over &= self._nics.keys()
        self._schedule(every=True, deep=True)
        self._reconcile()

    def open_tap(self, nic: Nic, queues: int = 1) -> list[int]:
        """As ``netlink.open_tap``. Nothing is claimed for it before ``ready``: the LAN has to be asked first."""
        if same := next((link.name for link in self._survey.others() if link.mac == nic.mac), ""):
            raise StartFailed(f"the MAC address {nic.mac} of {nic.tap} is that of this host's {same} (choose another)")
        self._over.add(nic.tap)
        return netlink.open_tap(nic.tap, queues)

    def mtu(self, nic: Nic) -> int:
        """Of its LAN, in bytes; 0 while there is no uplink."""
        uplink = self._survey.uplink(nic)
        return uplink.mtu if uplink else 0

    def settings(self, nic: Nic) -> Settings | None:
        """What it has to be set up with inside, as far as the LAN is known."""
        uplink = self._survey.uplink(nic)
        return settings(nic, uplink, self._survey.host) if uplink else None

    async def check(self, nic: Nic) -> None:
        """As ``Presence.check``."""
        await self._presence.check(nic)

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
        self._presence.forget(tap)
        self._strangers.pop(tap, None)
        if tap in self._over:
            return
        self._over.add(tap)
        self._schedule({tap})
        self._reconcile()

    async def withdraw(self, tap: str) -> None:
        """The guest is over: the LAN is told no more about it, the uplink is as before if it was the last.

        Returns when the tap has gone; at once if it is not one that goes with its last holder.
        """
        await self._begun.wait()
        self.give_up(tap)
        while not self._closed and (link := self._survey.host.find(tap)) is not None and link.transient:
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
        before = self._survey.hear(link, gone)
        for future in self._waiting.pop(link.name, ()) if gone else ():
            if not future.done():
                future.set_result(None)
        if link.name not in self._nics:
            self._schedule(every=before != link or gone)
            is_now = (link.carrier, link.mac, link.name)
            known = before is None or gone or is_now == (before.carrier, before.mac, before.name)
            if link.carrier and not known:
                self._presence.announce_all(link)  # whoever listens on that wire now may not have heard
            return
        if gone:
            self._over.discard(link.name)
            self._strangers.pop(link.name, None)
            self._schedule({link.name})
        elif before != link:
            self._schedule({link.name})
            nic = self._nics[link.name]
            uplink = self._survey.uplink(nic)
            attached = before is not None and link.carrier and not before.carrier
            if attached and uplink is not None and link.name in self._running:
                self._presence.announce(uplink, nic.addresses)

    def _something_changed(self, event: Changed) -> None:
        if event.ways:
            self._ways.clear()
            self._schedule(every=True)
        link = self._survey.links.get(event.device)
        if link is None and event.device:
            return  # not heard of yet: settings are told of before the interface that is born with them
        if link is not None and link.name in self._nics:
            if event.lost:
                self._schedule({link.name})
        elif event.setting:
            self._schedule(every=True)
        else:
            self._survey.stale = True
            self._schedule()

    def _overflowed(self) -> None:
        self._look(links=True)
        self._schedule(every=True, deep=True)

    def _polled(self) -> None:
        """Proxy entries and settings make no events. A pass over a thousand taps takes long: only if they differ."""
        self._poll = None
        self._keep_looking()
        if self._holdings.touched() or self._four_only() != self._survey.host.four_only:
            self._schedule(every=True)
        self._presence.expire()
        for tap, source in self._firewall.strangers():
            self._stranger(tap, source)

    def _stranger(self, tap: str, source: str | Address) -> None:
        """Guests may send from any number of addresses that are not theirs: some are told of."""
        if tap not in self._running:
            return
        nic, known = self._running[tap][0], self._strangers.setdefault(tap, set())
        if source not in known and len(known) < STRANGERS and nic.addresses and source not in (nic.mac, *nic.addresses):
            known.add(source)
            self._report(tap, stranger(nic, source, last=len(known) == STRANGERS), WARNING)

    def _four_only(self) -> tuple[int, ...]:
        """Of the uplinks of guests with IPv6, those that have it switched off; without such guests it is no matter."""
        uplinks = {self._survey.uplink(nic) for nic, _tap in self._running.values() if 6 in nic.families}
        if not uplinks:
            return self._survey.host.four_only
        return self._sysctls.four_only(sorted(uplink.index for uplink in uplinks if uplink))

    def _keep_looking(self) -> None:
        if self._running and self._poll is None:
            self._poll = asyncio.get_running_loop().call_later(POLL, self._polled)

    # --- the pass -----------------------------------------------------------------------------------------------------

    def _schedule(self, names: Iterable[str] = (), every: bool = False, deep: bool = False) -> None:
        """A pass over these taps, or all, once everything has been heard that is there to be heard."""
        self._new.update(names)
        self._all, self._deep = self._all or every, self._deep or deep
        if self._pass is None:
            self._pass = asyncio.get_running_loop().call_soon(self._reconcile)

    def _look(self, links: bool = False) -> None:
        changed = self._survey.look(
            self._kernel.links() if links else None,
            self._kernel.addresses(self._survey.taps()),
            self._kernel.host_routes(),
        )
        self._all, self._deep = self._all or changed, self._deep or changed

    def _reconcile(self) -> None:
        if self._pass is not None:
            self._pass.cancel()
            self._pass = None
        if self._closed or not self._declared or not self._begun.is_set():
            return
        self._events.read()
        if self._survey.stale:
            self._look()
        names, every, deep = self._new, self._all, self._deep
        self._new, self._all, self._deep = set(), False, False
        found = {name: self._survey.links[index] for index, name in self._survey.taps().items()}
        self._running = {name: (self._nics[name], tap) for name, tap in found.items() if name not in self._over}
        self._keep_looking()
        concerned = {*self._nics, *self._holdings.plans} if every else names
        scope = {name: self._running[name] for name in concerned if name in self._running}
        settled = set() if deep else {tap.index for name, (_nic, tap) in scope.items() if name not in names}
        unguarded = self._guard([nic for nic, _tap in self._running.values()])  # before their first frame
        dropped = self._forwarding.apply(self._open_firewalls, self._pass_by(concerned))
        plans = self._plan(scope)
        over = concerned & self._holdings.plans.keys() - plans.keys()
        failures = self._apply(plans, over, every, settled)
        self._presence.serve(self._running.values())
        self._follow(plans)
        self._events.read()  # what we have just caused ourselves
        for name in concerned & self._nics.keys():
            tap = self._survey.links.get(found[name].index) if name in found else None
            self._tell(name, tap, plans.get(name), failures, unguarded, dropped.get(name, ""))

    def _pass_by(self, concerned: Iterable[str]) -> Mapping[str, Passage]:
        """What is to be forwarded, by tap: another object each time, of which the most is as it was."""
        passages = {name: passage for name, passage in self._passages.items() if name in self._running}
        for name in concerned:
            if name in self._running:
                nic, _tap = self._running[name]
                uplink = self._survey.uplink(nic)
                passages[name] = Passage(name, uplink.name if uplink else "", tuple(sorted(nic.families)))
        self._passages = passages
        return passages

    def _guard(self, nics: list[Nic]) -> str:
        uplinks = {uplink.index: uplink for nic in nics if (uplink := self._survey.uplink(nic)) is not None}
        lans = frozenset(prefix for uplink in uplinks.values() for prefix in self._survey.host.on_link(uplink))
        refusal = self._firewall.apply(nics, lans)
        if self._firewall.restored and nics:
            sentence = "the filter against forged addresses: restored after it was removed or changed"
            self._report(nics[0].tap, sentence, NOTICE)
        return refusal

    def _plan(self, scope: dict[str, tuple[Nic, Link]]) -> dict[str, Plan]:
        survey, before = self._survey, self._holdings.plans
        if any(6 in nic.families for nic, _tap in scope.values()):
            survey.learn(self._sysctls.learners(link.index for link in survey.others()), self._four_only())
        return {
            name: plan(nic, tap, survey.uplink(nic), survey.host, before.get(name))
            for name, (nic, tap) in scope.items()
        }

    def _apply(self, plans: dict[str, Plan], over: Iterable[str], every: bool, settled: set[int]) -> list[Failure]:
        """New proxy entries are announced, and what had to be restored is told."""
        before = {name: known for name in plans if (known := self._holdings.plans.get(name)) is not None}
        volatile = {tap.index for _nic, tap in self._running.values() if tap.transient}
        done, failures = self._holdings.apply({**dict.fromkeys(over), **plans}, every, settled, volatile)
        new: dict[int, list[Address]] = {}
        for thing in done:
            link = self._survey.links.get(thing.device)
            if isinstance(thing, LinkState):
                self._survey.made(thing)
            elif isinstance(thing, Proxy) and link and link.name not in self._nics:
                new.setdefault(link.index, []).append(thing.address)
        for index, addresses in new.items():
            self._presence.announce(self._survey.links[index], addresses)
        for name, sentence in chain(mended(done, plans, before).items(), narrowed(plans, before).items()):
            self._report(name, sentence, NOTICE)
        # A tap that is down in the middle of a pass has just been set down: its event comes, and another pass.
        return [failure for failure in failures if failure.code != errno.ENETDOWN]

    def _follow(self, plans: dict[str, Plan]) -> None:
        """Ask the kernel by what guests' packets to the world leave; no matter where an uplink leads nowhere."""
        known, self._ways = self._ways, {name: each for name, each in self._ways.items() if name in self._running}
        new = [each for name, each in plans.items() if name not in known or known[name][0] is not each]
        self._ways.update({each.nic.tap: (each, "") for each in new})
        asked = [(each, *journey) for each in new for journey in journeys(each)]
        found = self._kernel.ways([(each.tap.index, source, target) for each, source, target in asked])
        for (each, source, target), way in zip(asked, found, strict=True):
            if way and each.uplink and way != each.uplink.index:
                text = (
                    f"{each.nic.tap}: packets to the world leave by {self._survey.name(way)}, not by {each.uplink.name}"
                    f" (a VPN's routes? see: ip route get {target} from {source} iif {each.nic.tap})"
                )
                self._ways[each.nic.tap] = each, text

    def _tell(
        self, name: str, tap: Link | None, plan: Plan | None, failures: list[Failure], unguarded: str, dropped: str
    ) -> None:
        nic, before = self._nics[name], self.status(name)
        uplink, host = self._survey.uplink(nic), self._survey.host
        things = plan.things.values() if plan else ()
        missing = self._survey.no_uplink(nic) if uplink is None else ""
        astray = self._ways[name][1] if name in self._ways else ""
        four_only = uplink is not None and not host.speaks(uplink, 6)
        status = assess(
            *(nic, tap, uplink, self._presence.conflict(name), things, failures, unguarded, dropped, missing, astray),
            four_only,
        )
        if plan and uplink and nic.configure:
            status = replace(status, terms=dhcp.terms(nic, uplink, host))
        if status == before:
            return
        self._statuses[name] = status
        for sentence, priority in news(nic, uplink, host, before, status):
            self._report(name, sentence, priority)
        self._on_change(status)
