"""When guests' addresses are announced, and again: a switch port forwards only some seconds after it is up.

At once, and after 1, 3 and 7 s: RFC 5227 section 2.3 has two within 2 s, which such a port never hears, nor whoever
loses a packet. All guests share one timer; the addresses of a thousand are not said in one breath.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Set

from kvmd.guest import Address

TIMES = 0.0, 1.0, 3.0, 7.0  # seconds after what there was to be announced
LOT, PAUSE = 256, 0.05  # addresses said at once, and seconds until the next


class Announcements:
    """By uplink and address: each is said at these times after it was last begun."""

    def __init__(self, say: Callable[[int, list[Address]], None]) -> None:
        """``say(uplink index, addresses)``. Needs a running loop."""
        self._say = say
        self._begun: dict[tuple[int, Address], tuple[float, int]] = {}  # when, and how often it was said since
        self._timer: asyncio.TimerHandle | None = None

    def close(self) -> None:
        self._begun.clear()
        self._set()

    def begin(self, uplink: int, addresses: Iterable[Address]) -> None:
        """The first time at once, unless there are too many."""
        now = asyncio.get_running_loop().time()
        for address in addresses:
            self._begun.pop((uplink, address), None)
            self._begun[uplink, address] = now, 0
        self._go_on()

    def keep(self, claims: Mapping[int, Set[Address]]) -> None:
        """Of no other addresses, by uplink, there is anything to be said any more."""
        if gone := [key for key in self._begun if key[1] not in claims.get(key[0], ())]:
            for key in gone:
                del self._begun[key]
            self._set()

    def _go_on(self) -> None:
        now = asyncio.get_running_loop().time()
        due: defaultdict[int, list[Address]] = defaultdict(list)
        for uplink, address in [key for key in self._begun if self._due(key) <= now][:LOT]:
            begun, count = self._begun.pop((uplink, address))
            if count + 1 < len(TIMES):
                self._begun[uplink, address] = begun, count + 1
            due[uplink].append(address)
        self._set(now + PAUSE)
        for uplink, addresses in due.items():
            self._say(uplink, addresses)

    def _due(self, key: tuple[int, Address]) -> float:
        begun, count = self._begun[key]
        return begun + TIMES[count]

    def _set(self, earliest: float = 0.0) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None
        if self._begun:
            when = max(earliest, min(map(self._due, self._begun)))
            self._timer = asyncio.get_running_loop().call_at(when, self._go_on)
