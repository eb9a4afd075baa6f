"""A directory of the host for a guest, virtiofsd: its arguments, and the directory as root finds it.

There are two of them: of QEMU's own sources until 7.2 (Debian 12), in C; and the one that came after it, in Rust. Both
are started unprivileged, in a root of their own that systemd has made, where there is nothing but programs and /share.
"""

from __future__ import annotations

import pwd
from pathlib import Path
from typing import NamedTuple

from kvmd.errors import StartFailed
from kvmd.guest import Share
from kvmd.qemu.files import open_directory

PROGRAM, OLD_PROGRAM = Path("/usr/libexec/virtiofsd"), Path("/usr/lib/qemu/virtiofsd")
CHROOT, SETGID, SETPCAP = 1 << 18, 1 << 6, 1 << 8  # linux/capability.h
EVERYBODY = (1 << 32) - 1
# What the old one would keep as root. It gives up all, before it hears of a guest: groups, by SETGID, its root, by
# CHROOT, and then these capabilities, which takes SETPCAP; without that its own seccomp filter kills it.
NOTHING = "modcaps=-chown:-dac_override:-fowner:-fsetid:-setgid:-setuid:-mknod:-setfcap"
# That it is the very directory that was found by root, and nobody has put another one into its place meanwhile.
CHECK = '[ "$(stat -c %d:%i /share)" = "$0" ] || { echo "/share is not what it was"; exit 1; }; exec "$@"'


class Found(NamedTuple):
    """Where the directory really is; what is to be started, and the capabilities that it needs to begin with."""

    path: Path
    command: list[str]
    capabilities: int


def find(share: Share) -> Found:
    """Raises ``StartFailed``."""
    uid, gid = _ids(share.user) if share.user else (None, None)
    path, status = open_directory(share.path, "shared directory")
    check = ["/bin/sh", "-c", CHECK, f"{status.st_dev}:{status.st_ino}"]
    if PROGRAM.exists():
        command = [
            str(PROGRAM),
            "--fd=0",
            "--shared-dir=/share",
            "--sandbox=none",
            "--rlimit-nofile=0",
            "--log-level=warn",
        ]
        if uid is not None:  # whoever writes in the guest, it is this user's here
            command += [f"--translate-uid=squash-guest:0:{uid}:{EVERYBODY}"]
            command += [f"--translate-gid=squash-guest:0:{gid}:{EVERYBODY}"]
        return Found(path, check + command, 0)
    if not OLD_PROGRAM.exists():
        raise StartFailed(f"there is no virtiofsd to share {share.path} (install virtiofsd)")
    if not share.readonly:
        what = f"the virtiofsd of Debian 12's QEMU can let a guest write into {share.path} only as root"
        raise StartFailed(f"{what}, which it is not (remove readonly = false, or use Debian 13)")
    command = [str(OLD_PROGRAM), "--fd=0", "--rlimit-nofile=0"]
    command += ["-o", "source=/share", "-o", "sandbox=chroot", "-o", NOTHING, "-o", "log_level=warn"]
    return Found(path, check + command, CHROOT | SETGID | SETPCAP)


def _ids(user: str) -> tuple[int, int]:
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        raise StartFailed(f"there is no user {user} to share a directory with (getent passwd {user})") from None
    if entry.pw_uid == 0:
        raise StartFailed(f"a directory is not shared as {user}, who is root (name another user)")
    return entry.pw_uid, entry.pw_gid
