"""console: a terminal, or a pipe, at the serial port of a guest.

At a terminal: raw, and as it was again whatever happens, after a SIGKILL by a process of its own; ^] three times within
a second leaves, as with machinectl. Bytes are counted: when kvmd starts anew it attaches again where it was.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import stat
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvmd.ctl.bus import GUEST, Bus, connect
from kvmd.ctl.failure import USAGE, Failure
from kvmd.ctl.guests import Guest, one

PRESSES, WITHIN = 3, 1.0  # of the escape character; seconds
PIECE = 1 << 16  # bytes
SCROLLBACK = 80  # bytes for each line that is asked for
FROM_NOW = 1 << 63  # a position that no guest comes to
LINGER = 1.0  # seconds for the answer to the last input
AGAIN, PATIENCE = 0.2, 60.0  # seconds from try to try, and until kvmd counts as gone
# What a guest may have switched on in this terminal: paste and mouse reports, the other screen, no cursor, colours.
UNDO = b"\x1b[?2004l\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1006l\x1b[?1049l\x1b[?25h\x1b[0m\x1b[!p"


async def run(arguments: argparse.Namespace) -> int:
    return await attach(arguments.name, escape=arguments.escape, lines=arguments.lines, resize=arguments.resize)


async def attach(name: str, *, escape: str = "]", lines: int = 20, resize: bool = False) -> int:
    """Until the person leaves, the guest ends, or the input does. Raises ``Failure``."""
    if len(escape) != 1 or not 0x40 <= ord(escape.upper()) < 0x60:
        raise Failure(f"^{escape} is no control character (one of @ to _)", status=USAGE)
    terminal = sys.stdin.isatty()
    async with connect() as bus:
        guest = await one(bus, name)
        before = max(0, guest.properties["SerialBytes"] - lines * SCROLLBACK)
        session = _Session(guest, ord(escape.upper()) & 0x1F if terminal else None, before if terminal else FROM_NOW)
        await session.open(bus)
    if terminal:
        leaves = f"^{escape.upper()} three times within a second leaves"
        print(f"Connected to {guest.name}; {leaves}.", file=sys.stderr)
    with _raw() if terminal else contextlib.nullcontext():
        why = await session.run(_stty() if resize and terminal else b"")
    if terminal:
        print(f"\nLeft {guest.name}: {why}.", file=sys.stderr)
    return 0


@contextmanager
def _raw() -> Iterator[None]:
    """The terminal, for whoever wants each key; and as it was again."""
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)

    def restore() -> None:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
        if sys.stdout.isatty():
            with contextlib.suppress(OSError):
                os.write(sys.stdout.fileno(), UNDO)

    def leave(number: int, _frame: object) -> None:
        restore()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    guardian, alive = _guard(restore)
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    handlers = {number: signal.signal(number, leave) for number in numbers}
    tty.setraw(fd)
    try:
        yield
    finally:
        restore()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.write(alive, b"\n")
        os.close(alive)
        os.waitpid(guardian, 0)


def _guard(restore: Callable[[], None]) -> tuple[int, int]:
    """A process that does it when this one dies, and where to write that it need not.

    It is in a session of its own, so that the terminal lets it (tcsetattr(3) of a background process stops it).
    """
    watch, alive = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            os.setsid()
            os.close(alive)
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            if not os.read(watch, 1):
                restore()
        finally:
            os._exit(0)
    os.close(watch)
    return process, alive


def _stty() -> bytes:
    """What tells a shell on a serial line how large the terminal is."""
    columns, rows = os.get_terminal_size(sys.stdin.fileno())
    return f"stty rows {rows} columns {columns}\n".encode()


class _Session:
    """Bytes both ways. ``escape``: the byte that leaves; None where nobody types. ``position``: of the next to show."""

    def __init__(self, guest: Guest, escape: int | None, position: int) -> None:
        self._guest = guest
        self._escape = escape
        self._position = position
        self._presses: list[float] = []
        self._over: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._stream = -1
        self._typed = bytearray()  # and not taken by the guest yet
        self._input_ended = False

    async def open(self, bus: Bus) -> None:
        """Raises ``Failure``."""
        self._stream, self._position = await bus.call(self._guest.path, GUEST, "OpenConsoleAt", "t", self._position)
        os.set_blocking(self._stream, False)

    async def run(self, first: bytes) -> str:
        """Why it is over. ``first``: what is typed before all else."""
        loop = asyncio.get_running_loop()
        self._typed += first
        self._listen()
        try:
            while True:
                loop.add_reader(self._stream, self._from_guest)
                self._to_guest()
                why = await self._over
                self._detach()
                if why or (why := await self._open_again()):
                    return why
                self._over = loop.create_future()
        finally:
            self._detach()
            loop.remove_reader(sys.stdin.fileno())

    async def _open_again(self) -> str:
        """The stream has ended: the guest has, or kvmd is just started anew. Why there is none any more, or nothing."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            try:
                async with connect() as bus:
                    await self.open(bus)
            except Failure as failure:
                if failure.name.endswith((".NotRunning", ".NoSuchGuest")):
                    return "it is off"
                await asyncio.sleep(AGAIN)  # nothing else says that a bus, or kvmd, is there again
            else:
                return ""
        return "kvmd does not come back (systemctl status kvmd)"

    def _listen(self) -> None:
        fd = sys.stdin.fileno()
        if stat.S_ISREG(os.fstat(fd).st_mode):  # which cannot be waited for (epoll_ctl(2), EPERM)
            self._typed += sys.stdin.buffer.read()
            self._input_ended = True
        else:
            asyncio.get_running_loop().add_reader(fd, self._from_person)

    def _detach(self) -> None:
        if self._stream >= 0:
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._stream)
            loop.remove_writer(self._stream)
            os.close(self._stream)
            self._stream = -1

    def _end(self, why: str) -> None:
        if not self._over.done():
            self._over.set_result(why)

    def _from_guest(self) -> None:
        try:
            data = os.read(self._stream, PIECE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._position += len(data)
        if not data:
            asyncio.get_running_loop().remove_reader(self._stream)
            self._end("")
            return
        try:
            while data:
                data = data[os.write(sys.stdout.fileno(), data) :]
        except OSError:
            self._end("nobody reads it")

    def _from_person(self) -> None:
        try:
            data = os.read(sys.stdin.fileno(), 4096)
        except OSError:
            data = b""
        if not data:
            self._input_ended = True
            asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
        for byte in data:
            self._presses = [*self._presses, time.monotonic()][-PRESSES:] if byte == self._escape else []
            if len(self._presses) == PRESSES and self._presses[-1] - self._presses[0] <= WITHIN:
                self._end("it goes on")
                return
        self._typed += data
        self._to_guest()

    def _to_guest(self) -> None:
        """As much as it takes; nothing more is read from the person until then."""
        loop = asyncio.get_running_loop()
        if self._stream < 0:
            return
        try:
            while self._typed:
                del self._typed[: os.write(self._stream, self._typed)]
        except BlockingIOError:
            loop.add_writer(self._stream, self._to_guest)
            if not self._input_ended:
                loop.remove_reader(sys.stdin.fileno())
            return
        except OSError:
            self._end("")
            return
        loop.remove_writer(self._stream)
        if self._input_ended:
            loop.call_later(LINGER, self._end, "its input has ended")
        else:
            loop.add_reader(sys.stdin.fileno(), self._from_person)
