"""The guests' way through others' firewalls: seen, told, and opened where the administrator allows it.

Docker's, ufw's and anybody's iptables get rules of ours, in the chain they provide for that; firewalld, whose table is
its own, is asked over D-Bus to take the taps into its zone ``kvmd``, which comes with two policies. Looked at when
guests come and go and when the ruleset changes, so what others flush is back at once; never in between.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Mapping

from kvmd.network.firewalls.barriers import (
    OWN,
    Barrier,
    Passage,
    Ruleset,
    barriers,
    changes,
    openings,
    parse,
    sentence,
    tables,
)
from kvmd.network.kernel.nftables import STRUCTURE, Changes, Nftables
from kvmd.systemd.sysbus import BusError, SystemBus

BUS_NAME = "org.fedoraproject.FirewallD1"
ZONES = (BUS_NAME, "/org/fedoraproject/FirewallD1", f"{BUS_NAME}.zone")
ZONE = "kvmd"  # units/firewalld
PAUSE, PATIENCE = 0.2, 1.0  # seconds of quiet, and at most: iptables makes one rule after the other, Docker 50
SHARE = 20  # one part of the time for looking, the rest not: 10,000 rules take 0.2 s


class Forwarding:
    """Looks at others' rules, and keeps ours among them."""

    def __init__(self, changed: Callable[[], None], bus: SystemBus | None) -> None:
        """``changed()``: apply again. Without ``bus`` firewalld is not asked. Needs a running loop. Raises OSError."""
        self._changed = changed
        self._nft = Nftables()
        self._changes = Changes(self._heard)
        self._firewalld = _Firewalld(bus, self._answered) if bus else None
        self._rules = Ruleset()
        self._stale = True
        self._asked: tuple[bool, Mapping[str, Passage]] | None = None
        self._found: dict[str, list[Barrier]] = {}  # by tap
        self._sentences: dict[str, str] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._latest = 0.0
        self._rest = 0.0  # seconds, after the last look

    async def begin(self) -> None:
        if self._firewalld:
            await self._firewalld.begin()

    async def close(self) -> None:
        """Leaves the rules as they are."""
        self._changes.close()
        if self._timer:
            self._timer.cancel()
        if self._firewalld:
            await self._firewalld.close()

    def apply(self, allowed: bool, passages: Mapping[str, Passage]) -> Mapping[str, str]:
        """Open what is in these guests' way, by tap, if ``allowed``. A sentence for each whose way is barred.

        Blocks for some milliseconds if the ruleset has changed.
        """
        if (allowed, passages) == self._asked and not self._stale:
            return self._sentences
        if not passages and not self._rules.ours and self._asked == (allowed, passages):
            return {}  # nobody to look for
        looked = self._stale and self._look()
        before = self._asked[1] if self._asked and not looked else {}
        self._asked = allowed, passages
        self._found = found = {
            tap: self._found[tap] if before.get(tap) is passage else barriers(self._rules, passage)
            for tap, passage in passages.items()
        }
        wanted = {opening for tap, each in found.items() for opening in openings(each, tap)} if allowed else set()
        commands = changes(self._rules, wanted)
        trouble = self._nft.run(commands) if commands else ""
        if commands and self._heard():  # of our own rules, or of others' that came between: there is another pass
            trouble = ""
            self._stale = True
        asking, refusal = False, ""
        if self._firewalld and self._rules.has("inet", "firewalld"):
            asking = self._firewalld.apply(set(found) if allowed else set(), anew=looked)
            refusal = self._firewalld.trouble
        elif self._firewalld:
            self._firewalld.forget()
        told, self._sentences = self._sentences, {}
        for tap, each in found.items():
            left = [barrier for barrier in each if not allowed or trouble or barrier.owner == "firewalld"]
            text = sentence(left, tap, allowed, trouble or refusal) if left else ""
            if text and asking:
                text = told.get(tap, "")  # the news is told when it has answered
            if text:
                self._sentences[tap] = text
        return self._sentences

    def _look(self) -> bool:
        """Read the rules. False: they changed meanwhile, or cannot be read; the next pass tries again."""
        self._changes.read()
        clock = asyncio.get_running_loop().time
        begun = clock()
        try:
            listing = [item for table in tables(self._nft.list("chains")) for item in self._nft.list(f"table {table}")]
        except OSError:
            return False
        self._rules = parse(listing)
        self._stale = False
        self._rest = SHARE * (clock() - begun)
        return True

    def _heard(self) -> bool:
        news = self._changes.read()
        relevant = news is None or any(kind in STRUCTURE and table != OWN for kind, table in news)
        if relevant:
            loop = asyncio.get_running_loop()
            if self._timer:
                self._timer.cancel()
            else:
                self._latest = loop.time() + max(PATIENCE, self._rest)
            self._timer = loop.call_at(min(loop.time() + max(PAUSE, self._rest), self._latest), self._settled)
        return relevant

    def _settled(self) -> None:
        self._timer, self._stale = None, True
        self._changed()

    def _answered(self, acted: bool) -> None:
        self._stale = self._stale or acted
        self._asked = None
        self._changed()


class _Firewalld:
    """Membership of taps in firewalld's zone, at runtime only: over its reload it keeps them, over its restart we do.

    While firewalld reloads it answers nobody, so an answer means that its rules are in place.
    """

    def __init__(self, bus: SystemBus, answered: Callable[[bool], None]) -> None:
        """``answered(acted)``: firewalld was asked, and whether anything is different now."""
        self._bus, self._answered = bus, answered
        self._wanted: set[str] = set()
        self._ours: set[str] = set()
        self._task: asyncio.Task[None] | None = None
        self.trouble = ""

    async def begin(self) -> None:
        def started(owner: str) -> None:
            if owner and self._wanted:
                self._ask()

        await self._bus.watch(BUS_NAME, started)

    async def close(self) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def apply(self, taps: set[str], anew: bool) -> bool:
        """Whether firewalld has been asked and has not answered yet."""
        if taps != self._wanted or (anew and taps):
            self._wanted = taps
            self._ask()
        return self._task is not None

    def forget(self) -> None:
        """There is no firewalld any more; another one knows nothing of us."""
        self._wanted, self._ours, self.trouble = set(), set(), ""

    def _ask(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._settle(), name="firewalld")

    async def _settle(self) -> None:
        acted, settled, before = False, None, self.trouble
        while settled != self._wanted:
            settled = self._wanted
            self.trouble = ""
            try:
                (present,) = await self._bus.call(ZONES, "getInterfaces", "s", ZONE, returns="as")
            except BusError as error:
                hint = f" (it learns of zone {ZONE} by: firewall-cmd --reload)" if "INVALID_ZONE" in str(error) else ""
                self.trouble = f"firewalld: {error}{hint}" if settled else ""
                continue
            self._ours = (self._ours | settled) & set(present)
            for tap in settled - set(present):
                acted |= await self._move("addInterface", tap)
            for tap in self._over(settled, set(present)):
                acted |= await self._move("removeInterface", tap)
        self._task = None
        self._answered(acted or before != self.trouble)

    def _over(self, wanted: set[str], present: set[str]) -> set[str]:
        """What we have put there, and what a crash left there. An administrator may use the zone without us."""
        there = {name for _index, name in socket.if_nameindex()}
        return (self._ours - wanted) | (present - there if wanted else set())

    async def _move(self, member: str, tap: str) -> bool:
        try:
            await self._bus.call(ZONES, member, "ss", ZONE, tap, returns="s")
        except BusError as error:
            self.trouble = f"firewalld: {error}"
            return False
        (self._ours.add if member == "addInterface" else self._ours.discard)(tap)
        return True
