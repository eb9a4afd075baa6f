"""VNC's password: read by root from a file of the host, for QEMU by descriptor, so that no command line shows it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from kvmd.errors import StartFailed
from kvmd.qemu.files import open_file

LONGEST = 1024  # bytes
COUNTS = 8  # of them (RFC 6143, 7.2.2)


def open_password(path: Path) -> tuple[int, list[str]]:
    """A descriptor that QEMU's user can open again, and what a person should be told. Raises ``StartFailed``."""
    fd = open_file(path, "password file")
    try:
        mode = os.fstat(fd).st_mode
        password = os.read(fd, LONGEST + 1).rstrip(b"\r\n")
    except OSError as error:
        raise StartFailed(f"cannot read the password file {path}: {error.strerror}") from error
    finally:
        os.close(fd)
    if not password or len(password) > LONGEST or b"\n" in password:
        raise StartFailed(
            f"the password file {path} has no password in it (write one line of up to {COUNTS} characters)"
        )
    doubts = [f"everybody may read the password file {path} (chmod 600 {path})"] if mode & stat.S_IROTH else []
    if len(password) > COUNTS:
        doubts.append(f"VNC takes the first {COUNTS} characters of a password, those after them in {path} do not count")
    return _in_memory(password), doubts


def _in_memory(password: bytes) -> int:
    copy = os.memfd_create("vnc-password", os.MFD_CLOEXEC)
    os.fchmod(copy, 0o444)  # nobody is given it but QEMU, which opens it as its own user
    os.write(copy, password)
    return copy
