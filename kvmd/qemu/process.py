"""Spawn QEMU: another user, its descriptors, no parent but PID 1, and not a step before it is let go."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType

from kvmd.errors import StartFailed

ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}

# The shell forks once more and ends, so that PID 1 adopts QEMU, reaps it and knows its exit status: it is the main
# process of kvmd@NAME.service. The grandchild blocks until it has been put into its scope; if the daemon dies before,
# read fails and nothing was started. Signal 38 is SIGRTMIN+4, which `machinectl poweroff` sends to a container's
# init and which would kill QEMU; an ignored signal survives exec. The daemon's OOMScoreAdjust= is not for QEMU.
LAUNCHER = """
trap '' 38
echo 0 >/proc/self/oom_score_adj
exec 3<&0
( read -r _ <&3 && exec "$@" 3<&- ) >/dev/null &
echo $!
"""

# Above what the launcher uses itself.
FIRST_FD = 64


@dataclass
class Descriptors:
    """What QEMU inherits. Numbers stay the same in the child, so that they can stand in its arguments."""

    numbers: list[int] = field(default_factory=list)
    closed: bool = False

    def __enter__(self) -> Descriptors:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closed = True
        for number in self.numbers:
            os.close(number)
        self.numbers.clear()

    def take(self, fd: int) -> int:
        """Own ``fd`` from now on; the number QEMU will know it by. Raises ``StartFailed`` if nobody waits any more."""
        if self.closed:
            os.close(fd)
            raise StartFailed("the start was given up")
        number = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FIRST_FD)
        os.close(fd)
        self.numbers.append(number)
        return number

    def lend(self, fd: int) -> int:
        """As ``take``, but the caller keeps ``fd``."""
        return self.take(os.dup(fd))


@dataclass(frozen=True)
class User:
    """The unprivileged user of QEMU, with the group of /dev/kvm where KVM is used."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


class Process:
    """A process that is not our child: signals and death by pidfd (pidfd_open(2)), exit status known to PID 1 only."""

    def __init__(self, pid: int) -> None:
        """Raises ``ProcessLookupError``."""
        self.pid = pid
        self.fd = os.pidfd_open(pid)
        self.ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(self.fd, self._end)

    def _end(self) -> None:
        asyncio.get_running_loop().remove_reader(self.fd)
        self.ended.set()

    def signal(self, number: signal.Signals) -> None:
        if not self.ended.is_set():
            with contextlib.suppress(ProcessLookupError):  # it has ended, and the loop is about to hear of it
                signal.pidfd_send_signal(self.fd, number)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self.fd)
        os.close(self.fd)


async def spawn(
    argv: Sequence[str], descriptors: Descriptors, user: User, stderr: int
) -> tuple[Process, Callable[[], None], Callable[[], None]]:
    """Start ``argv`` up to the point where it would be executed; the process, what lets it go, what gives it up.

    Raises ``StartFailed``.
    """
    let_go_read, let_go = os.pipe2(os.O_CLOEXEC)
    launching = asyncio.create_task(
        asyncio.to_thread(
            subprocess.run,
            ["/bin/sh", "-c", LAUNCHER, "sh", *argv],
            stdin=let_go_read,
            stdout=subprocess.PIPE,
            stderr=stderr,
            pass_fds=descriptors.numbers,
            user=user.uid,
            group=user.gid,
            extra_groups=user.groups,
            umask=0o077,
            cwd="/",
            env=ENVIRONMENT,
            start_new_session=True,
        )
    )
    try:
        launcher = await asyncio.shield(launching)
        process = Process(int(launcher.stdout))
    except BaseException as error:
        await asyncio.wait((launching,))  # the thread goes on using the descriptors
        os.close(let_go)  # and what it started must not outlive this: it holds the taps
        if isinstance(error, (OSError, ValueError)):
            raise StartFailed(f"cannot spawn a process for QEMU: {error}") from error
        raise
    finally:
        os.close(let_go_read)

    def release() -> None:
        with contextlib.suppress(BrokenPipeError):  # killed meanwhile: the pidfd tells
            os.write(let_go, b"\n")
        os.close(let_go)

    return process, release, lambda: os.close(let_go)
