"""Guests outlive everything but their own end: things are broken at random instants, and all is counted.

KVMD_FAULTS=N injections instead of some 100, KVMD_SEED=N for the same ones once more, KVMD_RELEASE=trixie on Debian 13.
"""

from __future__ import annotations

import difflib
import json
import os
import random
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lab
import pytest
from lab import rom

from .guests import Guests

pytestmark = pytest.mark.xdist_group("faults")

HERE = Path(__file__).resolve().parent
COUNT = int(os.environ.get("KVMD_FAULTS", "100"))
RELEASE = os.environ.get("KVMD_RELEASE", "bookworm")
SECONDS_PER_FAULT = 5.0  # all else is a machine that hangs
ADOPTION = 2.0  # seconds: that nothing stands still; how fast it is, tests/bench says

GUEST = 'memory = "32M"\naccelerator = "tcg"\nstop_timeout = "20s"\n[qemu]\nargs = ["-bios", "/var/lib/kvmd/rom"]\n'

# What kvmd has to say when it, the bus or QEMU is killed. Nothing else is expected of it.
COMPLAINTS = (
    "the system bus has gone",
    "cannot reach the system bus",
    "was not started",  # a start that was interrupted
    "could not be started",
    "QEMU was killed or crashed",
    "the filter against forged addresses",
)


@pytest.fixture(scope="module")
def battered(deb: Path) -> Iterator[lab.Host]:
    """A host of its own."""
    with lab.Host(RELEASE, deb, name="faults") as host:
        host.make_lan()
        host.write("/var/lib/kvmd/rom", rom.steady())
        host.copy_in(deb, "/run/kvmd.deb")
        host.copy_in(HERE / "faults.py", "/run/faults.py")
        yield host


def inside(host: lab.Host, *words: object, timeout: float) -> Any:
    """Run faults.py in the host; what its last line says."""
    done = host.run("python3", "-IB", "/run/faults.py", *map(str, words), timeout=timeout)
    print(done.stdout)
    return json.loads(done.stdout.splitlines()[-1])


def complaints(host: lab.Host, since: str, expected: tuple[str, ...] = ()) -> list[str]:
    entries = host.journal("-p", "warning", "_SYSTEMD_UNIT=kvmd.service", since=since)
    entries += [entry for entry in host.journal(since=since) if "Traceback" in entry.get("MESSAGE", "")]
    said = [entry.get("MESSAGE", "") for entry in entries]
    return [message for message in said if not any(word in message for word in expected)]


def test_faults(battered: lab.Host) -> None:
    seed = int(os.environ.get("KVMD_SEED") or random.randrange(1 << 32))
    print(f"KVMD_SEED={seed}")
    battered.run("systemctl", "start", "kvmd")
    before, since = battered.state(), battered.cursor()
    tally = inside(battered, "break", seed, COUNT, "/run/kvmd.deb", timeout=60 + SECONDS_PER_FAULT * COUNT)
    adoptions = tally["adoptions"]
    counted = ("lost", "lines_lost", "lines_doubled", "leftovers", "units")
    print(
        f"{sum(tally['injections'].values())} injections in {tally['seconds']:.0f} s:",
        *(f"{len(tally[name])} {name.replace('_', ' ')}," for name in counted),
        f"{tally['lines']} lines; {len(adoptions)} daemons, the slowest adopted in {max(adoptions):.2f} s",
    )
    assert {name: tally[name] for name in counted} == {name: [] for name in counted}
    assert sum(tally["injections"].values()) >= COUNT
    # Others use this machine, too: a single one may be late.
    assert statistics.quantiles(adoptions, n=10)[-1] <= ADOPTION
    changed = list(difflib.unified_diff(before, battered.state(), n=0, lineterm=""))
    assert not changed, "\n".join(changed)
    assert battered.run("ls", "/run/kvmd").stdout.split() in ([], ["sysctl.json"])
    assert not complaints(battered, since, COMPLAINTS)


def test_a_thousand_objects_and_a_full_socket(battered: lab.Host) -> None:
    """Nobody reads from the daemon for a while, and one client never does: nothing is lost, nobody waits long."""
    since = battered.cursor()
    figures = inside(battered, "objects", 1000, timeout=120)
    assert figures["same daemon"]
    assert (figures["GuestNew"], figures["GuestRemoved"], figures["InterfacesAdded"]) == (1000, 1000, 1000)
    assert figures["ListGuests s"] < 1
    assert figures["GetManagedObjects s"] < 1
    assert max(figures["frozen MiB"], figures["MiB"]) < 64
    assert not complaints(battered, since)


def test_nothing_grows(battered: lab.Host) -> None:
    """Descriptors and memory of the daemon over many lives of guests; KVMD_CYCLES=1000 for more."""
    count = int(os.environ.get("KVMD_CYCLES", "100"))
    before, since = battered.state(), battered.cursor()
    figures = inside(battered, "cycles", count, timeout=60 + 2 * count)
    warm, end = figures["warm"], figures["end"]
    assert figures["same daemon"]
    assert end["descriptors"] == warm["descriptors"]
    assert end["kept by PID 1"] == 0
    assert end["MiB"] - warm["MiB"] < 2 + count / 200  # 5 KiB each, beyond what the allocator needs once
    assert list(difflib.unified_diff(before, battered.state(), n=0)) == []
    assert not complaints(battered, since)


def test_at_poweroff_a_deaf_guest_holds_up_no_other(deb: Path) -> None:
    """Ten guests are shut down side by side; the one that ignores the power button has its own stop_timeout."""
    names = [f"quick{number}" for number in range(9)]
    with lab.Host(RELEASE, deb, name="poweroff") as host:
        for name, deaf in [*((name, False) for name in names), ("deaf", True)]:
            host.write(f"/var/lib/kvmd/rom.{deaf}", rom.steady(deaf=deaf))
            text = f'memory = "32M"\naccelerator = "tcg"\nstop_timeout = "{5 if deaf else 60}s"\n'
            host.write(f"/etc/kvmd/{name}.toml", f'{text}[qemu]\nargs = ["-bios", "/var/lib/kvmd/rom.{deaf}"]\n')
        host.run("busctl", "call", "org.kvmd1", "/org/kvmd1", "org.kvmd1.Manager", "Reload")
        host.run("systemctl", "start", *(f"kvmd@{name}" for name in [*names, "deaf"]))
        begin = time.time()
        host.poweroff()
        took = time.time() - begin
        journal = host.directory / "root/var/log/journal"
        command = ["journalctl", f"--directory={journal}", "-o", "json", "-q"]
        matches = [f"KVMD_GUEST={name}" for name in [*names, "deaf"]]
        lines = subprocess.run([*command, *matches], capture_output=True, text=True, check=True).stdout.splitlines()
    entries = [json.loads(line) for line in lines]
    ends = {
        (entry["KVMD_GUEST"], entry["MESSAGE"]): int(entry["__REALTIME_TIMESTAMP"]) / 1e6 - begin for entry in entries
    }
    for name in names:
        assert (name, rom.FAREWELL) in ends
        assert ends[name, f"Guest {name} is off (success)"] < 4
    assert 5 <= ends["deaf", "Guest deaf is off (timeout)"] < 9
    assert took < 15


def test_a_qemu_that_hangs_holds_up_nobody(battered: lab.Host) -> None:
    """It is taken over all the same, and obeys once it goes on."""
    guests, since = Guests(battered), battered.cursor()
    for name in ("hangs", "beside"):
        guests.write(name, GUEST)
    guests.start("hangs", "beside", ready=False)
    pid = guests.get("hangs", "PID")
    battered.run("kill", "-STOP", str(pid))
    battered.run("systemctl", "kill", "--signal=KILL", "--kill-whom=main", "kvmd")
    battered.wait_journal("UNIT=kvmd.service", message="Main process exited", since=since)
    battered.run("systemctl", "start", "kvmd")
    daemon = battered.show("kvmd.service")
    ready, begin = (int(daemon[f"{key}TimestampMonotonic"]) for key in ("ActiveEnter", "ExecMainStart"))
    assert ready - begin < 2_000_000
    assert [guests.get(name, "State") for name in ("hangs", "beside")] == ["running", "running"]
    battered.run("kill", "-CONT", str(pid))
    battered.run("systemctl", "stop", "kvmd@hangs", "kvmd@beside")
    for name in ("hangs", "beside"):
        guests.wait(name, rom.FAREWELL, since)
        assert guests.get(name, "Result") == "success"
    guests.clear()


def test_a_daemon_that_hangs_is_replaced(battered: lab.Host) -> None:
    """By the watchdog; its guests do not notice."""
    guests = Guests(battered)
    guests.write("patient", GUEST)
    guests.start("patient", ready=False)
    pid = guests.get("patient", "PID")
    drop_in = "/run/systemd/system/kvmd.service.d/watchdog.conf"
    battered.write(drop_in, "[Service]\nWatchdogSec=1s\n")
    battered.run("systemctl", "daemon-reload")
    battered.run("systemctl", "restart", "kvmd")
    since = battered.cursor()
    battered.run("systemctl", "kill", "--signal=STOP", "--kill-whom=main", "kvmd")
    battered.wait_journal("UNIT=kvmd.service", message="Watchdog timeout", since=since)
    battered.wait_journal("KVMD_GUEST=patient", message="was running already", since=since)
    battered.run("rm", drop_in)
    battered.run("systemctl", "daemon-reload")
    battered.run("systemctl", "restart", "kvmd")
    assert guests.get("patient", "PID") == pid
    guests.clear()


def last_words(host: lab.Host, name: str) -> str:
    """What a guest whom no daemon listens to says last as its unit stops."""
    script = 'exec 3<>"/run/kvmd/$1/serial.out"; systemctl stop "kvmd@$1"; timeout 1 cat <&3'
    return host.run("sh", "-c", script, "sh", name, check=False).stdout.splitlines()[-1]


def test_a_stop_is_graceful_without_daemon_and_timeout(battered: lab.Host) -> None:
    guests = Guests(battered)
    guests.write("bare", GUEST)
    guests.start("bare", ready=False)
    battered.run("rm", "/run/kvmd/bare/stop_timeout")
    battered.run("systemctl", "stop", "kvmd")
    assert last_words(battered, "bare") == rom.FAREWELL
    battered.run("systemctl", "start", "kvmd")
    guests.clear()


def test_what_cannot_be_taken_over_goes_on(battered: lab.Host) -> None:
    """No power is cut for a defect of ours; there is no second QEMU, and systemctl stops the first gracefully."""
    guests, since = Guests(battered), battered.cursor()
    guests.write("alone", GUEST)
    guests.start("alone", ready=False)
    pid = guests.get("alone", "PID")
    battered.write("/run/kvmd/alone/guest.toml", 'memory = "of a later version"\n')
    battered.run("systemctl", "restart", "kvmd")
    battered.wait_journal("KVMD_GUEST=alone", message="could not be taken over and goes on alone", since=since)
    assert "runs out of kvmd's reach" in guests.call("StartGuest", "s", "alone", check=False).stderr
    assert battered.show("kvmd@alone.service")["MainPID"] == str(pid)
    assert last_words(battered, "alone") == rom.FAREWELL
    guests.start("alone", ready=False)
    guests.clear()
