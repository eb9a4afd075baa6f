"""A guest's TPM 2.0, swtpm(8): its arguments, and its state in /var/lib/kvmd/NAME/tpm.

The state is the TPM's user's, who may be another one from start to start, and nobody else's. It stays when the guest's
file goes: without it what the guest has encrypted is lost.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import struct
from contextlib import suppress

from kvmd.errors import StartFailed
from kvmd.guest import Guest
from kvmd.qemu.process import ENVIRONMENT, User
from kvmd.qemu.used import STATE, Used

PERMANENT = "tpm2-00.permall"  # what a TPM keeps; the other files there are swtpm's lock and what suspend needs
LOCK = ".lock"
ROOM = 128 << 10  # bytes: what libtpms keeps, and once more, as swtpm writes a new file and then renames it
FLOCK = "hhxxxxqqixxxx"  # struct flock of fcntl(2) on 64-bit Linux


def swtpm(state: int, control: int) -> list[str]:
    """``state``: a descriptor of the directory, so that nobody else's directories are on the way to it.

    ``control``: one end of a stream; when the other one is closed, swtpm ends. No ``--log``: with a descriptor other
    than 1 swtpm 0.7 ends at once without a word.
    """
    return [
        "swtpm", "socket", "--tpm2",
        "--tpmstate", f"dir=/proc/self/fd/{state},mode=0600",
        "--ctrl", f"type=unixio,clientfd={control}",
        "--terminate",
    ]  # fmt: skip


def open_state(guest: Guest, user: User, used: Used) -> tuple[int, str]:
    """A descriptor of the directory, which is ``user``'s now with all that is in it; made if it is missing.

    And what a person should know, or "". Raises ``StartFailed``. Blocks as long as the storage takes.
    """
    if not shutil.which("swtpm", path=ENVIRONMENT["PATH"]):
        raise StartFailed("there is no swtpm to be the guest's TPM (install swtpm)")
    path = STATE / guest.name / "tpm"
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with suppress(FileExistsError):
            path.mkdir(mode=0o700)
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.fchown(directory, 0, 0)
            os.fchmod(directory, 0o700)
            names = os.listdir(directory)  # noqa: PTH208  # of a descriptor
            for name in names:
                _give(directory, name, user)
            _want_room(directory)
            os.fchown(directory, user.uid, user.gid)
        except BaseException:
            os.close(directory)
            raise
    except OSError as error:
        raise StartFailed(f"cannot use the TPM's state {path}: {error.strerror}") from error
    except StartFailed as error:
        raise StartFailed(f"cannot use the TPM's state {path}: {error}") from error
    lost = ""
    if PERMANENT not in names and used.before(path):
        lost = f"what its TPM had kept in {path} has gone, and what only this TPM could decrypt: it has a new one"
    used.note_state(path)
    return directory, lost


def _give(directory: int, name: str, user: User) -> None:
    """A file of the directory, whoever made it. Raises ``StartFailed`` for all that swtpm does not make."""
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            raise StartFailed(f"{name} in it is not a file, or has another name besides (remove it)")
        os.fchown(fd, user.uid, user.gid)
        if name == LOCK and (pid := _holder(fd)):
            raise StartFailed(f"process {pid} has it in use (kill {pid}, if it is a swtpm that was left over)")
    finally:
        os.close(fd)


def _want_room(directory: int) -> None:
    """swtpm would go on where it cannot write, with a TPM that fails. Raises ``OSError``."""
    try:
        fd = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=directory)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EISDIR):  # not on this file system
            return
        raise
    try:
        os.posix_fallocate(fd, 0, ROOM)
    finally:
        os.close(fd)


def _holder(fd: int) -> int:
    """Who keeps a file locked, or 0."""
    asked = struct.pack(FLOCK, fcntl.F_RDLCK, 0, 0, 0, 0)
    held, *_, pid = struct.unpack(FLOCK, fcntl.fcntl(fd, fcntl.F_GETLK, asked))
    return 0 if held == fcntl.F_UNLCK else int(pid)
