"""A local user does what he can to keep kvmd from its work: root's calls, starts and stops go on beside it."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lab
import pytest
from lab import rom

from .guests import Guests

HERE = Path(__file__).resolve().parent
GUEST = 'memory = "32M"\naccelerator = "tcg"\nstop_timeout = "20s"\n[qemu]\nargs = ["-bios", "/var/lib/kvmd/rom"]\n'
AS_MALLORY = ("setpriv", "--reuid=mallory", "--regid=mallory", "--init-groups")
ABUSER = ("python3", "-IB", "/run/abuser.py")


class Abused(Guests):
    """With a guest that runs all the time, and the daemon's figures."""

    def begin(self, verb: str, amount: object, user: tuple[str, ...] = AS_MALLORY) -> subprocess.Popen[str]:
        return self.host.popen(*user, *ABUSER, verb, str(amount), stdin=subprocess.PIPE)

    def end(self, process: subprocess.Popen[str]) -> Any:
        """What its last line says."""
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
        return json.loads(output.splitlines()[-1])

    def daemon(self) -> dict[str, int]:
        pid = self.host.show("kvmd.service")["MainPID"]
        status = dict(
            line.split(":\t", 1) for line in self.host.read(f"/proc/{pid}/status").splitlines() if ":\t" in line
        )
        descriptors = len(self.host.run("ls", f"/proc/{pid}/fd").stdout.split())
        return {"PID": int(pid), "KiB": int(status["VmRSS"].split()[0]), "descriptors": descriptors}

    def read_log(self, name: str, lines: int) -> list[str]:
        log: list[str] = self._busctl(
            "call", "org.kvmd1", self.path(name), "org.kvmd1.Guest", "ReadLog", "t", str(lines)
        )[0]
        return log

    def beside(self, verb: str, amount: object, seconds: float) -> tuple[Any, Any]:
        """Root's calls, and a start and a stop, while the user goes on: what both say."""
        before = self.daemon()
        clock = self.begin("clock", seconds, ())
        abuse = self.begin(verb, amount)
        begin = time.monotonic()
        self.start("victim", ready=False)
        started = time.monotonic()
        self.call("StopGuest", "s", "victim")
        stopped = time.monotonic()
        said, times = self.end(abuse), self.end(clock)
        after = self.daemon()
        print(
            f"\n{verb} {amount}: {said}; root's calls, ms: {times}; start {started - begin:.2f} s,"
            f" stop {stopped - started:.2f} s; {before} → {after}"
        )
        assert after["PID"] == before["PID"]
        assert after["descriptors"] <= before["descriptors"] + 4
        assert after["KiB"] - before["KiB"] < 16 << 10
        return said, times


@pytest.fixture
def abused(guests: Guests) -> Iterator[Abused]:
    host = guests.host
    host.write("/var/lib/kvmd/rom", rom.steady())
    host.copy_in(HERE / "abuser.py", "/run/abuser.py")
    host.run("useradd", "mallory")
    abused = Abused(host)
    for name in ("steady", "victim"):
        abused.write(name, GUEST)
    abused.start("steady", ready=False)
    yield abused
    abused.clear()
    host.run("userdel", "mallory")
    host.run("rm", "/run/abuser.py", "/var/lib/kvmd/rom")


def test_descriptors(abused: Abused) -> None:
    before = abused.daemon()["descriptors"]
    assert abused.end(abused.begin("descriptors", 100))["answer"] == 2
    assert abused.daemon()["descriptors"] <= before + 2


def test_no_descriptor_left(abused: Abused) -> None:
    """It says so, and goes on."""
    host = abused.host
    limit = ("prlimit", f"--pid={abused.daemon()['PID']}")
    before = host.run(*limit, "--noheadings", "--output=SOFT", "--nofile").stdout.strip()
    host.run(*limit, "--nofile=3:")  # what is open stays so
    call = ("org.kvmd1", "/org/kvmd1", "org.freedesktop.DBus.Peer", "GetMachineId")
    said = abused._busctl("call", *call, check=False).stderr
    host.run(*limit, f"--nofile={before}:")
    assert "kvmd has no file descriptor left (raise LimitNOFILE= of kvmd.service)" in said
    assert abused._busctl("call", *call)


@pytest.mark.parametrize(("verb", "count"), [("octets", 30), ("variants", 3)])
def test_messages_of_31_mib(abused: Abused, verb: str, count: int) -> None:
    said, times = abused.beside(verb, count, 5)
    assert said["answers"] == {"org.freedesktop.DBus.Error.LimitsExceeded": count}
    assert times["kvmd"]["median"] < 100


def test_headers_of_20_mib(abused: Abused) -> None:
    assert abused.end(abused.begin("long_header", 5))["answer"] == 2


def test_a_hundred_thousand_calls(abused: Abused) -> None:
    said, times = abused.beside("small", 100_000, 10)
    assert said["unanswered"] in (2, 3)
    assert times["kvmd"]["median"] < 100


def test_ten_thousand_calls_in_flight(abused: Abused) -> None:
    said, times = abused.beside("calls", 10_000, 5)
    assert said["missing"] == 0
    assert sum(said["answers"].values()) == 10_000
    assert said["answers"].keys() <= {"", "org.freedesktop.DBus.Error.LimitsExceeded"}
    assert times["kvmd"]["median"] < 100
    before = abused.daemon()["KiB"]
    abused.end(abused.begin("calls", 10_000))
    assert abused.daemon()["KiB"] - before < 8 << 10  # what the allocator needed once it keeps


def test_signals_in_systemds_name(abused: Abused) -> None:
    """With the numbers that systemd's next jobs have."""
    job = abused.host.run("systemctl", "show", "-p", "NInstalledJobs", "--value").stdout.strip()
    abuse = abused.host.popen(*AS_MALLORY, "env", f"JOB={job}", *ABUSER, "signals", "10")
    for _ in range(3):
        abused.start("victim", ready=False)
        assert abused.get("victim", "State") == "running"
        scope = abused.host.read(f"/proc/{abused.get('victim', 'PID')}/cgroup").strip()
        assert scope.endswith("kvmd-victim.scope")
        abused.call("StopGuest", "s", "victim")
    said = abused.end(abuse)
    print(said)
    assert said["errors"]["org.freedesktop.DBus.Error.AccessDenied"] > 1000  # those to kvmd alone


def test_an_agent_that_never_answers(abused: Abused) -> None:
    """He has four questions at polkit; nobody else waits, and they are given up as he leaves."""
    for _ in range(2):
        abuse = abused.begin("agent", 110)
        assert abuse.stdout
        line = abuse.stdout.readline()
        print(line)
        said = json.loads(line)
        begin = time.monotonic()
        abused.start("victim", ready=False)
        abused.call("StopGuest", "s", "victim")
        assert time.monotonic() - begin < 10
        abuse.communicate(timeout=30)
        assert said["registered"] == 2
        assert said["asked"] == 4
        (sentence,) = said["answers"]
        assert sentence.startswith("StartGuest refused: too many of your calls wait for polkit")
        assert said["answers"][sentence] == 106


def test_who_wants_no_answer_gets_none(abused: Abused) -> None:
    since = abused.host.cursor()
    abused.end(abused.begin("small", 1000))
    said = [entry.get("MESSAGE", "") for entry in abused.host.journal("-t", "dbus-daemon", since=since)]
    assert not [message for message in said if "kvmd" in message]


def test_a_long_log(abused: Abused) -> None:
    """More than the bus takes at once: the newest lines that fit, and the daemon stays on the bus."""
    host, before = abused.host, abused.daemon()
    forge = (
        "import sys; from systemd import journal\n"
        "for n in range(3000): journal.send('%06d' % n + 'x' * 16000, KVMD_GUEST='steady', KVMD_STREAM='serial')"
    )
    host.run("python3", "-c", forge)
    host.run("journalctl", "--sync")
    clock = abused.begin("clock", 5, ())
    lines = abused.read_log("steady", 10_000)
    print(len(lines), "lines;", abused.end(clock))
    assert 200 < sum(map(len, lines)) / 16_000 < 263
    assert abused.daemon()["PID"] == before["PID"]


# --- a daemon that does not answer --------------------------------------------------------------------------------


def last_words(host: lab.Host, name: str) -> tuple[str, float]:
    """What a guest whom no daemon listens to says last as its unit stops, and how many seconds that takes."""
    script = 'exec 3<>"/run/kvmd/$1/serial.out"; systemctl stop "kvmd@$1"; timeout 1 cat <&3'
    begin = time.monotonic()
    return host.run("sh", "-c", script, "sh", name, check=False).stdout.splitlines()[-1], time.monotonic() - begin - 1


def test_a_guest_is_stopped_beside_a_frozen_daemon(abused: Abused) -> None:
    host = abused.host
    host.run("systemctl", "kill", "--signal=STOP", "--kill-whom=main", "kvmd")
    try:
        said, seconds = last_words(host, "steady")
    finally:
        host.run("systemctl", "kill", "--signal=CONT", "--kill-whom=main", "kvmd")
    print(f"stopped in {seconds:.1f} s")
    assert said == rom.FAREWELL
    assert seconds < 10
    assert abused.active("steady") == "inactive"


def test_a_guest_is_stopped_beside_a_daemon_that_does_not_start(abused: Abused) -> None:
    host, drop_in = abused.host, "/run/systemd/system/kvmd.service.d/broken.conf"
    host.write(drop_in, "[Service]\nExecStart=\nExecStart=/bin/false\n")
    host.run("systemctl", "daemon-reload")
    host.run("systemctl", "restart", "kvmd", check=False)
    try:
        said, seconds = last_words(host, "steady")
    finally:
        host.run("rm", drop_in)
        host.run("systemctl", "daemon-reload")
        host.run("systemctl", "restart", "kvmd")
    print(f"stopped in {seconds:.1f} s")
    assert said == rom.FAREWELL
    assert seconds < 10


@pytest.mark.complaints("did not power off within 8 s")
def test_the_button_is_pressed_for_nothing_beside_a_daemon_that_waits(abused: Abused) -> None:
    """For a guest that ignores it: the daemon cuts its power, and the helper asked QEMU for nothing."""
    host, since = abused.host, abused.host.cursor()
    host.write("/var/lib/kvmd/rom", rom.steady(deaf=True))
    abused.write("victim", GUEST.replace("20s", "8s"))
    abused.start("victim", ready=False)
    host.run("mv", "/run/kvmd/victim/qmp.spare", "/run/kvmd/victim/qmp.elsewhere")
    host.run("systemctl", "stop", "kvmd@victim")
    host.wait_journal("KVMD_GUEST=victim", message="did not power off within 8 s", since=since)
    assert abused.get("victim", "Result") == "timeout"
    assert not [entry for entry in host.journal(since=since) if "cannot reach QEMU" in entry.get("MESSAGE", "")]


@pytest.mark.complaints("QEMU was killed or crashed")
@pytest.mark.parametrize("daemon", ["none", "frozen"])
def test_a_qemu_that_does_nothing_is_killed(abused: Abused, daemon: str) -> None:
    """Stopped, it would end by no SIGTERM, and systemd would wait for it for ever."""
    host, since = abused.host, abused.host.cursor()
    abused.write("victim", GUEST.replace("20s", "3s"))
    abused.start("victim", ready=False)
    host.run("kill", "-STOP", str(abused.get("victim", "PID")))
    if daemon == "none":
        host.run("systemctl", "stop", "kvmd")
    else:
        host.run("systemctl", "kill", "--signal=STOP", "--kill-whom=main", "kvmd")
    begin = time.monotonic()
    host.run("systemctl", "stop", "kvmd@victim")
    seconds = time.monotonic() - begin
    if daemon == "none":
        host.run("systemctl", "start", "kvmd")
    else:
        host.run("systemctl", "kill", "--signal=CONT", "--kill-whom=main", "kvmd")
    print(f"killed in {seconds:.1f} s")
    assert seconds < 20
    host.wait_journal("_COMM=kvmd-stop", message="QEMU of victim does not end: it is killed", since=since)


MONITOR = """
import os, socket, sys, time
os.makedirs("/run/kvmd/fake", exist_ok=True)
open("/run/kvmd/fake/stop_timeout", "w").write("3")
listener = socket.socket(socket.AF_UNIX)
listener.bind("/run/kvmd/fake/qmp.spare")
listener.listen(100)
print("listens", flush=True)
connections = []
while True:
    connections.append(listener.accept()[0])
    try:
        for _ in range(1000):
            if sys.argv[1] == "trickles":
                time.sleep(0.1)
            if sys.argv[1] != "says nothing":
                connections[-1].sendall(b"{" * (1 if sys.argv[1] == "trickles" else 1 << 16))
    except OSError:
        pass
"""


@pytest.mark.parametrize("monitor", ["says nothing", "trickles", "floods"])
def test_a_monitor_that_is_none_holds_up_no_stop(abused: Abused, monitor: str) -> None:
    host = abused.host
    fake = host.popen("python3", "-c", MONITOR, monitor)
    assert fake.stdout
    assert fake.stdout.readline() == "listens\n"
    script = "sleep infinity & MAINPID=$! /usr/libexec/kvmd/kvmd-stop fake; kill -0 $!"
    begin = time.monotonic()
    done = host.run("sh", "-c", script, check=False)
    fake.kill()
    host.run("rm", "-r", "/run/kvmd/fake")
    print(f"{monitor}: {time.monotonic() - begin:.1f} s")
    assert "QEMU of fake does not end: it is killed" in done.stderr
    assert time.monotonic() - begin < 20


def test_the_host_is_shut_down_beside_a_frozen_daemon(deb: Path) -> None:
    """Its guest hears the power button: its stop_timeout is far away."""
    with lab.Host("bookworm", deb, name="frozen") as host:
        host.write("/var/lib/kvmd/rom", rom.steady())
        host.write("/etc/kvmd/steady.toml", GUEST.replace("20s", "100s"))
        host.run("busctl", "call", "org.kvmd1", "/org/kvmd1", "org.kvmd1.Manager", "Reload")
        host.run("systemctl", "start", "kvmd@steady")
        host.run("systemctl", "kill", "--signal=STOP", "--kill-whom=main", "kvmd")
        begin = time.monotonic()
        host.poweroff()
        seconds = time.monotonic() - begin
        journal = host.directory / "root/var/log/journal"
        command = ["journalctl", f"--directory={journal}", "-o", "cat", "-q"]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    print(f"off in {seconds:.1f} s")
    assert seconds < 30
    assert not [line for line in lines if "is killed" in line or "Killing process" in line]
