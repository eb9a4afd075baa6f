"""The lab itself: what all other tests stand on."""

from __future__ import annotations

import subprocess
import time
from itertools import islice
from typing import Any

import lab
import pytest

BYTES: dict[str, Any] = {"text": False, "errors": None, "bufsize": 0}  # what read_lines reads
RELEASES = list(lab.roots.RELEASES.values())


@pytest.mark.parametrize("release", RELEASES)
def test_host(release: str) -> None:
    with lab.Host(release) as host:
        directory = host.directory
        assert host.run("systemctl", "is-system-running").stdout == "running\n"
        host.write("/root/a b", "text\n", mode=0o600)
        assert host.read("/root/a b") == "text\n"
        with pytest.raises(lab.Failed, match=r"ended with 3\n--- stdout\nout\n--- stderr\nerr"):
            host.run("sh", "-c", "echo out; echo err >&2; exit 3")
        with pytest.raises(lab.Failed, match="did not end within"):
            host.run("sleep", "1000", timeout=0.2)
        here = host.cursor()
        host.run("logger", "--tag", "test", "bäh")
        assert host.wait_journal("-t", "test", message="^b.h$", since=here)["MESSAGE"] == "bäh"
        with pytest.raises(lab.LabError, match="no journal entry"):
            host.wait_journal("-t", "test", message="never", timeout=0.2)
    assert not directory.exists()


def test_lan() -> None:
    with lab.Host() as host:
        lan = host.make_lan(docker0=True, eth1=True)
        alice = lan.neighbour("alice", "192.0.2.20", "2001:db8:1::20")
        bob = lan.neighbour("bob", "192.0.2.21", "2001:db8:1::21")
        carol = lan.neighbour("carol", "203.0.113.20", "2001:db8:2::20", switch="lan1")
        state = host.state()
        for address in (*bob.addresses, "192.0.2.10", "2001:db8:1::10", "198.51.100.1", "2001:db8:ffff::1"):
            alice.ping(address)
        for address in ("203.0.113.10", "2001:db8:2::10"):
            carol.ping(address)
        assert "via fe80::1 dev eth0" in host.run("ip", "-6", "route", "show", "default", "proto", "ra").stdout
        assert host.state() == state


def test_guest() -> None:
    """Kernel and initrd, without kvmd: up, and off by the power button."""
    with lab.Host() as host:
        host.run("truncate", "-s", "1M", "/root/disk")
        qemu = host.popen(
            *("qemu-system-x86_64", "-accel", "tcg", "-m", "128", "-nodefaults", "-display", "none", "-no-reboot"),
            *("-serial", "stdio", "-monitor", "unix:/run/monitor,server=on,wait=off"),
            *("-kernel", "/var/lib/kvmd/images/vmlinuz", "-initrd", "/var/lib/kvmd/images/initrd.img"),
            *("-append", "console=ttyS0 quiet kvmd.name=x kvmd.disk=1"),
            *("-drive", "file=/root/disk,format=raw,if=virtio"),
            stdin=subprocess.PIPE,
            **BYTES,
        )
        assert qemu.stdin
        lines = (line.strip() for line in lab.read_lines(qemu, time.monotonic() + 60))
        assert next(line for line in lines if line.startswith("guest: disk")) == "guest: disk boots=1 stops=0"
        assert next(line for line in lines if line.startswith("guest: ready")) == "guest: ready x"
        qemu.stdin.write(b"flood 3\n")  # type: ignore[arg-type]  # a child without text
        assert [next(lines)[:14] for _ in range(3)] == ["flood 00000001", "flood 00000002", "flood 00000003"]
        host.run("python3", "-c", PRESS)
        assert next(lines) == "guest: power button"
        assert next(lines) == "guest: disk boots=1 stops=1"
        assert next(lines) == "guest: powering off"
        assert qemu.wait(30) == 0


PRESS = """
import socket
with socket.socket(socket.AF_UNIX) as monitor:
    monitor.connect("/run/monitor")
    monitor.sendall(b"system_powerdown\\n")
    said = b""
    while said.count(b"(qemu)") < 2:  # the prompt after the command: it was done
        said += monitor.recv(1000)
"""


def test_rom() -> None:
    with lab.Host() as host:
        host.write("/root/rom", lab.guests.rom(1000))
        options = ("-accel", "tcg", "-m", "16", "-nodefaults", "-display", "none", "-bios", "/root/rom")
        qemu = host.popen("qemu-system-x86_64", *options, "-serial", "stdio", **BYTES)
        lines = islice(lab.read_lines(qemu, time.monotonic() + 60), 1000)
        assert [int(line[:8]) for line in lines] == list(range(1, 1001))
