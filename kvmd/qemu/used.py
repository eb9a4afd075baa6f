"""The images that a guest has used, in /var/lib/kvmd/NAME/disks: none of them is ever made anew, blank, in its place.

An image that is missing may be on storage that is not mounted. And what lies below an overlay must stay what it was:
the overlay is nothing but the difference to it. NVRAM and TPM are noted there, too: these are made anew, but not in
silence. All of it blocks as long as the storage takes: it is for a thread.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from kvmd.errors import StartFailed
from kvmd.guest import Disk
from kvmd.qemu.drives import Layer

STATE = Path("/var/lib/kvmd")


class Used:
    """Those of one guest."""

    def __init__(self, guest: str) -> None:
        self.file = STATE / guest / "disks"
        self._disks: dict[str, dict[str, Any]] = {}
        with suppress(OSError, ValueError, TypeError, RecursionError):  # none, or damaged
            disks = json.loads(self.file.read_text())
            self._disks = {path: dict(about) for path, about in dict(disks).items()}

    def refuse_new(self, disk: Disk) -> None:
        """Raises ``StartFailed`` where an image has been, and is no more."""
        if str(disk.path) in self._disks:
            hint = f"is its file system mounted? For an empty one in its place: rm {self.file}"
            raise StartFailed(f"the disk image {disk.path} has gone, which this guest has used before ({hint})")

    def note(self, disk: Disk, layers: Sequence[Layer]) -> str:
        """It is used from now on. What is odd about what lies below it, in one sentence, or ""."""
        below = [_identity(layer.fd) for layer in layers[1:]]
        before = self._disks.get(str(disk.path), {}).get("below", below)
        self._disks[str(disk.path)] = {"below": below, "storage": _storage(disk.path)}
        if before == below:
            return ""
        return f"what lies below the disk image {disk.path} is not what it was: the guest's data may be damaged by it"

    def before(self, state: Path) -> bool:
        """Whether the guest has had this file or directory of its own."""
        return str(state) in self._disks

    def note_state(self, state: Path) -> None:
        """It has it from now on."""
        self._disks[str(state)] = {"storage": _storage(state)}

    def save(self) -> str:
        """Returns why it could not be written, in one sentence, or ""."""
        new = self.file.with_name(".disks.new")
        try:
            if self._disks or self.file.exists():
                self.file.parent.mkdir(exist_ok=True)
                new.write_text(json.dumps(self._disks))
                new.rename(self.file)
        except OSError as error:
            with suppress(OSError):
                new.unlink(missing_ok=True)
            return f"cannot write {self.file}, which says what images the guest has used: {error.strerror}"
        return ""

    def forget(self) -> None:
        """The guest is no more, and with it its images; but not those whose storage is not there to be looked at."""
        kept = {path: about for path, about in self._disks.items() if about.get("storage") != _storage(Path(path))}
        if kept != self._disks:
            self._disks = kept
            self.save()
        if not kept:
            with suppress(OSError):
                self.file.unlink(missing_ok=True)
                self.file.parent.rmdir()


def forget_all_but(names: set[str]) -> None:
    """The guests with these names have files."""
    for file in STATE.glob("*/disks"):
        if file.parent.name not in names:
            Used(file.parent.name).forget()


def _identity(fd: int) -> list[int]:
    """What changes when somebody writes to it or puts another file in its place: size in bytes, time in nanoseconds."""
    status = os.fstat(fd)
    return [status.st_size, status.st_mtime_ns]


def _storage(path: Path) -> int:
    """The file system that it lies on, or should (f_fsid of statvfs(3))."""
    for place in Path(os.path.realpath(path)).parents:
        with suppress(OSError):
            return os.statvfs(place).f_fsid
    return 0
