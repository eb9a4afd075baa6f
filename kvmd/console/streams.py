"""What a guest says: its serial port, with consoles at it, and QEMU's errors; each line logged, to the last."""

from __future__ import annotations

import asyncio
import re
from contextlib import AsyncExitStack
from syslog import LOG_WARNING

from kvmd.console.reader import Console
from kvmd.console.serial import Hearer, SerialLog
from kvmd.errors import StartFailed, Unavailable
from kvmd.runtime import Runtime
from kvmd.systemd import fdstore
from kvmd.systemd.journal import Event, Journal

CONSOLE_LINGER = 0.5
LAST_WORDS_OF = re.compile(r"^(sh: \d+: exec|qemu-system-\w+): ")


class Streams:
    """The two streams of a running guest."""

    def __init__(self, guest: str, runtime: Runtime, journal: Journal, *, log: bool, heard: Hearer) -> None:
        """``log``: whether serial lines are logged; ``heard`` as for ``SerialLog``. Raises ``StartFailed``."""
        self._guest = guest
        self._keyboard = runtime.path / "serial.in"
        self._consoles: set[asyncio.Task[None]] = set()
        self.serial = SerialLog(guest, "serial", runtime.path, journal, log=log, heard=heard)
        try:
            self._errors = SerialLog(guest, "qemu", runtime.path, journal, log=True)
        except StartFailed:
            self.serial.spool.close()
            raise
        self._undo = AsyncExitStack()
        for stream in ("serial", "qemu"):
            self._undo.callback(fdstore.drop, f"{guest}.{stream}")
        self._undo.callback(self.serial.spool.close)
        self._undo.push_async_callback(self._end_consoles)
        self._undo.push_async_callback(self.serial.finish)
        self._undo.push_async_callback(self._errors.close)

    def keep(self) -> None:
        """Have PID 1 hold them too, so that no line is lost between two daemons."""
        fdstore.keep(f"{self._guest}.serial", self.serial.spool.fifo)
        fdstore.keep(f"{self._guest}.qemu", self._errors.spool.fifo)

    def follow(self, invocation: str, *, resume: bool) -> None:
        """As ``SerialLog.start``."""
        self.serial.start(invocation, resume=resume)
        self._errors.start(invocation, resume=resume)

    async def last_words(self) -> str:
        """Why QEMU, which has ended, says it did; nothing if it gave no reason."""
        await self._errors.finish()
        words = [LAST_WORDS_OF.sub("", line) for line in self._errors.tail if line.strip()]
        return words[-1] if words else ""

    def open_console(self, position: int | None = None) -> tuple[int, int]:
        """A stream to the serial console, which the caller closes, and where in the guest's output it begins.

        Raises ``Unavailable``.
        """
        try:
            console = Console(self.serial.spool, self._keyboard, position)
        except OSError as error:
            raise Unavailable(f"cannot open a console of guest {self._guest}: {error.strerror}") from error
        task = asyncio.create_task(console.run(), name=f"console of {self._guest}")
        self._consoles.add(task)
        task.add_done_callback(self._consoles.discard)
        return console.take_theirs(), console.position

    async def _end_consoles(self) -> None:
        """Let them show the guest's last words; one that nobody reads is not waited for."""
        if self._consoles:
            _, stuck = await asyncio.wait(self._consoles, timeout=CONSOLE_LINGER)
            for task in stuck:
                task.cancel()
            await asyncio.gather(*stuck, return_exceptions=True)

    async def close(self) -> None:
        """QEMU has ended: log and show the rest, and let go."""
        await self._undo.aclose()


async def bury(name: str, journal: Journal) -> None:
    """Log what is left in the spools of a guest that ended while there was no daemon, and remove its directory."""
    runtime = Runtime(name)
    invocation = runtime.invocation()
    for stream in ("serial", "qemu") if invocation else ():
        try:
            rest = SerialLog(name, stream, runtime.path, journal, log=True)
            rest.start(invocation, resume=True)
            await rest.close()
        except StartFailed:  # it had not come that far
            continue
        except (Unavailable, OSError) as error:
            journal.say(Event.FAILED, f"Guest {name} left something over: {error}", name, LOG_WARNING)
    runtime.remove()
