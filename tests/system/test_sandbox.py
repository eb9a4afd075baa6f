"""What kvmd.service may do, and that QEMU, which inherits half of it, can still do all that a guest file asks for."""

from __future__ import annotations

import re

import lab

from .guests import Guests

EXPOSURE = 39  # tenths, on systemd 252; that of Debian 12's libvirtd.service is 96


def test_the_daemon_has_only_what_it_uses(guests: Guests) -> None:
    guests.host.run("systemd-analyze", "security", f"--threshold={EXPOSURE}", "kvmd.service")
    pid = guests.host.show("kvmd.service")["MainPID"]

    def try_(script: str) -> str:
        return guests.host.run("nsenter", "-t", pid, "-m", "sh", "-c", script, check=False).stderr

    for path in ("/usr/bin/qemu-img", "/etc/passwd", "/proc/sys/kernel/panic"):
        assert "Read-only file system" in try_(f": >> {path}"), path
    for path in ("/proc/sys/net/ipv4/ip_forward", "/home", "/srv", "/tmp", "/var", "/dev/shm"):
        assert try_(f"test -w {path} || echo {path} is read-only >&2") == "", path


def test_nothing_is_loaded_that_nobody_uses(bookworm: lab.Host) -> None:
    """OpenSSL and GLib, which are installed here and which libraries of the daemon would load."""
    bookworm.run("/usr/bin/python3", "-c", "import ssl")
    maps = bookworm.run("cat", f"/proc/{bookworm.show('kvmd')['MainPID']}/maps").stdout
    assert re.findall(r"\S*(?:libssl|libcrypto|libglib|_gi\.)\S*", maps) == []
    assert "libnftables" in maps


def test_qemu_is_not_held_by_the_sandbox_of_the_daemon(guests: Guests) -> None:
    guests.host.run("truncate", "-s", "1M", "/tmp/disk.raw")
    guests.host.run("chmod", "666", "/tmp/disk.raw")
    # fmt: off
    args = [
        "-vnc", "127.0.0.1:7",
        "-netdev", "user,id=user", "-device", "virtio-net-pci,netdev=user,romfile=",
        "-object", "memory-backend-memfd,id=near,size=1M,host-nodes=0,policy=bind",
        "-drive", "file=/tmp/disk.raw,format=raw,if=virtio,aio=io_uring",
    ]
    # fmt: on
    guests.linux("free", extra=f"[qemu]\nargs = {args}\n")
    guests.start("free")
    greeting = "import socket; print(socket.create_connection(('127.0.0.1', 5907)).recv(4))"
    assert guests.host.run("python3", "-c", greeting).stdout == "b'RFB '\n"
    guests.guest_off("free")
    guests.host.run("rm", "/tmp/disk.raw")
