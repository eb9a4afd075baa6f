"""/run/kvmd/NAME: what a running guest and the daemon have in common, and the next daemon finds again.

guest.toml kvmd.conf    the files as they were when the guest was started
qemu.pid                QEMU's process ID, once the guest goes on whatever becomes of the daemon
images                  which files it uses as disks
options                 what it was started with, once
media                   what is in its CD drives
pid stop_timeout        for kvmd@NAME.service and its stop helper
ready                   there once the guest has said so
vsock                   its address (CID), and the port of the host to which its systemd says it
tpm                     the user ID of its TPM, where it has one
pci                     the host's devices that it has, where it has any
share0 …                roots of the virtiofsd of each shared directory, empty to all others
agent                   socket of the guest agent's channel
frozen                  there while the guest's file systems may be frozen
qmp qmp.spare           monitor sockets, of the daemon and of the stop helper
vnc                     the daemon's socket for viewers of its screen
serial.in serial.out    FIFOs of the serial port; qemu.out is QEMU's stderr
*.spool                 what was taken from them, and perhaps not logged yet
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path

from kvmd.errors import StartFailed
from kvmd.guest import AS_ALWAYS, StartOptions

RUNTIME = Path("/run/kvmd")
FILES = ("guest.toml", "kvmd.conf")
FIFOS = ("serial.in", "serial.out", "qemu.out")


def guests() -> list[str]:
    """Names of all that have a directory."""
    return [path.name for path in RUNTIME.iterdir() if path.is_dir()] if RUNTIME.is_dir() else []


def user_ids(*, but: str) -> set[int]:
    """Of all guests that have a directory, which is of QEMU's group, and of their TPMs; ``but`` those of this one."""
    others = [RUNTIME / name for name in guests() if name != but]
    return {other.stat().st_gid for other in others} | {uid for other in others if (uid := _tpm_user(other))}


def _tpm_user(directory: Path) -> int:
    """Or 0."""
    try:
        return int((directory / "tpm").read_text())
    except (OSError, ValueError):
        return 0


class Runtime:
    """One guest's directory. Its methods raise ``StartFailed``."""

    def __init__(self, guest: str) -> None:
        self.path = RUNTIME / guest

    def make(self, files: Mapping[str, bytes], uid: int, gid: int) -> None:
        """Anew; it is root's, and QEMU's user may pass through it to the FIFOs."""
        self.remove()
        try:
            self.path.mkdir(parents=True)
            os.chown(self.path, 0, gid)
            self.path.chmod(0o710)
            for name in FIFOS:
                os.mkfifo(self.path / name, 0o600)
                os.chown(self.path / name, uid, gid)
            self.write(files)
        except OSError as error:
            self.remove()
            raise StartFailed(f"cannot make {error.filename or self.path}: {error.strerror}") from error
        except StartFailed:
            self.remove()
            raise

    def write(self, files: Mapping[str, bytes]) -> None:
        for name, content in files.items():
            try:
                (self.path / name).touch(mode=0o600)
                (self.path / name).write_bytes(content)
            except OSError as error:
                raise StartFailed(f"cannot write {self.path / name}: {error.strerror}") from error

    def listen(self, name: str, backlog: int = 1) -> int:
        """A socket, to which only root can connect: a monitor for QEMU to accept on, or one of the daemon's."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as listener:
            try:
                (self.path / name).unlink(missing_ok=True)  # an earlier daemon's
                listener.bind(str(self.path / name))
            except OSError as error:
                raise StartFailed(f"cannot make the socket {self.path / name}: {error.strerror}") from error
            listener.listen(backlog)
            return listener.detach()

    def stderr(self) -> int:
        """QEMU's end of ``qemu.out``: it never blocks on it, and never sees us leave."""
        return os.open(self.path / "qemu.out", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)

    def write_pid(self, pid: int) -> None:
        self.write({"qemu.pid": f"{pid}\n".encode(), "pid": f"{pid}\n".encode()})

    def renew_pid(self) -> None:
        """systemd removes the PIDFile= of a unit whose start has failed, with its daemon perhaps; the guest went on."""
        with contextlib.suppress(OSError):
            shutil.copyfile(self.path / "qemu.pid", self.path / "pid")

    def read(self) -> tuple[dict[str, bytes], int]:
        """The guest's files and QEMU's process ID, as they were written at its start."""
        try:
            return {name: (self.path / name).read_bytes() for name in FILES}, int((self.path / "qemu.pid").read_text())
        except (OSError, ValueError) as error:
            raise StartFailed(f"its start was not finished ({error})") from error

    def invocation(self) -> str:
        """The invocation ID of its scope, or nothing."""
        try:
            return (self.path / "invocation").read_text()
        except OSError:
            return ""

    def images(self) -> list[tuple[int, int, str, bool]]:
        """Of each image it uses: device and inode, its path, whether it is written to."""
        try:
            uses = json.loads((self.path / "images").read_text())
            return [(int(device), int(inode), str(path), bool(write)) for device, inode, path, write in uses]
        except (OSError, ValueError, TypeError):  # started by a version that did not write it
            return []

    def write_options(self, options: StartOptions) -> None:
        said = {"boot": options.boot, "cdrom": str(options.cdrom) if options.cdrom else None}
        self.write({"options": json.dumps(said).encode()})

    def options(self) -> StartOptions:
        """What ``write_options`` wrote; nothing where a version of old did not."""
        try:
            said = json.loads((self.path / "options").read_text())
            return StartOptions(said["boot"], Path(said["cdrom"]) if said["cdrom"] else None)
        except (OSError, ValueError, TypeError, KeyError):
            return AS_ALWAYS

    def write_media(self, about: Mapping[str, tuple[int | None, Mapping[int, tuple[str, int, int]]]]) -> None:
        """Of each CD drive: which of its media is in it, and these by number: path, device and inode."""
        self.write({"media": json.dumps(about).encode()})

    def media(self) -> dict[str, tuple[int | None, dict[int, tuple[str, int, int]]]]:
        """What ``write_media`` wrote."""
        try:
            about = json.loads((self.path / "media").read_text())
            return {
                str(drive): (
                    None if holds is None else int(holds),
                    {int(turn): (str(path), int(device), int(inode)) for turn, (path, device, inode) in media.items()},
                )
                for drive, (holds, media) in about.items()
            }
        except (OSError, ValueError, TypeError, AttributeError):  # started by a version that did not write it
            return {}

    def pci(self) -> tuple[str, ...]:
        """Addresses of the host's devices that are in its hands."""
        try:
            return tuple((self.path / "pci").read_text().split())
        except OSError:
            return ()

    def forget(self, name: str) -> None:
        with contextlib.suppress(OSError):
            (self.path / name).unlink()

    def note_ready(self) -> None:
        with contextlib.suppress(OSError):
            (self.path / "ready").touch()

    def ready(self) -> bool:
        """Whether the guest has said that it is ready."""
        return (self.path / "ready").exists()

    def write_vsock(self, cid: int, port: int) -> None:
        self.write({"vsock": f"{cid} {port}\n".encode()})

    def vsock(self) -> tuple[int, int]:
        """What ``write_vsock`` wrote."""
        try:
            cid, port = map(int, (self.path / "vsock").read_text().split())
        except (OSError, ValueError) as error:
            raise StartFailed(f"its vsock address is not known ({error})") from error
        return cid, port

    def started(self) -> int:
        """Microseconds since the epoch."""
        return (self.path / "qemu.pid").stat().st_mtime_ns // 1000

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
