"""The files of a directory: read one, learn by inotify(7) when any changes."""

from __future__ import annotations

import asyncio
import ctypes
import os
import stat
from collections.abc import Callable
from pathlib import Path

from kvmd.config.toml_lines import SIZE_MAX
from kvmd.errors import InvalidConfiguration, Problem

IN_CLOSE_WRITE, IN_MOVED_FROM, IN_MOVED_TO, IN_CREATE, IN_DELETE = 0x8, 0x40, 0x80, 0x100, 0x200

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


class Watch:
    """Calls ``changed`` once for all that has happened to the files in ``directory`` since the last turn."""

    def __init__(self, directory: Path, changed: Callable[[], object]) -> None:
        """Raises ``OSError`` where there is no such directory."""
        self._changed = changed
        self._fd = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        mask = IN_CLOSE_WRITE | IN_MOVED_FROM | IN_MOVED_TO | IN_CREATE | IN_DELETE
        if self._fd < 0 or _libc.inotify_add_watch(self._fd, os.fsencode(directory), mask) < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(directory))
        asyncio.get_running_loop().add_reader(self._fd, self._read)

    def _read(self) -> None:
        os.read(self._fd, 1 << 16)
        self._changed()

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._fd)
        os.close(self._fd)
