"""One run of one host: its directory, its cgroup, and the promise that both go away, whoever is killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import shutil
import subprocess
import uuid
from pathlib import Path
from typing import IO, Any, Self

from .store import CACHE, LabError, command, locked, say

RUNS = CACHE / "run"
LOGS = CACHE / "log"
LOCK = CACHE / "lock" / "run"
KEEP_LOGS = 50
KILL_TIMEOUT = 30.0


class Run:
    """A directory and a cgroup. The lock on `owner` says that the process that started it is alive."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.cgroup = cgroup_root() / f"kvmd-lab-{directory.name}"
        self._owner: IO[str] | None = None

    @classmethod
    def new(cls, name: str) -> Self:
        reap()
        with locked(LOCK):
            run = cls(RUNS / f"{name}-{uuid.uuid4().hex[:6]}")
            run.directory.mkdir(parents=True)
            run.cgroup.mkdir()
            run._owner = (run.directory / "owner").open("w")
            fcntl.flock(run._owner, fcntl.LOCK_EX)
        return run

    def popen(self, log: Path, *argv: str | Path, **options: Any) -> subprocess.Popen[bytes]:
        """Start the host's first process: in the cgroup, deaf to the terminal, what it prints appended to the log."""
        enter = ("sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', self.cgroup)
        with log.open("ab") as output:
            return subprocess.Popen(
                [*enter, *argv],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **options,
            )

    @property
    def console(self) -> Path:
        return self.directory / "console.log"

    def keep(self, pid: int) -> None:
        """Let the run outlive this process, as long as PID does."""
        (self.directory / "keep").write_text(str(pid))
        self._release()

    @property
    def kept(self) -> int:
        """The process that keeps it, 0 if there is none."""
        mark = self.directory / "keep"
        pid = int(mark.read_text()) if mark.exists() else 0
        return pid if Path(f"/proc/{pid}").exists() else 0

    def destroy(self) -> None:
        """Kill all that runs here, unmount, remove. The console log stays for a while."""
        with locked(LOCK):  # who reaps must not take what is half removed for something left behind
            self._destroy()

    def _destroy(self) -> None:
        if self.cgroup.exists():
            self._kill()
            for path in sorted(self.cgroup.rglob("*/"), key=lambda path: len(path.parts), reverse=True):
                path.rmdir()
            self.cgroup.rmdir()
        while os.path.ismount(self.directory / "root"):
            command("umount", "--recursive", self.directory / "root")
        if self.console.exists():
            save(self.console, f"{self.directory.name}.console.log")
        shutil.rmtree(self.directory)
        self._release()

    def _kill(self) -> None:
        """Kill the cgroup and wait until the kernel says that nobody is left in it."""
        (self.cgroup / "cgroup.kill").write_text("1")
        events = os.open(self.cgroup / "cgroup.events", os.O_RDONLY)
        try:
            poll = select.poll()
            poll.register(events, select.POLLPRI)
            while b"populated 0" not in os.pread(events, 4096, 0):
                if not poll.poll(KILL_TIMEOUT * 1000):
                    raise LabError(f"processes in {self.cgroup} survive SIGKILL")
        finally:
            os.close(events)

    def _release(self) -> None:
        if self._owner:
            self._owner.close()
            self._owner = None


def reap() -> None:
    """Remove what runs left behind whose process was killed."""
    with locked(LOCK):
        for run in runs():
            with contextlib.suppress(BlockingIOError), (run.directory / "owner").open("w") as owner:
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not run.kept:
                    say(f"removing what is left of {run.directory.name}")
                    run._destroy()


def runs() -> list[Run]:
    return [Run(directory) for directory in sorted(RUNS.iterdir())] if RUNS.is_dir() else []


def save(path: Path, name: str) -> Path:
    """Keep a log of a run that is about to go away; the oldest of many make room."""
    LOGS.mkdir(exist_ok=True)
    with locked(CACHE / "lock" / "log"):
        for old in sorted(LOGS.iterdir(), key=lambda log: log.stat().st_mtime)[:-KEEP_LOGS]:
            old.unlink()
        return shutil.copyfile(path, LOGS / name)


def cgroup_root() -> Path:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[fields.index("-") + 1] == "cgroup2":
            return Path(fields[4])
    raise LabError("no cgroup2 file system is mounted on this machine: a systemd host needs one")
