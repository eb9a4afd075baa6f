#!/usr/bin/python3
"""In QEMU's place: tries to get at another guest, says how each attempt ended, and becomes QEMU."""

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import socket
import struct
import sys
from collections.abc import Callable
from pathlib import Path

AIM = json.loads(Path("/usr/local/lib/attempts.json").read_text())
PID, TAP, UID, TPM = AIM["pid"], AIM["tap"], AIM["uid"], AIM["tpm"]
LIBC = ctypes.CDLL(None, use_errno=True)
TUNSETIFF, IFF_TAP, IFF_MULTI_QUEUE, IFF_NO_PI, IFF_VNET_HDR = 0x400454CA, 2, 0x100, 0x1000, 0x4000
PTRACE, PTRACE_ATTACH, PIDFD_GETFD, PROCESS_VM_READV = 101, 16, 438, 310


def attempt(what: str, act: Callable[[], object], kind: str = "attempt") -> None:
    try:
        act()
        result = "done"
    except OSError as error:
        result = errno.errorcode.get(error.errno or 0, "?")
    print(f"{kind}: {what}: {result}", file=sys.stderr, flush=True)


def call(*numbers: int) -> int:
    """A system call (syscall(2))."""
    result: int = LIBC.syscall(*map(ctypes.c_long, numbers))
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
    return result


def connect(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)


def attach(tap: str, flags: int) -> None:
    fd = os.open("/dev/net/tun", os.O_RDWR)
    try:
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", tap.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | flags))
    finally:
        os.close(fd)


def peek() -> None:
    buffer = ctypes.create_string_buffer(8)
    local = (ctypes.c_void_p * 2)(ctypes.addressof(buffer), 8)
    where = ctypes.addressof(local)
    call(PROCESS_VM_READV, PID, where, 1, where, 1, 0)


def take_descriptor(number: int) -> None:
    call(PIDFD_GETFD, os.pidfd_open(PID), number, 0)


files = ["/var/lib/kvmd/images/vault.qcow2", "/var/lib/kvmd/images/public.raw", "/srv/secret-kernel"]
files += [f"/run/kvmd/vault/{name}" for name in ("serial.in", "serial.out", "qemu.out", "serial.spool", "guest.toml")]
files += ["/etc/kvmd/vault.toml", "/etc/shadow", "/run/kvmd/vault"]
files += [f"/var/lib/kvmd/{name}/tpm{file}" for name in ("vault", "thief") for file in ("", "/tpm2-00.permall")]
files += ["/var/lib/kvmd/vault/nvram.fd", "/var/lib/kvmd/thief/nvram.fd", f"/proc/{TPM}/mem", f"/proc/{TPM}/fd/66"]
files += [f"/proc/{PID}/{name}" for name in ("mem", "maps", "environ", "cmdline", "fd")]
files += [f"/proc/{PID}/fd/{number}" for number in (*range(8), *range(64, 84))]
for path in files:
    attempt(f"open {path}", lambda path=path: os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK)))
for path in files:
    attempt(f"write to {path}", lambda path=path: os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK)))
for path in ("/run/kvmd/vault/qmp", "/run/kvmd/vault/qmp.spare", "/run/systemd/private"):
    attempt(f"connect to {path}", lambda path=path: connect(path))
for path in ("/run/dbus/system_bus_socket", "/var/run/dbus/system_bus_socket"):
    attempt(f"connect to {path}", lambda path=path: connect(path))
for number in (0, 9, 19):
    attempt(f"signal {number}", lambda number=number: os.kill(PID, number))
    attempt(f"signal {number} to a TPM", lambda number=number: os.kill(TPM, number))
attempt("trace", lambda: call(PTRACE, PTRACE_ATTACH, PID, 0, 0))
attempt("read its memory", peek)
for number in (3, 64, 65, 66, 70):
    attempt(f"take its descriptor {number}", lambda number=number: take_descriptor(number))
for flags in (0, IFF_MULTI_QUEUE):
    attempt(f"attach to its tap {flags}", lambda flags=flags: attach(TAP, flags))
attempt("become its user", lambda: os.setresuid(UID, UID, UID))
attempt("become root", lambda: os.setresuid(0, 0, 0))
attempt("leave its groups", lambda: os.setgroups([]))

attempt("open /etc/passwd", lambda: os.close(os.open("/etc/passwd", os.O_RDONLY)), "control")
attempt("signal itself", lambda: os.kill(os.getpid(), 0), "control")
attempt("open its own serial port", lambda: os.close(os.open("/run/kvmd/thief/serial.out", os.O_RDWR)), "control")
print("attempts: done", file=sys.stderr, flush=True)
with contextlib.suppress(OSError):
    os.execv("/usr/bin/qemu-system-x86_64.real", ["qemu-system-x86_64", *sys.argv[1:]])
sys.exit(1)
