"""Guests whose systemd says READY=1 over vsock: real systemd, real vhost-vsock, on a machine with its own kernel."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import UUID

import lab
import pytest

from kvmd.guests.vsock import CIDS, FIRST_CID

from .guests import Guests

pytestmark = pytest.mark.xdist_group("vm")

READY = "[vsock]\nready = true\n"
SYSTEMD = f"""memory = "192M"
[boot]
kernel = "vmlinux"
initrd = "systemd.img"
cmdline = "{lab.guests.CMDLINE}"
"""
AFTER = """[Unit]
Wants=kvmd@db.service
After=kvmd@db.service
[Service]
Type=oneshot
ExecStart=echo after the database
"""
# Has the address that a guest would get.
OCCUPY = """
import fcntl, os, signal, struct, sys
fcntl.ioctl(os.open("/dev/vhost-vsock", os.O_RDWR), 0x4008AF60, struct.pack("=Q", int(sys.argv[1])))
print("occupied", flush=True)
signal.pause()
"""
# The host itself says it in a guest's place; fails if nobody listens.
IMPOSTOR = """
import contextlib, socket, sys
with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as client:
    client.connect((2, int(sys.argv[1])))
    with contextlib.suppress(ConnectionError):
        client.sendall(b"READY=1")
        client.shutdown(socket.SHUT_WR)
        client.recv(1)
"""


@pytest.fixture(scope="module", autouse=True)
def initrd(vm: lab.VM) -> None:
    vm.copy_in(lab.guests.systemd_initrd("bookworm"), "/var/lib/kvmd/images/systemd.img")


@pytest.fixture
def guests(vm: lab.VM) -> Iterator[Guests]:
    guests = Guests(vm)
    yield guests
    guests.clear()
    assert vm.run("ls", "/run/kvmd").stdout.split() in ([], ["sysctl.json"])


def starting(guests: Guests, *, unit: str = "kvmd@db") -> None:
    """A start of the guest db, so far that its systemd waits for the line "go"."""
    since = guests.host.cursor()
    guests.host.run("systemctl", "start", "--no-block", unit)
    guests.wait("db", "^guest: starting$", since)


def type_go(guests: Guests) -> None:
    guests.host.run("sh", "-c", "echo go > /run/kvmd/db/serial.in")


def address(guests: Guests, name: str) -> list[str]:
    """The guest's, and the port of the host."""
    return guests.host.read(f"/run/kvmd/{name}/vsock").split()


def uses_vsock(guests: Guests, name: str) -> bool:
    return "vsock" in guests.host.run("ls", "-l", f"/proc/{guests.get(name, 'PID')}/fd").stdout


def test_a_start_is_complete_when_systemd_says_ready(guests: Guests) -> None:
    vm = guests.host
    guests.write("db", SYSTEMD + READY)
    vm.write("/run/systemd/system/after.service", AFTER)
    vm.run("systemctl", "daemon-reload")
    cid = FIRST_CID + UUID(guests.get("db", "UUID")).int % CIDS
    occupied = vm.popen("python3", "-c", OCCUPY, str(cid))
    assert occupied.stdout
    assert occupied.stdout.readline() == "occupied\n"
    since = vm.cursor()
    starting(guests, unit="after")
    assert address(guests, "db")[0] == str(cid + 1)
    occupied.kill()
    occupied.wait()
    vm.run("modprobe", "vsock_loopback")
    vm.run("python3", "-c", IMPOSTOR, address(guests, "db")[1])
    assert guests.active("db") == "activating"
    assert guests.get("db", "Ready") is False
    type_go(guests)
    vm.wait_journal("-u", "after.service", message="^after the database$", since=since)
    assert guests.get("db", "Ready") is True
    assert guests.active("db") == "active"
    assert uses_vsock(guests, "db")
    events = ["guest: serving", "Started kvmd@db.service - Virtual machine db.", "after the database"]
    messages = [entry["MESSAGE"] for entry in vm.journal(since=since)]
    assert [message for message in messages if message in events] == events


def test_what_is_said_while_there_is_no_daemon_is_heard(guests: Guests) -> None:
    vm = guests.host
    guests.write("db", SYSTEMD + READY)
    starting(guests)
    pid = guests.get("db", "PID")
    vm.run("chmod", "-x", "/usr/bin/kvmd")
    vm.run("systemctl", "kill", "--signal=KILL", "--kill-whom=main", "kvmd")
    type_go(guests)
    vm.run("sh", "-c", "until ss --vsock -H | grep -q .; do sleep 0.1; done")
    vm.run("chmod", "+x", "/usr/bin/kvmd")
    vm.wait_journal("-u", "kvmd@db", message="^Started kvmd@db.service", timeout=60)
    assert guests.get("db", "Ready") is True
    assert guests.get("db", "PID") == pid


def test_a_guest_that_never_says_it(guests: Guests) -> None:
    guests.linux("mute", extra=f'{READY}ready_timeout = "3s"\n')
    assert guests.host.run("systemctl", "start", "kvmd@mute", check=False).returncode == 1
    sentence = "not ready within 3 s, its power was cut: it did not say READY=1 over vsock (is systemd 254 or newer"
    assert sentence in guests.status("mute")
    assert guests.get("mute", "Result") == "timeout"


def test_a_guest_that_may_have_said_it_is_not_switched_off(guests: Guests) -> None:
    """systemd forgets the socket of a daemon that it stops; the next one listens at the same port, too late perhaps."""
    vm = guests.host
    guests.linux("slow", extra=f'{READY}ready_timeout = "4s"\n')
    since = vm.cursor()
    vm.run("systemctl", "start", "--no-block", "kvmd@slow")
    vm.wait_journal("KVMD_GUEST=slow", message="Guest slow is running", since=since)
    vm.run("systemctl", "stop", "kvmd")
    listening = vm.run("sh", "-c", "systemctl start kvmd; ss --vsock -Hl; cat /run/kvmd/slow/vsock").stdout.split()
    assert f"2:{listening[-1]}" in listening
    vm.wait_journal("-u", "kvmd@slow", message="^Started kvmd@slow.service", since=since)
    warning = "Guest slow counts as ready: it may have said READY=1 while kvmd was stopped"
    assert vm.journal("KVMD_GUEST=slow", "PRIORITY=4", since=since)[-1]["MESSAGE"] == warning
    assert guests.get("slow", "Ready") is True


def test_a_host_without_vsock(guests: Guests) -> None:
    guests.linux("mute", extra=READY)
    guests.linux("plain")
    guests.host.run("mv", "/dev/vhost-vsock", "/dev/vhost-vsock.away")
    try:
        failed = guests.call("StartGuest", "s", "mute", check=False)
        guests.start("plain", ready=False)
    finally:
        guests.host.run("mv", "/dev/vhost-vsock.away", "/dev/vhost-vsock")
    assert "vsock.ready cannot be had without /dev/vhost-vsock: No such file or directory (load the" in failed.stderr
    assert not uses_vsock(guests, "plain")
