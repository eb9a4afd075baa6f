"""The QEMU guest agent (docs/interop/qemu-ga.rst): asked, and never believed.

Each question has a connection of its own, which begins by synchronising: what an agent was asked before, and did not
answer in time, is answered to nobody. Nothing is asked of an agent that is not there yet, which would do it later. What
it says is a guest's: bounded in length and time, and only of the types that were asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from collections.abc import Callable
from ipaddress import ip_address
from typing import Any

from kvmd.errors import Busy, InvalidOption, KvmdError, Unavailable, plain
from kvmd.guest import Guest
from kvmd.runtime import Runtime

LONGEST = 1 << 16  # bytes of an answer
PATIENCE = 5.0  # seconds for it
FREEZING = 20.0  # seconds for that of a freeze, which writes all to disk first; callers wait 25 (busctl(1), --timeout=)
FROZEN = 300  # seconds for which file systems may be frozen at most
AGAIN = 2.0  # seconds from one attempt to the next
ADDRESSES = 256
READABLE = 200  # characters of a sentence of the agent's


class NotDone(Unavailable):
    """The agent has not heard of it, or has refused it."""


class Agent:
    """Raises ``Unavailable`` for a guest that has no channel, or no agent that answers."""

    def __init__(self, guest: Guest, runtime: Runtime, warn: Callable[[str], None]) -> None:
        self._guest = guest
        self._runtime = runtime
        self._warn = warn
        self._turn = asyncio.Lock()
        self._thawing: asyncio.Task[None] | None = None
        self._leaving: asyncio.Task[None] | None = None

    async def addresses(self) -> list[str]:
        """The guest's IP addresses as it says: all but those of its loopback."""
        found: list[str] = []
        for interface in _list(await self._ask("guest-network-get-interfaces")):
            for entry in _list(interface.get("ip-addresses") if isinstance(interface, dict) else None):
                with contextlib.suppress(ValueError, TypeError, AttributeError):
                    address = ip_address(str(entry.get("ip-address"))[:64])
                    if not address.is_loopback and str(address) not in found:
                        found.append(str(address))
        return found[:ADDRESSES]

    async def freeze(self, seconds: int) -> int:
        """Have it write all to disk, and write no more for so long; how many file systems do so."""
        if not 0 < seconds <= FROZEN:
            raise InvalidOption(f"file systems are frozen for 1 to {FROZEN} seconds, not for {seconds}")
        if self._thawing:
            raise Busy(f"the file systems of guest {self._guest.name} are frozen already (thaw them first)")
        self._refuse_without()
        self._runtime.write({"frozen": b""})
        self._thaw_after(seconds)
        try:
            return _count(await self._ask("guest-fsfreeze-freeze", FREEZING))
        except NotDone:  # anything else may be done later
            self._thaw_no_more()
            raise

    async def thaw(self) -> int:
        """Have it write again; how many file systems do so."""
        count = _count(await self._ask("guest-fsfreeze-thaw"))
        self._thaw_no_more()
        return count

    def adopt(self) -> None:
        """Thaw what an earlier daemon has frozen, and is not there to thaw."""
        if self._guest.agent and (self._runtime.path / "frozen").exists():
            self._thaw_after(0)

    def close(self) -> None:
        for task in (self._thawing, self._leaving):
            if task:
                task.cancel()

    def _thaw_no_more(self) -> None:
        self._runtime.forget("frozen")
        if self._thawing and self._thawing is not asyncio.current_task():
            self._thawing.cancel()
        self._thawing = None

    def _thaw_after(self, seconds: int) -> None:
        self._thawing = asyncio.create_task(self._thaw_later(seconds), name=f"thaw {self._guest.name}")

    async def _thaw_later(self, seconds: int) -> None:
        await asyncio.sleep(seconds)
        warned = False
        while True:
            try:
                await self.thaw()
                return
            except KvmdError as error:
                if not warned:
                    self._warn(f"is perhaps frozen, and kvmd goes on trying to thaw it: {error}")
                warned = True
            await asyncio.sleep(AGAIN)

    def begin_to_shut_down(self) -> None:
        """Have the guest power off, as soon as its agent answers: also one that is deaf to its power button."""
        if self._guest.agent and not self._leaving:
            self._leaving = asyncio.create_task(self._shut_down(), name=f"agent of {self._guest.name}")

    async def _shut_down(self) -> None:
        while True:
            with contextlib.suppress(KvmdError):
                if self._thawing:
                    await self.thaw()
                await self._ask("guest-shutdown", answers=False, mode="powerdown")
                return
            await asyncio.sleep(AGAIN)

    def _refuse_without(self) -> None:
        if not self._guest.agent:
            hint = "enabled = true under [agent] makes one at its next start"
            raise Unavailable(f"guest {self._guest.name} has no channel to an agent ({hint})")

    async def _ask(self, command: str, patience: float = PATIENCE, *, answers: bool = True, **arguments: object) -> Any:
        """``answers``: whether it says anything when all is well."""
        self._refuse_without()
        name = self._guest.name
        failure: type[Unavailable] = NotDone
        try:
            async with asyncio.timeout(patience), self._turn:
                reader, writer = await asyncio.open_unix_connection(str(self._runtime.path / "agent"), limit=LONGEST)
                try:
                    await _synchronise(reader, writer)
                    failure = Unavailable  # from here on nobody knows
                    request = {"execute": command, **({"arguments": arguments} if arguments else {})}
                    writer.write(json.dumps(request).encode() + b"\n")
                    with contextlib.suppress(*(() if answers else (TimeoutError, asyncio.IncompleteReadError))):
                        async with asyncio.timeout(None if answers else AGAIN):
                            answer = json.loads(await reader.readuntil(b"\n"))
                            return _result(answer, f"the agent in guest {name} refused {command}")
                    return None
                finally:
                    writer.transport.abort()
        except TimeoutError as error:
            what = f"no agent in guest {name} has answered within {patience:g} s"
            raise failure(f"{what} (is qemu-guest-agent installed in it, and running?)") from error
        except (OSError, EOFError) as error:
            raise failure(f"the channel to the agent in guest {name} was closed") from error
        except (ValueError, RecursionError, asyncio.LimitOverrunError) as error:
            raise failure(f"what the agent in guest {name} answers to {command} cannot be read") from error


async def _synchronise(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Forget what is in the way: 0xff ends it on both sides (guest-sync-delimited). Raises ``EOFError``."""
    token = secrets.randbelow(1 << 31)
    request = {"execute": "guest-sync-delimited", "arguments": {"id": token}}
    writer.write(b"\xff" + json.dumps(request).encode() + b"\n")
    while True:
        await reader.readuntil(b"\xff")
        with contextlib.suppress(ValueError, RecursionError):
            if json.loads(await reader.readuntil(b"\n")) == {"return": token}:
                return


def _result(answer: object, refused: str) -> Any:
    """Raises ``NotDone``, ``ValueError``."""
    match answer:
        case {"return": value}:
            return value
        case {"error": {"desc": str(reason)}}:
            raise NotDone(f"{refused}: {plain(reason[:READABLE])}")
    raise ValueError(answer)


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _count(value: object) -> int:
    return value if isinstance(value, int) and 0 <= value < 1 << 32 else 0
