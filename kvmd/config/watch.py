"""The files of a directory: read one, learn by inotify(7) when any changes."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import stat
import struct
from collections.abc import Callable
from pathlib import Path

from kvmd.config.toml_lines import SIZE_MAX
from kvmd.errors import InvalidConfiguration, Problem

IN_CLOSE_WRITE, IN_MOVED_FROM, IN_MOVED_TO, IN_CREATE, IN_DELETE = 0x8, 0x40, 0x80, 0x100, 0x200
MASK = IN_CLOSE_WRITE | IN_MOVED_FROM | IN_MOVED_TO | IN_CREATE | IN_DELETE
EVENT = struct.Struct("iIII")  # linux/inotify.h: watch, mask, cookie, length of the name that follows

_libc = ctypes.CDLL(None, use_errno=True)


def read(path: Path) -> bytes | None:
    """The file's content, or a little more than SIZE_MAX of it; None where there is none.

    Raises ``InvalidConfiguration``, also for what is no file: to read a pipe might take for ever.
    """
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return file.read(SIZE_MAX + 1)
        reason = "it is no file"
    except FileNotFoundError:
        return None
    except OSError as error:
        reason = str(error.strerror)
    raise InvalidConfiguration([Problem(str(path), 1, "", f"cannot be read: {reason}")])


def private(path: Path) -> bool:
    """Whether not everybody may read it."""
    try:
        return not path.stat().st_mode & stat.S_IROTH
    except OSError:
        return True


def stamp(path: Path) -> tuple[int, int, int] | None:
    """What changes when the file does, also where the path is a link to it."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


class Watch:
    """Calls ``changed`` once for all that has happened to the files in ``directory`` since the last turn.

    ``links``: also to those that links there lead to.
    """

    def __init__(self, directory: Path, changed: Callable[[], object], *, links: bool = False) -> None:
        """Raises ``OSError`` where there is no such directory."""
        self._directory = directory
        self._links = links
        self._changed = changed
        self._targets: dict[int, set[bytes]] = {}  # by watch: names of files that links in the directory lead to
        self._fd = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        self._own = self._add(directory)
        self._follow()
        asyncio.get_running_loop().add_reader(self._fd, self._read)

    def _add(self, directory: Path) -> int:
        watch: int = _libc.inotify_add_watch(self._fd, os.fsencode(directory), MASK)
        if watch < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(directory))
        return watch

    def _follow(self) -> None:
        """Watch also what the links lead to: a file edited there changes nothing here."""
        self._targets.clear()
        for link in self._directory.iterdir() if self._links else ():
            if link.is_symlink():
                target = Path(os.path.realpath(link))
                with contextlib.suppress(OSError):
                    self._targets.setdefault(self._add(target.parent), set()).add(os.fsencode(target.name))

    def _read(self) -> None:
        data = os.read(self._fd, 1 << 16)
        concerned, at = False, 0
        while at + EVENT.size <= len(data):  # inotify(7)
            watch, _mask, _cookie, length = EVENT.unpack_from(data, at)
            name = data[at + EVENT.size : at + EVENT.size + length].rstrip(b"\0")
            at += EVENT.size + length
            concerned = concerned or watch in (self._own, -1) or name in self._targets.get(watch, ())
        if concerned:
            self._follow()
            self._changed()

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._fd)
        os.close(self._fd)
