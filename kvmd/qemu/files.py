"""What an administrator's file names, opened by root for a guest: a file or a block device, and nothing that blocks.

A link is followed if it is root's, or of the owner of the file it leads to: a user's own directory may hold images, but
no way from there to others' files. All of it blocks as long as the storage takes: it is for a thread.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath

from kvmd.errors import StartFailed

LINKS = 40  # as the kernel (MAXSYMLINKS of linux/namei.h)
LARGEST_COPY = 512 << 20  # bytes


def open_file(path: Path, what: str, *, write: bool = False, uid: int = 0) -> int:
    """A descriptor of what is there. ``uid``: who names it, if it is no administrator. Raises ``StartFailed``."""
    try:
        found, owners = _walk(path, uid=uid)
        try:
            status = os.fstat(found)
            if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
                raise StartFailed(f"cannot use the {what} {path}: it is neither a file nor a block device")
            if strangers := owners - {0, status.st_uid}:
                whose = f"of user {min(strangers)} leads there, to a file of user {status.st_uid}"
                raise StartFailed(f"cannot use the {what} {path}: a link {whose} (name the file itself)")
            flags = (os.O_RDWR if write else os.O_RDONLY) | os.O_NONBLOCK | os.O_CLOEXEC
            return os.open(f"/proc/self/fd/{found}", flags)
        finally:
            os.close(found)
    except OSError as error:
        target = os.path.realpath(path)
        hint = f" (it is a link to {target}: is the file system mounted?)" if path.is_symlink() else ""
        raise StartFailed(f"cannot open the {what} {path}: {error.strerror}{hint}") from error


def open_directory(path: Path, what: str) -> tuple[Path, os.stat_result]:
    """Where a directory really is, and what it is: whoever uses it later looks whether it still is that.

    Raises ``StartFailed``.
    """
    try:
        found, owners = _walk(path)
        try:
            status = os.fstat(found)
            real = Path(f"/proc/self/fd/{found}").readlink()
        finally:
            os.close(found)
    except OSError as error:
        raise StartFailed(f"cannot open the {what} {path}: {error.strerror}") from error
    if not stat.S_ISDIR(status.st_mode):
        raise StartFailed(f"cannot use the {what} {path}: it is not a directory")
    if strangers := owners - {0, status.st_uid}:
        whose = f"of user {min(strangers)} leads there, to a directory of user {status.st_uid}"
        raise StartFailed(f"cannot use the {what} {path}: a link {whose} (name the directory itself)")
    return real, status


def open_readable(path: Path, what: str, memory: int) -> int:
    """A descriptor that QEMU's user can open again through /proc/self/fd: of the file, or of a copy in memory.

    ``memory``: the guest's, in bytes; what would not fit there is not copied. Raises ``StartFailed``.
    """
    fd = open_file(path, what)
    try:
        status = os.fstat(fd)
        if status.st_mode & stat.S_IROTH:
            return os.dup(fd)
        most = min(memory, LARGEST_COPY)
        if not stat.S_ISREG(status.st_mode) or status.st_size > most:
            limit = f"not everybody may read it, and only a file of at most {most >> 20} MiB is copied for QEMU"
            raise StartFailed(f"cannot use the {what} {path}: {limit} (chmod o+r {path})")
        return _copy(fd, path.name, most)
    except OSError as error:
        raise StartFailed(f"cannot read the {what} {path}: {error.strerror}") from error
    finally:
        os.close(fd)


def _copy(fd: int, name: str, most: int) -> int:
    """In memory, for everybody to read who is given it; at most so many bytes. Raises ``OSError``."""
    copy = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        os.fchmod(copy, 0o444)
        copied = 0
        while copied < most and (count := os.sendfile(copy, fd, copied, most - copied)):
            copied += count
    except OSError:
        os.close(copy)
        raise
    return copy


@contextmanager
def new_file(path: Path) -> Iterator[tuple[int, Callable[[], None]]]:
    """A new file beside ``path``, by a name that nobody can foresee, and what gives it that path; else it goes again.

    Directories that are missing are made. Raises ``OSError``, ``StartFailed``.
    """
    directory, owners = _walk(path.parent, make=True)
    try:
        if owners - {0}:
            raise StartFailed("a link that is not root's leads to its directory (name the directory itself)")
        mark = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]  # its name may be as long as names can be
        for left in Path(f"/proc/self/fd/{directory}").iterdir():  # by a kvmd that was killed
            if re.fullmatch(rf"\.kvmd-{mark}-[0-9a-f]{{16}}", left.name):
                os.unlink(left.name, dir_fd=directory)
        name = f".kvmd-{mark}-{secrets.token_hex(8)}"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(name, flags, 0o600, dir_fd=directory)
        try:
            yield fd, lambda: os.rename(name, path.name, src_dir_fd=directory, dst_dir_fd=directory)
        finally:
            os.close(fd)
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=directory)
    finally:
        os.close(directory)


def _walk(path: Path, *, make: bool = False, uid: int = 0) -> tuple[int, set[int]]:
    """An O_PATH descriptor of what is there, and the owners of the links on the way. Raises ``OSError``.

    ``uid``: only where this user, as the owner or as anybody, may go and read.
    ``make``: directories that are missing, where only root's links lead.
    """
    at = os.open("/", os.O_PATH | os.O_CLOEXEC)
    owners: set[int] = set()
    links = 0
    parts = list(reversed(path.parts[1:]))
    try:
        while parts:
            part = parts.pop()
            try:
                found = os.open(part, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
            except FileNotFoundError:
                if not make or owners - {0}:
                    raise
                os.mkdir(part, 0o755, dir_fd=at)
                parts.append(part)
                continue
            status = os.fstat(found)
            if not stat.S_ISLNK(status.st_mode):
                at, found = found, at
                os.close(found)
                if uid and not _may(uid, status):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
                continue
            target = PurePath(os.readlink("", dir_fd=found))
            os.close(found)
            owners.add(status.st_uid)
            links += 1
            if links > LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
            if target.is_absolute():
                root = os.open("/", os.O_PATH | os.O_CLOEXEC)
                os.close(at)
                at = root
            parts += reversed([part for part in target.parts if part != target.root])
    except BaseException:
        os.close(at)
        raise
    return at, owners


def _may(uid: int, status: os.stat_result) -> bool:
    """Go through a directory, or read a file."""
    wanted = stat.S_IXOTH if stat.S_ISDIR(status.st_mode) else stat.S_IROTH
    return bool((status.st_mode >> 6 if status.st_uid == uid else status.st_mode) & wanted)
