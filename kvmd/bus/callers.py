"""Who calls: the user behind each, and how much of the daemon's time is theirs.

Root's calls are answered as they come. Of any other user's so many are in progress and no more, and what only reads is
answered one at a time, so that a flood of them keeps root waiting for no longer than one takes.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from weakref import WeakValueDictionary

from kvmd.systemd.sysbus import LIMITS_EXCEEDED, BusError, Incoming, SystemBus

IN_PROGRESS = 128  # calls; for as many answers the bus lets one connection wait
REMEMBERED = 1024  # callers


class Callers:
    """Admits calls, and has them answered."""

    def __init__(self, bus: SystemBus, answer: Callable[[Incoming, int], Awaitable[None]]) -> None:
        """``answer(call, uid)``."""
        self._bus = bus
        self._answer = answer
        self._uids: dict[str, int] = {}  # by unique name, which the bus gives to nobody else later
        self._unknown: dict[str, list[Incoming]] = {}
        self._in_progress: Counter[int] = Counter()
        self._turns: WeakValueDictionary[int, asyncio.Lock] = WeakValueDictionary()
        self._tasks: set[asyncio.Task[None]] = set()

    def take(self, call: Incoming) -> None:
        """Have it answered, or refuse it."""
        uid = self._uids.get(call.sender)
        if uid is not None:
            self._admit(call, uid)
        elif (waiting := self._unknown.get(call.sender)) is None:
            self._unknown[call.sender] = [call]
            self._run(self._identify(call.sender), f"who is {call.sender}")
        elif len(waiting) < IN_PROGRESS:
            waiting.append(call)
        else:
            self._refuse(call)

    def turn(self, uid: int) -> asyncio.Lock:
        """For what is done for this user one after the other."""
        return self._turns.setdefault(uid, asyncio.Lock())

    async def _identify(self, sender: str) -> None:
        try:
            uid = await self._bus.uid(sender)
        except BusError:  # it has left the bus, and needs no answers
            del self._unknown[sender]
            return
        while len(self._uids) >= REMEMBERED:
            del self._uids[next(iter(self._uids))]
        self._uids[sender] = uid
        for call in self._unknown.pop(sender):
            self._admit(call, uid)

    def _admit(self, call: Incoming, uid: int) -> None:
        if uid and self._in_progress[uid] >= IN_PROGRESS:
            self._refuse(call)
            return
        self._in_progress[uid] += 1
        self._run(self._answer(call, uid), f"{call.member} from {call.sender}").add_done_callback(
            lambda _task: self._answered(uid)
        )

    def _answered(self, uid: int) -> None:
        self._in_progress[uid] -= 1
        if not self._in_progress[uid]:
            del self._in_progress[uid]

    def _refuse(self, call: Incoming) -> None:
        text = f"{call.member} refused: {IN_PROGRESS} of your calls are in progress (wait for these)"
        self._bus.refuse(call, LIMITS_EXCEEDED, text)

    def _run(self, work: Awaitable[None], name: str) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        task.set_name(name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
