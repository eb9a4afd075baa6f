"""The life of a guest: start, stop, all the ways it ends, and what a person is told."""

from __future__ import annotations

import json
import time

import lab
import pytest

from .guests import Guests


def test_file_becomes_a_guest_on_the_lan(guests: Guests) -> None:
    guests.linux("web", last=42, top='description = "web server"')
    guests.start("web")
    host, lan = guests.host, guests.host.lan
    proxies = json.loads(host.run("ip", "-j", "neigh", "show", "proxy").stdout)
    proxies += json.loads(host.run("ip", "-j", "-6", "neigh", "show", "proxy").stdout)
    assert {(entry["dst"], entry["dev"]) for entry in proxies} >= {("192.0.2.42", "eth0"), ("2001:db8:1::42", "eth0")}
    for neighbour in ("alice", "bob"):
        for address in ("192.0.2.42", "2001:db8:1::42"):
            host.run("ping", "-n", "-c", "1", "-W", "3", address, netns=neighbour)
    lan.neighbour("carol", "192.0.2.33", "2001:db8:1::33")  # the host has never talked to carol
    for address in ("192.0.2.33", "2001:db8:1::33", "192.0.2.10", "2001:db8:1::10", "198.51.100.1", "2001:db8:ffff::1"):
        assert guests.type("web", f"ping {address}", "^guest: ping").get("MESSAGE") == f"guest: ping {address} ok"
    status = guests.status("web")
    assert "Active: active (running)" in status
    assert "qemu-system-x86" in status
    assert status.rstrip().endswith("guest: ping 2001:db8:ffff::1 ok")
    listed = guests.call("ListGuests")[0]
    assert ["web", "running", "/org/kvmd1/guest/web"] in listed
    host.run("systemctl", "stop", "kvmd@web")
    assert guests.get("web", "State") == "stopped"
    assert guests.get("web", "Result") == "success"
    assert guests.wait("web", "^guest: powering off")


def users(host: lab.Host) -> range:
    """The numbers that the package has set aside for guests."""
    [line] = [line for line in host.read("/etc/subuid").splitlines() if line.startswith("kvmd-qemu:")]
    first, count = map(int, line.split(":")[1:])
    return range(first, first + count)


def test_qemu_is_alone_in_its_scope_unprivileged_and_sandboxed(guests: Guests) -> None:
    guests.linux("cage")
    guests.start("cage", ready=False)
    pid = guests.get("cage", "PID")
    status = dict(
        line.split(":\t", 1) for line in guests.host.read(f"/proc/{pid}/status").splitlines() if ":\t" in line
    )
    assert int(status["Uid"].split()[0]) in users(guests.host)
    assert len({*status["Uid"].split(), *status["Gid"].split()}) == 1
    assert status["Seccomp"] == "2"
    assert int(status["CapEff"], 16) == 0
    assert guests.host.read(f"/proc/{pid}/cgroup").splitlines()[-1].endswith("machine.slice/kvmd-cage.scope")
    assert guests.host.show("kvmd@cage.service")["MainPID"] == str(pid)
    assert guests.call("GetGuestByPID", "u", str(pid)) == ["/org/kvmd1/guest/cage"]
    members = guests.host.read("/sys/fs/cgroup/machine.slice/kvmd-cage.scope/cgroup.procs").split()
    assert members == [str(pid)]


def test_guest_powers_itself_off(guests: Guests) -> None:
    guests.linux("self")
    guests.start("self")
    since = guests.host.cursor()
    guests.type("self", "poweroff", "guest: powering off")
    guests.host.wait_journal("KVMD_GUEST=self", message="Guest self is off", since=since)
    guests.host.wait_journal("UNIT=kvmd@self.service", message="Deactivated successfully", since=since)
    assert guests.active("self") == "inactive"
    assert guests.get("self", "State") == "stopped"
    assert guests.get("self", "PID") == 0


@pytest.mark.complaints("Guest victim failed")
def test_qemu_killed(guests: Guests) -> None:
    guests.linux("victim", last=43)
    guests.start("victim")
    since = guests.host.cursor()
    guests.host.run("kill", "-9", str(guests.get("victim", "PID")))
    guests.host.wait_journal(
        "KVMD_GUEST=victim", message="Guest victim failed: QEMU was killed or crashed", since=since
    )
    guests.host.wait_journal("UNIT=kvmd@victim.service", message="Failed with result 'signal'", since=since)
    assert guests.active("victim") == "failed"
    assert guests.get("victim", "State") == "failed"
    assert guests.get("victim", "Result") == "crashed"
    guests.start("victim")  # a failed guest starts again


@pytest.mark.complaints("Guest panic failed")
def test_guest_panics(guests: Guests) -> None:
    guests.linux("panic")
    guests.start("panic")
    since = guests.host.cursor()
    guests.host.run("sh", "-c", "echo panic > /run/kvmd/panic/serial.in")
    guests.host.wait_journal("KVMD_GUEST=panic", message="Guest panic failed: its kernel panicked", since=since)
    guests.host.wait_journal("UNIT=kvmd@panic.service", message="Failed with result", since=since)
    assert guests.get("panic", "Result") == "guest-panic"
    assert guests.active("panic") == "failed"


def test_guest_reboot_is_no_end(guests: Guests) -> None:
    guests.linux("again")
    guests.start("again")
    pid, since = guests.get("again", "PID"), guests.host.cursor()
    guests.type("again", "reboot", "guest: rebooting")
    guests.wait("again", "guest: ready again", since)
    assert guests.get("again", "PID") == pid


@pytest.mark.complaints("bad.toml", "could not be started")
def test_bad_file_touches_no_other_guest(guests: Guests) -> None:
    guests.linux("good")
    guests.write("bad", 'memory = "lots"\n\n[[network]]\naddress = ["192.0.2.300"]\ncolour = "red"\n')
    problems = guests.host.run(
        "busctl", "--json=short", "get-property", *("org.kvmd1", "/org/kvmd1"), "org.kvmd1.Manager", "Problems"
    )
    lines = json.loads(problems.stdout)["data"]
    assert [line.split(": ")[:2] for line in lines] == [
        ["/etc/kvmd/bad.toml:1", "memory"],
        ["/etc/kvmd/bad.toml:4", "network.address"],
        ["/etc/kvmd/bad.toml:5", "network.colour"],
    ]
    check = guests.host.run("setpriv", "--reuid=65534", "kvmd", "--check", check=False)
    assert (check.returncode, check.stdout.splitlines()) == (1, lines)
    failed = guests.call("StartGuest", "s", "bad", check=False)
    assert "/etc/kvmd/bad.toml:1: memory: " in failed.stderr
    since = guests.host.cursor()
    assert guests.host.run("systemctl", "start", "kvmd@bad", check=False).returncode == 1
    guests.host.wait_journal("_SYSTEMD_UNIT=kvmd@bad.service", message="/etc/kvmd/bad.toml:1: memory: ", since=since)
    assert "/etc/kvmd/bad.toml:1: memory: " in guests.status("bad")
    guests.start("good")


@pytest.mark.complaints("could not be started", "does not reach the LAN")
@pytest.mark.parametrize(
    ("name", "extra", "reason"),
    [
        (
            "nodisk",
            '[[disk]]\npath = "not-there.qcow2"\n',
            "there is no disk image /var/lib/kvmd/images/not-there.qcow2",
        ),
        ("badarg", '[qemu]\nargs = ["-no-such-option"]\n', "QEMU refused: -no-such-option: invalid option"),
        ("nouplink", '[[network]]\nuplink = "eth7"\naddress = ["192.0.2.44"]\n', "eth7 does not exist"),
    ],
)
def test_start_fails_with_the_reason(guests: Guests, name: str, extra: str, reason: str) -> None:
    guests.linux(name, extra=extra)
    done = guests.host.run("systemctl", "start", f"kvmd@{name}", check=False)
    assert done.returncode == 1
    assert guests.active(name) == "failed"
    assert [line for line in guests.status(name).splitlines() if reason in line]
    failed = guests.call("StartGuest", "s", name, check=False)
    assert reason in failed.stderr
    assert "Traceback" not in failed.stderr
    assert guests.get(name, "State") == "failed"
    assert guests.get(name, "Result") == "start-failed"


def test_three_guests_in_any_order(guests: Guests) -> None:
    addresses = {"one": 51, "two": 52, "three": 53}
    for name, last in addresses.items():
        guests.linux(name, last=last)
    guests.start("three", "one", "two")
    for name, last in addresses.items():
        for address in (f"192.0.2.{last}", f"2001:db8:1::{last}"):
            guests.host.run("ping", "-n", "-c", "1", "-W", "3", address, netns="alice")
            assert guests.get(name, "Networks")[0]["addresses"]["data"][0] == f"192.0.2.{last}"
        other = addresses["two" if name == "one" else "one"]
        for address in (f"192.0.2.{other}", f"2001:db8:1::{other}"):
            assert guests.type(name, f"ping {address}", "^guest: ping")["MESSAGE"].endswith("ok")
    guests.host.run("systemctl", "stop", "kvmd@one", "kvmd@two", "kvmd@three")


def test_a_stop_is_graceful_without_daemon(guests: Guests) -> None:
    guests.linux("orphan", cmdline="kvmd.disk=1", extra='[[disk]]\npath = "orphan.qcow2"\nsize = "16M"\n')
    guests.start("orphan")
    guests.host.run("systemctl", "stop", "kvmd")
    guests.host.run("systemctl", "stop", "kvmd@orphan")
    assert guests.active("orphan") == "inactive"
    guests.start("orphan")
    guests.wait("orphan", "guest: disk boots=2 stops=1")
    guests.guest_off("orphan")
    guests.host.run("rm", "/var/lib/kvmd/images/orphan.qcow2")


def test_machined_shows_the_guest_and_does_it_no_harm(guests: Guests) -> None:
    guests.host.run("systemctl", "start", "systemd-machined")
    guests.linux("listed", last=47)
    guests.start("listed")
    listed = guests.host.run("machinectl", "list", "--no-legend").stdout.split()
    assert listed[:3] == ["listed", "vm", "kvmd"]
    status = guests.host.run("machinectl", "status", "--no-pager", "listed").stdout
    assert "kv-listed" in status
    for verb in ("poweroff", "terminate"):
        guests.host.run("machinectl", verb, "listed", check=False)
    assert guests.type("listed", "echo alive", "^alive")
    guests.guest_off("listed")
    guests.host.run("systemctl", "stop", "systemd-machined")


def test_machined_shows_guests_that_were_there_before_it(guests: Guests) -> None:
    """Also one that was adopted; and what it does not take is said once."""
    host = guests.host
    host.run("systemctl", "stop", "systemd-machined")
    for name in ("elder", "no_host_name"):
        guests.write(name, 'memory = "32M"\naccelerator = "tcg"\n')
    guests.start("elder", "no_host_name", ready=False)
    since = host.cursor()
    for _ in range(2):
        host.run("machinectl", "list", "--no-legend")
        deadline = time.monotonic() + 10
        while "elder" not in host.run("machinectl", "list", "--no-legend").stdout.split():
            assert time.monotonic() < deadline
        host.run("systemctl", "stop", "systemd-machined")
        host.run("rm", "-rf", "/run/systemd/machines")  # as if it had never heard of it
        host.run("systemctl", "restart", "kvmd")
    host.run("systemctl", "start", "systemd-machined")
    said = host.journal("MESSAGE_ID=6f1c0a1f6d5d4c0e9d5f0b6f8f3c2a10", since=since)
    assert {entry["KVMD_GUEST"] for entry in said} == {"no_host_name"}
    assert "Guest no_host_name is not shown by machinectl: " in said[0]["MESSAGE"]
    assert said[0]["PRIORITY"] == "5"
    for name in ("elder", "no_host_name"):
        guests.guest_off(name)
    host.run("systemctl", "stop", "systemd-machined")


def test_disk_is_created_and_kept(guests: Guests) -> None:
    disk = '[[disk]]\npath = "count.qcow2"\nsize = "16M"\n'
    guests.linux("disk", cmdline="kvmd.disk=1", extra=disk)
    guests.start("disk")
    guests.wait("disk", "guest: disk boots=1 stops=0")
    guests.host.run("systemctl", "restart", "kvmd@disk")
    guests.wait("disk", "guest: disk boots=2 stops=1")
    assert guests.host.run("stat", "-c", "%U %a", "/var/lib/kvmd/images/count.qcow2").stdout.split() == ["root", "600"]
    guests.guest_off("disk")
    guests.linux("disk", cmdline="kvmd.disk=1", extra='[[disk]]\npath = "overlay.qcow2"\nbase = "count.qcow2"\n')
    guests.start("disk")
    guests.wait("disk", "guest: disk boots=3 stops=1")
    guests.guest_off("disk")
    guests.host.run("rm", "/var/lib/kvmd/images/count.qcow2", "/var/lib/kvmd/images/overlay.qcow2")


@pytest.mark.complaints("could not be started")
def test_no_room_for_a_disk(guests: Guests) -> None:
    images = "/var/lib/kvmd/images"
    guests.host.run("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", images)
    try:
        assert "No space left" in guests.host.run("dd", "if=/dev/zero", f"of={images}/filler", check=False).stderr
        guests.write("full", 'memory = "32M"\n[[disk]]\npath = "full.qcow2"\nsize = "1G"\n')
        assert guests.host.run("systemctl", "start", "kvmd@full", check=False).returncode == 1
        reasons = [line for line in guests.status("full").splitlines() if f"{images}/full.qcow2" in line]
        assert reasons
        assert "No space left on device" in reasons[-1]
        assert guests.host.run("ls", "-A", images).stdout.split() == ["filler"]
        print(reasons[-1])
    finally:
        guests.host.run("umount", images)


def test_pause_reset_restart_and_needs_restart(guests: Guests) -> None:
    guests.linux("steer")
    assert guests.call("StartGuest", "s", "steer") == ["/org/kvmd1/guest/steer"]
    assert guests.active("steer") == "active"
    guests.wait("steer", "guest: ready")
    guests.guest("steer", "Pause")
    assert guests.get("steer", "State") == "paused"
    guests.guest("steer", "Resume")
    assert guests.get("steer", "State") == "running"
    since = guests.host.cursor()
    guests.guest("steer", "Reset")
    guests.wait("steer", "guest: ready", since)
    assert guests.get("steer", "NeedsRestart") is False
    guests.linux("steer", top="cpus = 2")
    assert guests.get("steer", "NeedsRestart") is True
    pid, since = guests.get("steer", "PID"), guests.host.cursor()
    guests.call("RestartGuest", "s", "steer")
    guests.wait("steer", "guest: ready", since)
    assert guests.get("steer", "PID") != pid
    assert guests.get("steer", "NeedsRestart") is False
    guests.call("StopGuest", "s", "steer")
    assert guests.active("steer") == "inactive"
    refused = guests.guest("steer", "Pause", check=False)
    assert "guest steer is not running" in refused.stderr


@pytest.mark.complaints("noticed.toml")
def test_a_changed_file_is_noticed(guests: Guests) -> None:
    since = guests.host.cursor()
    guests.names.add("noticed")
    guests.host.write("/etc/kvmd/noticed.toml", 'memory = "64 pages"\n')
    guests.host.wait_journal("KVMD_GUEST=noticed", message="noticed.toml:1: memory:", since=since)


def test_a_qemu_that_does_not_answer(guests: Guests) -> None:
    """A command ends in a sentence, the next daemon takes the guest over, and it goes on when it goes on."""
    guests.linux("still")
    guests.start("still")
    pid = str(guests.get("still", "PID"))
    guests.host.run("kill", "-STOP", pid)
    refused = guests.guest("still", "Pause", check=False)
    assert "QEMU did not answer stop within 20 s" in refused.stderr
    guests.host.run("systemctl", "restart", "kvmd")
    assert guests.get("still", "State") == "running"
    since = guests.host.cursor()
    guests.host.run("kill", "-CONT", pid)
    guests.guest("still", "Pause")
    assert guests.get("still", "State") == "paused"
    guests.guest("still", "Resume")
    guests.type("still", "echo going on", "^going on$")
    assert guests.host.journal("KVMD_GUEST=still", "PRIORITY=3", since=since) == []


# Takes the place of a QEMU's monitor, and says the same to all who come, without end.
MONITOR = """
import socket, sys
said = sys.argv[2].encode().decode("unicode_escape").encode("latin-1")
server = socket.create_server(sys.argv[1], family=socket.AF_UNIX)
while True:
    client, _ = server.accept()
    try:
        client.sendall(b'{"QMP": {}}\\n')
        while True:
            client.sendall(said)
    except OSError:
        pass
"""


@pytest.mark.complaints("cannot be steered")
@pytest.mark.parametrize(
    "said",
    ["[]\\n", '{"event": "STOP"}\\n{"event": "RESUME"}\\n{"event": "RESET"}\\n{"return": 1, "id": 99}\\n'],
    ids=["no QMP", "flood"],
)
def test_a_qemu_that_was_broken_into(guests: Guests, said: str) -> None:
    """It cannot be steered, and that is all."""
    guests.linux("broken")
    guests.linux("whole")
    guests.start("broken", "whole")
    since = guests.host.cursor()
    guests.host.run("systemctl", "stop", "kvmd")
    guests.host.run("rm", "/run/kvmd/broken/qmp")
    monitor = ("python3", "-c", MONITOR, "/run/kvmd/broken/qmp", said)
    guests.host.run("systemd-run", "--collect", "--unit=monitor", *monitor)
    guests.host.run("timeout", "20", "sh", "-c", "until test -S /run/kvmd/broken/qmp; do sleep 0.05; done")
    try:
        guests.host.run("systemctl", "start", "kvmd")
        guests.type("broken", "echo still there", "^still there$")
        guests.guest("whole", "Pause")
        assert guests.get("whole", "State") == "paused"
        guests.guest("whole", "Resume")
        guests.type("whole", "echo and here", "^and here$")
        guests.host.wait_journal("KVMD_GUEST=broken", message="cannot be steered: ", since=since)
        if said == "[]\\n":  # the other one does not answer, which takes its time
            assert guests.guest("broken", "Pause", check=False).returncode == 1
        guests.guest("broken", "Terminate")
    finally:
        guests.host.run("systemctl", "stop", "monitor")
