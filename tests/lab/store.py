"""The cache: every expensive thing is built once, under a lock, and appears whole or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

CACHE = Path(os.environ.get("KVMD_LAB_CACHE", "/var/cache/kvmd-lab"))
KEEP = 4  # entries of a kind that stay when a newer one is built


class LabError(AssertionError):
    """Something of the lab, or a command in it, did not do what it was asked. Says what and where to look."""


def say(text: str) -> None:
    print(f"lab: {text}", file=sys.stderr, flush=True)


def key(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
        digest.update(b"\0")
    return digest.hexdigest()[:12]


@contextmanager
def locked(path: Path, *, shared: bool = False) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield


def built(kind: str, hash_: str, build: Callable[[Path], None]) -> Path:
    """The cached KIND-HASH, made by build(temporary path) if it is not there yet. It may be a file or a tree."""
    path = CACHE / f"{kind}-{hash_}"
    with locked(CACHE / "lock" / kind):
        if not path.exists():
            temporary = CACHE / f"{path.name}.new"
            discard(temporary)
            started = time.monotonic()
            say(f"building {kind} …")
            build(temporary)
            temporary.rename(path)
            say(f"built {kind} in {time.monotonic() - started:.0f} s")
            prune(kind, keep=path)
        os.utime(path)
    return path


def prune(kind: str, keep: Path) -> None:
    """Remove all but the most recently used entries of a kind; a host that uses one has it mounted or open."""
    entries = sorted(CACHE.glob(f"{kind}-????????????"), key=lambda path: path.stat().st_mtime, reverse=True)
    mounts = Path("/proc/self/mountinfo").read_text()
    for path in entries[KEEP:]:
        if path != keep and str(path) not in mounts and time.time() - path.stat().st_mtime > 3600:
            discard(path)


def discard(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def command(*argv: str | Path, log: Path | None = None, **environment: str) -> None:
    """Run a command of the machine, its output to a log; failing, show the end of it."""
    words = [str(word) for word in argv]
    done = subprocess.run(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "LC_ALL": "C.UTF-8", **environment},
    )
    if log:
        log.write_text(done.stdout)
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-30:])
        where = f" (all of it: {log})" if log else ""
        raise LabError(f"`{' '.join(words)}` ended with {done.returncode}{where}:\n{tail}")
