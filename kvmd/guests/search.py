"""A regular expression, searched for in what a guest prints by a process of its own.

What the guest prints decides how long that takes: ``(a+)+$`` and a line of a's would stand still for ever. So the
process may take some seconds of CPU time, is nobody's, and holds up nothing but the guest's own log. It ends with the
daemon, when its input does.
"""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence

LIMIT = 10  # seconds of CPU time, for all that a guest prints until it is ready
PATIENCE = 60.0  # seconds for a batch of lines, where the machine has no time for it
NOBODY = 65534

# Its input: the pattern in hexadecimal digits; then again and again a count, and as many lines. "1" if one matches.
# SIGPROF, unlike RLIMIT_CPU, ends it without a core dump. RLIMIT_AS is in bytes. Short of memory is nobody but it.
SEARCH = f"""
import re, resource, signal, sys
signal.setitimer(signal.ITIMER_PROF, {LIMIT})
resource.setrlimit(resource.RLIMIT_AS, (1 << 26, 1 << 26))
with open("/proc/self/oom_score_adj", "w") as file:
    file.write("1000")
given = sys.stdin.buffer
pattern = re.compile(bytes.fromhex(given.readline().decode()).decode())
while count := given.readline():
    lines = [given.readline()[:-1].decode() for _ in range(int(count))]
    sys.stdout.write("1" if any(map(pattern.search, lines)) else "0")
    sys.stdout.flush()
"""


class Search:
    """For one guest. Begins with the first lines."""

    def __init__(self, pattern: re.Pattern[str], found: Callable[[], None], lost: Callable[[str], None]) -> None:
        """``found()`` or ``lost(why)`` is called once, at most: then it is over, as after ``close``."""
        self._pattern = pattern
        self._found, self._lost = found, lost
        self._process: subprocess.Popen[bytes] | None = None
        self._turn = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self.over = False

    async def of(self, lines: Sequence[str]) -> None:
        """Search these; lines are without their endings. Where the caller is cancelled, the search goes on."""
        task = asyncio.create_task(self._search(lines), name=f"search for {self._pattern.pattern}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await asyncio.shield(task)

    async def _search(self, lines: Sequence[str]) -> None:
        async with self._turn:
            if self.over:
                return
            try:
                async with asyncio.timeout(PATIENCE):
                    answer = await self._ask(lines)
            except ConnectionError:
                answer = ""
            except OSError as error:  # TimeoutError among them
                answer = str(error) or f"it takes more than {PATIENCE:g} s"
            try:
                if not self.over and answer != "0":
                    self.close()
                    if answer == "1":
                        self._found()
                    else:
                        self._lost(answer or await self._reason())
            finally:
                self._release()

    async def _ask(self, lines: Sequence[str]) -> str:
        """ "1" if one matches, or "0"; nothing where the process has ended."""
        loop = asyncio.get_running_loop()
        if not self._process:
            self._process, self._socket = await asyncio.to_thread(_spawn)
            await loop.sock_sendall(self._socket, b"%s\n" % self._pattern.pattern.encode().hex().encode())
        await loop.sock_sendall(self._socket, "\n".join([str(len(lines)), *lines, ""]).encode())
        return (await loop.sock_recv(self._socket, 1)).decode()

    async def _reason(self) -> str:
        """Why the process has ended, in words."""
        assert self._process
        status = await asyncio.to_thread(self._process.wait)
        if status == -signal.SIGPROF:
            return f"it takes more than {LIMIT} s of CPU time (write a simpler one)"
        return f"its process has ended with status {status}"

    def close(self) -> None:
        """The process ends."""
        self.over = True
        if self._process:
            self._process.kill()
        if not self._turn.locked():  # else the search in progress ends now, and does it
            self._release()

    def _release(self) -> None:
        if self.over and self._process:
            self._socket.close()
            asyncio.get_running_loop().run_in_executor(None, self._process.wait)
            self._process = None


def _spawn() -> tuple[subprocess.Popen[bytes], socket.socket]:
    """The process, and our end of the socket that it reads from and answers to."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-IS", "-c", SEARCH],
            stdin=theirs.fileno(),
            stdout=theirs.fileno(),
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={},
            user=NOBODY,
            group=NOBODY,
            extra_groups=(),
        )
    return process, ours
