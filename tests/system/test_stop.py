"""A stop is a stop, also of a guest that is just being started: the unit and the guest's state agree all the while."""

from __future__ import annotations

import subprocess

import lab
import pytest

from .guests import Guests

NEVER = '[serial]\nready = "NEVER"\nready_timeout = "70s"\n'
GREETS_NOBODY = '[qemu]\nargs = ["-qmp", "unix:/tmp/nobody-comes,server=on"]\n'

# The states of unit and scope, every 100 ms until the unit is no longer on.
WATCH = """
while unit=$(systemctl show -P ActiveState "kvmd@$1"); scope=$(systemctl show -P ActiveState "kvmd-$1.scope")
echo "$unit $scope"; [ "$unit" != inactive ] && [ "$unit" != failed ]; do sleep 0.1; done
"""


def begin(guests: Guests, name: str) -> None:
    """A start that nobody waits for."""
    guests.host.run("systemctl", "start", "--no-block", f"kvmd@{name}")


def said_off(guests: Guests, name: str, since: str) -> str:
    return guests.host.wait_journal(f"KVMD_GUEST={name}", message="is off", since=since)["MESSAGE"]


@pytest.mark.parametrize("how", ["systemctl", "Stop", "Terminate"])
def test_a_guest_that_is_not_ready_yet(guests: Guests, how: str) -> None:
    host, since = guests.host, guests.host.cursor()
    guests.linux("early", extra=NEVER)
    waiting = host.popen("busctl", "call", "org.kvmd1", guests.path("early"), "org.kvmd1.Guest", "Start")
    guests.wait("early", "^guest: ready early", since)
    assert (guests.active("early"), guests.get("early", "State")) == ("activating", "running")
    watch = host.popen("sh", "-c", WATCH, "sh", "early")
    if how == "systemctl":
        host.run("systemctl", "stop", "kvmd@early", timeout=15)
    else:
        guests.guest("early", how)
    assert said_off(guests, "early", since) == (
        "Guest early is off (success): guest early was stopped while it was starting"
    )
    output, _ = waiting.communicate(timeout=5)
    assert (waiting.returncode, output) == (1, "Call failed: guest early was stopped while it was starting\n")
    states = watch.communicate(timeout=10)[0].splitlines()
    print(states)
    assert states[-1] == "inactive inactive"
    assert not [state for state in states if state.startswith(("inactive", "failed")) and state != "inactive inactive"]
    assert (guests.get("early", "State"), guests.get("early", "Result")) == ("stopped", "success")
    heard = [entry["MESSAGE"] for entry in host.journal("KVMD_GUEST=early", "KVMD_STREAM=serial", since=since)]
    assert ("guest: powering off" in heard) == (how != "Terminate")


@pytest.mark.parametrize("how", ["systemctl", "Stop", "Terminate"])
def test_qemu_that_does_not_say_that_it_runs(guests: Guests, how: str) -> None:
    since = guests.host.cursor()
    guests.linux("mute", extra=GREETS_NOBODY)
    begin(guests, "mute")
    guests.until("mute", "State", "starting")
    guests.host.wait_journal("UNIT=kvmd-mute.scope", message="Started", since=since)
    if how == "systemctl":
        guests.host.run("systemctl", "stop", "kvmd@mute", timeout=5)
    else:
        guests.guest("mute", how)
    assert said_off(guests, "mute", since) == (
        "Guest mute is off (success): guest mute was stopped while it was starting"
    )
    guests.host.run("systemctl", "stop", "kvmd@mute", timeout=5)
    assert (guests.active("mute"), guests.get("mute", "Result")) == ("inactive", "success")


@pytest.mark.complaints("could not be started")
def test_the_greeting_has_a_time_limit(guests: Guests) -> None:
    host, module = guests.host, "/usr/lib/kvmd/kvmd/guests/machine.py"
    host.run("sed", "-i", "s/^GREETING_TIMEOUT = 90.0/GREETING_TIMEOUT = 2.0/", module)
    host.run("systemctl", "restart", "kvmd")
    try:
        guests.linux("mute", extra=GREETS_NOBODY)
        assert host.run("systemctl", "start", "kvmd@mute", check=False, timeout=10).returncode == 1
        reason = 'QEMU did not say within 2 s that it runs (what of args = ["-qmp", "unix:/tmp/nobody-comes,server=on"]'
        assert reason in guests.status("mute")
    finally:
        host.run("sed", "-i", "s/^GREETING_TIMEOUT = 2.0/GREETING_TIMEOUT = 90.0/", module)
        host.run("systemctl", "restart", "kvmd")


def test_a_stop_and_a_start_in_one(guests: Guests) -> None:
    """`systemctl restart` of a guest that is not ready: the next one starts."""
    since = guests.host.cursor()
    guests.linux("anew", extra=NEVER)
    begin(guests, "anew")
    guests.wait("anew", "^guest: ready anew", since)
    pid, since = guests.get("anew", "PID"), guests.host.cursor()
    guests.host.run("systemctl", "restart", "--no-block", "kvmd@anew")
    guests.wait("anew", "guest: powering off", since)
    guests.wait("anew", "^guest: ready anew", since)
    assert guests.get("anew", "PID") not in (0, pid)
    assert guests.active("anew") == "activating"
    guests.host.run("systemctl", "stop", "kvmd@anew", timeout=15)


def test_beside_a_daemon_that_is_dead(guests: Guests) -> None:
    """The helper finds QEMU, and presses the power button."""
    host, since = guests.host, guests.host.cursor()
    guests.linux("orphan", cmdline="kvmd.disk=1", extra=f'[[disk]]\npath = "orphan.qcow2"\nsize = "16M"\n{NEVER}')
    begin(guests, "orphan")
    guests.wait("orphan", "^guest: ready orphan", since)
    host.run("systemctl", "kill", "--signal=STOP", "--kill-whom=main", "kvmd")
    host.run("systemctl", "stop", "kvmd@orphan", timeout=30)
    host.run("systemctl", "kill", "--signal=CONT", "--kill-whom=main", "kvmd")
    assert guests.active("orphan") == "inactive"
    assert said_off(guests, "orphan", since)
    since = host.cursor()
    begin(guests, "orphan")
    guests.wait("orphan", "guest: disk boots=2 stops=1", since)
    guests.guest_off("orphan")
    host.run("rm", "/var/lib/kvmd/images/orphan.qcow2")


@pytest.mark.parametrize("restarted", [False, True])
def test_at_poweroff(deb: str, restarted: bool) -> None:
    """Also after the daemon has been restarted while the guest was starting."""
    with lab.Host("bookworm", deb, name="early") as host:
        guests = Guests(host)
        guests.linux("early", extra=NEVER)
        begin(guests, "early")
        guests.wait("early", "^guest: ready early")
        if restarted:
            since = host.cursor()
            host.run("systemctl", "restart", "kvmd")
            host.wait_journal("UNIT=kvmd@early.service", message="Failed with result")
            host.wait_journal("UNIT=kvmd@early.service", message="^Starting", since=since)
        host.poweroff()
        journal = host.directory / "root/var/log/journal"
        command = ["journalctl", f"--directory={journal}", "-q", "-o", "cat", "KVMD_GUEST=early"]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert "guest: powering off" in lines
    assert "is off (success)" in lines[-1]


@pytest.mark.complaints("failed", "did not power off", "could not be started")
def test_each_end_has_a_message_of_its_own(guests: Guests) -> None:
    host = guests.host
    never = '[serial]\nready = "NEVER"\nready_timeout = "1s"\n'
    ends = {
        "off": ("02", "", lambda: guests.type("off", "poweroff", "guest: powering off")),
        "failing": ("04", never, None),
        "deaf": ("0b", "", lambda: host.run("systemctl", "stop", "kvmd@deaf")),
        "killed": ("0c", "", lambda: host.run("kill", "-9", str(guests.get("killed", "PID")))),
        "panic": ("0d", "", lambda: host.run("sh", "-c", "echo panic >/run/kvmd/panic/serial.in")),
    }
    since = host.cursor()
    for name, (_, extra, end) in ends.items():
        guests.linux(name, extra=extra, cmdline="kvmd.deaf=1" if name == "deaf" else "")
        guests.write(name, host.read(f"/etc/kvmd/{name}.toml").replace('"20s"', '"2s"'))
        if end:
            guests.start(name)
            end()
        else:
            host.run("systemctl", "start", f"kvmd@{name}", check=False)
    for name, (number, _, _) in ends.items():
        said = host.wait_journal(f"KVMD_GUEST={name}", message="is off|failed:", since=since)
        assert (name, said["MESSAGE_ID"]) == (name, f"6f1c0a1f6d5d4c0e9d5f0b6f8f3c2a{number}")
