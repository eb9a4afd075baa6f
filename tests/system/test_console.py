"""Consoles and the log by D-Bus; readiness; restart policies."""

from __future__ import annotations

import pytest

from .guests import Guests

# Opens consoles of a guest: the first types, the second only looks, the third never reads; prints what the second sees
# until the answer has come.
CONSOLES = """
import asyncio, os, sys
from dbus_next.aio import MessageBus
from dbus_next import BusType, Message
async def main(path, line, answer):
    bus = await MessageBus(bus_type=BusType.SYSTEM, negotiate_unix_fd=True).connect()
    fds = []
    for _ in range(3):
        call = Message(destination="org.kvmd1", path=path, interface="org.kvmd1.Guest", member="OpenConsole")
        reply = await bus.call(call)
        fds.append(reply.unix_fds[reply.body[0]])
    os.write(fds[0], line.encode() + b"\\n")
    seen = b""
    while answer.encode() not in seen:
        seen += os.read(fds[1], 65536)
    print(seen.decode(errors="replace"))
asyncio.run(asyncio.wait_for(main(*sys.argv[1:]), 60))
"""


def test_consoles(guests: Guests) -> None:
    guests.linux("console")
    guests.start("console")
    path = "/org/kvmd1/guest/console"
    seen = guests.host.run("python3", "-c", CONSOLES, path, "echo typed", "\ntyped\r\n").stdout
    assert "guest: ready console" in seen  # what was there before is shown on attaching
    # A megabyte and more, while one console is never read: it holds up nobody.
    flood = guests.host.run("python3", "-c", CONSOLES, path, "flood 25000", "flood 00025000", timeout=120).stdout
    assert "flood 00025000" in flood
    assert guests.host.run("pgrep", "-c", "kvmd").returncode == 0
    guests.wait("console", "^flood 00025000")
    log = guests.host.run("busctl", "call", "org.kvmd1", path, "org.kvmd1.Guest", "ReadLog", "t", "2").stdout
    assert log.startswith('as 2 "flood 00024999')


def test_without_polkit_consoles_are_for_root(guests: Guests) -> None:
    guests.linux("private")
    for method in (("OpenConsole",), ("ReadLog", "t", "5"), ("Start",)):
        call = ("busctl", "call", "org.kvmd1", "/org/kvmd1/guest/private", "org.kvmd1.Guest", *method)
        refused = guests.host.run("setpriv", "--reuid=nobody", *call, check=False)
        assert (refused.returncode, refused.stderr) == (1, "Call failed: Access denied\n")


def test_a_start_is_complete_when_the_guest_is_ready(guests: Guests) -> None:
    guests.linux("db", extra='[serial]\nready = "^guest: ready db$"\n')
    guests.host.run("systemctl", "start", "kvmd@db")
    assert guests.get("db", "Ready") is True
    assert [entry for entry in guests.serial("db") if entry["MESSAGE"] == "guest: ready db"]
    guests.type("db", "flood 100", "^flood 00000100")
    guests.host.run("systemctl", "restart", "kvmd")
    assert guests.get("db", "Ready") is True


def test_a_guest_outlives_a_daemon_that_is_killed_before_it_is_ready(guests: Guests) -> None:
    """systemd takes the start for failed then, and starts the unit again: it finds the guest."""
    guests.linux("db", extra='[serial]\nready = "^now$"\n')
    since = guests.host.cursor()
    guests.host.run("systemctl", "start", "--no-block", "kvmd@db")
    guests.wait("db", "^guest: ready db", since)
    pid = guests.get("db", "PID")
    guests.host.run("systemctl", "kill", "--signal=KILL", "--kill-whom=main", "kvmd")
    guests.host.wait_journal("KVMD_GUEST=db", message="was running already", since=since)
    assert guests.get("db", "Ready") is False
    guests.type("db", "echo now", "^now$")
    guests.host.wait_journal("-u", "kvmd@db", message="^Started kvmd@db.service", since=since)
    assert guests.get("db", "Ready") is True
    assert guests.get("db", "PID") == pid


@pytest.mark.complaints("did not power off", "could not be started")
def test_a_guest_that_is_never_ready(guests: Guests) -> None:
    guests.linux("late", extra='[serial]\nready = "no such line"\nready_timeout = "1s"\n')
    failed = guests.host.run("systemctl", "start", "kvmd@late", check=False)
    assert failed.returncode == 1
    assert 'not ready within 1 s, its power was cut: it printed no line matching "no such line"' in guests.status(
        "late"
    )
    assert guests.get("late", "State") != "running"
    assert guests.get("late", "Result") == "timeout"


@pytest.mark.complaints("counts as not ready", "could not be started")
def test_a_pattern_that_takes_for_ever(guests: Guests) -> None:
    """A line of a's, and all it stops is its own guest's start; not the daemon, nor the next one."""
    guests.linux("evil", extra='[serial]\nready = "(a+)+$"\n')
    guests.linux("good", extra='[serial]\nready = "^guest: ready"\n')
    since = guests.host.cursor()
    guests.host.run("systemctl", "start", "--no-block", "kvmd@evil")
    guests.wait("evil", "^guest: ready evil", since)
    guests.type("evil", f"echo {'a' * 60}!", "^a+!$")
    guests.host.run("pgrep", "--euid=nobody", "-f", "setitimer")
    guests.start("good")
    guests.type("good", "echo meanwhile", "^meanwhile$")
    guests.host.run("systemctl", "kill", "--signal=KILL", "--kill-whom=main", "kvmd")
    guests.host.wait_journal("KVMD_GUEST=evil", message="was running already", since=since)
    assert guests.get("good", "Ready") is True
    assert guests.get("evil", "Ready") is False
    guests.type("good", "echo and again", "^and again$")
    guests.host.run("pgrep", "--euid=nobody", "-f", "setitimer")
    for message in (
        "not ready: nobody looks for serial.ready .* more than 10 s of CPU time",
        "is off .timeout.: .* cannot become ready",
    ):
        guests.host.wait_journal("KVMD_GUEST=evil", message=message, since=since, timeout=60)
    assert guests.get("evil", "PID") == 0
    assert guests.host.run("pgrep", "--euid=nobody", "-f", "setitimer", check=False).returncode == 1


@pytest.mark.complaints("Guest phoenix failed")
def test_restart_on_failure_and_never_after_a_stop(guests: Guests) -> None:
    guests.linux("phoenix", top='restart = "on-failure"')
    guests.host.run("systemctl", "daemon-reload")  # kvmd does as much, a moment after it has seen the file
    guests.start("phoenix")
    since, pid = guests.host.cursor(), guests.get("phoenix", "PID")
    guests.host.run("kill", "-9", str(pid))
    guests.wait("phoenix", "guest: ready phoenix", since)
    assert guests.get("phoenix", "PID") not in (0, pid)
    guests.guest("phoenix", "Terminate")
    guests.host.run("systemctl", "stop", "kvmd@phoenix")
    assert guests.active("phoenix") == "inactive"
    assert guests.get("phoenix", "PID") == 0
