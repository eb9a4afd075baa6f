"""Serial output in the journal: all fields, each line once and in order, whatever happens to the daemon."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator

import lab
import pytest

from .guests import Guests

HELD_BACK = "MESSAGE_ID=6f1c0a1f6d5d4c0e9d5f0b6f8f3c2a0a"
ROM = "/var/lib/kvmd/images/flood.rom"

# Types at a guest again and again and waits for the answer in the journal; prints how long that took, and how long a
# call of D-Bus, in seconds.
LATENCY = """
import asyncio, json, os, sys, time
from dbus_next.aio import MessageBus
from dbus_next import BusType, Message
from systemd import journal
async def main(name, rounds):
    bus = await MessageBus(bus_type=BusType.SYSTEM).connect()
    get = dict(destination="org.kvmd1", path=f"/org/kvmd1/guest/{name}", interface="org.freedesktop.DBus.Properties")
    reader = journal.Reader(journal.LOCAL_ONLY)
    reader.add_match(KVMD_GUEST=name)
    reader.seek_tail()
    reader.get_previous()
    keyboard = os.open(f"/run/kvmd/{name}/serial.in", os.O_RDWR)
    lines, calls = [], []
    for number in range(int(rounds)):
        start = time.monotonic()
        await bus.call(Message(**get, member="Get", signature="ss", body=["org.kvmd1.Guest", "SerialBytes"]))
        calls.append(time.monotonic() - start)
        start = time.monotonic()
        os.write(keyboard, f"echo probe {number}\\n".encode())
        while not any(entry["MESSAGE"] == f"probe {number}" for entry in reader):
            reader.wait(1)
        lines.append(time.monotonic() - start)
    print(json.dumps([lines, calls]))
asyncio.run(asyncio.wait_for(main(*sys.argv[1:]), 50))
"""


def assert_complete(guests: Guests, name: str) -> list[str]:
    """Every byte that the guest has written is in the journal once; the messages."""
    entries = guests.serial(name)
    position = 0
    for entry in entries:
        assert int(entry["KVMD_OFFSET"]) == position
        position += int(entry["KVMD_LENGTH"])
    assert position == guests.get(name, "SerialBytes")
    return [entry["MESSAGE"] for entry in entries]


def numbers(messages: list[str]) -> list[int]:
    """Of the lines of a flood; one that is not whole has none."""
    whole = r"flood (\d{8}) the quick brown fox jumps over the dog"
    return [int(match[1]) for message in messages if (match := re.fullmatch(whole, message))]


def wait_until_pending(guests: Guests, name: str, count: int) -> None:
    deadline = time.monotonic() + 60
    while guests.get(name, "SerialPending") < count:
        assert time.monotonic() < deadline


def test_fields(guests: Guests) -> None:
    guests.linux("fields")
    guests.start("fields")
    entry = guests.type("fields", r"sh printf '\033[31mred\033[0m\033]0;title\007 \303\251 \377\n'", "red")
    assert entry["MESSAGE"] == "red é \ufffd"
    assert entry["SYSLOG_IDENTIFIER"] == "fields"
    assert entry["OBJECT_SYSTEMD_UNIT"] == "kvmd@fields.service"
    assert_complete(guests, "fields")


def test_a_prompt_appears_after_a_pause(guests: Guests) -> None:
    guests.linux("prompt")
    guests.start("prompt")
    since = guests.host.cursor()
    guests.host.run("sh", "-c", "echo 'sh printf login:; usleep 3000000; echo root' > /run/kvmd/prompt/serial.in")
    guests.wait("prompt", "^login:$", since)
    guests.wait("prompt", "^root$", since)
    assert_complete(guests, "prompt")


def test_flood_survives_kill_9(guests: Guests) -> None:
    """20,000 lines, the daemon killed again and again meanwhile, journald restarted once."""
    guests.linux("flood")
    guests.start("flood")
    since = guests.host.cursor()
    guests.host.run("sh", "-c", "echo 'flood 20000' > /run/kvmd/flood/serial.in")
    for line in (2000, 6000, 10000):
        guests.wait("flood", f"^flood {line:08d}", since, timeout=120)
        guests.host.run("systemctl", "kill", "--signal=KILL", "--kill-whom=main", "kvmd")
        guests.host.run("systemctl", "start", "kvmd")
    guests.wait("flood", "^flood 00014000", since, timeout=120)
    guests.host.run("systemctl", "restart", "systemd-journald")
    guests.wait("flood", "^flood 00020000", since, timeout=120)
    assert numbers([entry["MESSAGE"] for entry in guests.serial("flood")]) == list(range(1, 20001))


@pytest.mark.complaints("Failed at step EXEC", "Failed to locate executable")
def test_nothing_is_lost_while_there_is_no_daemon(guests: Guests) -> None:
    """A guest writes its last lines and ends between two daemons."""
    guests.linux("lonely")
    guests.start("lonely")
    guests.host.run("chmod", "-x", "/usr/bin/kvmd")
    guests.host.run("systemctl", "kill", "--signal=KILL", "--kill-whom=main", "kvmd")
    pid = guests.host.show("kvmd@lonely.service")["MainPID"]
    guests.host.run("sh", "-c", "printf 'flood 300\npoweroff\n' > /run/kvmd/lonely/serial.in")
    guests.host.run("tail", f"--pid={pid}", "-f", "/dev/null")
    guests.host.run("chmod", "+x", "/usr/bin/kvmd")
    guests.wait("lonely", "^guest: powering off")
    lines = [entry["MESSAGE"] for entry in guests.serial("lonely")]
    assert [line for line in lines if line.startswith("flood")] == [
        f"flood {number:08d} the quick brown fox jumps over the dog" for number in range(1, 301)
    ]


def test_without_log(guests: Guests) -> None:
    """What is not logged is taken all the same, or the guest would hang."""
    guests.linux("mute", last=48, extra="[serial]\nlog = false\n")
    guests.start("mute", ready=False)
    guests.host.run("ping", "-n", "-c", "1", "-w", "30", "192.0.2.48", netns="alice")
    since = guests.host.cursor()
    guests.host.run("sh", "-c", "printf '\nflood 3000\npoweroff\n' > /run/kvmd/mute/serial.in")
    guests.host.wait_journal("KVMD_GUEST=mute", message="Guest mute is off", since=since)
    assert guests.get("mute", "SerialBytes") > 3000 * 50
    assert guests.serial("mute") == []


def test_any_bytes(guests: Guests) -> None:
    guests.linux("bytes")
    guests.start("bytes")
    assert guests.type("bytes", r"sh printf 'a\000b\000\n'", "^ab$")
    assert guests.type("bytes", r"sh printf 'bad \377\303(\302\n'", "^bad ")["MESSAGE"] == "bad \ufffd\ufffd(\ufffd"
    assert guests.type("bytes", r"sh printf '\033[2J\033[1;1Hclear\033[\n'", "clear")["MESSAGE"] == "clear"
    progress = guests.type("bytes", r"sh for part in 10 50 100; do printf '\r%d%%' $part; done; echo", "100%$")
    assert progress["MESSAGE"] == " 10% 50% 100%"
    guests.type("bytes", r"sh head -c 200000 /dev/zero | tr '\000' x; echo end", "^x*end$")
    guests.type("bytes", r"""sh awk 'BEGIN { while (i++ < 20000) printf "\342\202\254" }'; echo end""", "^€*end$")
    messages = assert_complete(guests, "bytes")
    assert sum(message.count("x") for message in messages if message.startswith("xxx")) == 200000
    euros = [message for message in messages if message.startswith("€")]
    assert (sum(map(len, euros)), "".join(euros).count("\ufffd")) == (20003, 0)
    assert max(len(message.encode()) for message in messages) <= 16384


def test_journald_stalls(guests: Guests) -> None:
    """The guest waits, and ends before journald goes on: nothing is lost, no line is cut."""
    guests.linux("stall")
    guests.start("stall")
    since = guests.host.cursor()
    guests.host.run("systemctl", "kill", "--signal=STOP", "systemd-journald")
    try:
        guests.host.run("sh", "-c", "echo 'flood 20000' > /run/kvmd/stall/serial.in")
        wait_until_pending(guests, "stall", 256 << 10)
        spooled = int(guests.host.run("du", "-k", "/run/kvmd/stall/serial.spool").stdout.split()[0])
        ended = guests.host.popen("busctl", "call", "org.kvmd1", "/org/kvmd1/guest/stall", "org.kvmd1.Guest", "Stop")
        guests.host.run("tail", f"--pid={guests.get('stall', 'PID')}", "-f", "/dev/null")
    finally:
        guests.host.run("systemctl", "kill", "--signal=CONT", "systemd-journald")
    assert ended.wait(timeout=60) == 0
    assert spooled < 512
    found = numbers(assert_complete(guests, "stall"))
    assert len(found) > 3500
    assert found == list(range(1, len(found) + 1))
    notices = guests.host.journal(HELD_BACK, "KVMD_GUEST=stall", since=since)
    assert [re.sub(r"\d+", "N", notice["MESSAGE"]) for notice in notices] == [
        "Guest stall is held back, N KiB of its output wait: "
        "it prints faster than the journal takes it (nothing is lost)"
    ]


@pytest.mark.complaints("Guest given left something over: journald takes nothing", "timed out")
def test_a_stop_does_not_wait_for_a_dead_journald(guests: Guests) -> None:
    guests.linux("given")
    guests.start("given")
    since = guests.host.cursor()
    guests.host.run("systemctl", "kill", "--signal=STOP", "systemd-journald")
    try:
        guests.host.run("sh", "-c", "echo 'flood 20000' > /run/kvmd/given/serial.in")
        wait_until_pending(guests, "given", 256 << 10)
        guests.guest("given", "Terminate")
    finally:
        guests.host.run("systemctl", "kill", "--signal=CONT", "systemd-journald")
    left = guests.host.wait_journal("KVMD_GUEST=given", message="left something over", since=since)["MESSAGE"]
    assert (match := re.search(r"(\d+) bytes of its output are not logged", left))
    logged = sum(int(entry["KVMD_LENGTH"]) for entry in guests.serial("given"))
    assert logged + int(match[1]) == guests.get("given", "SerialBytes")


@pytest.mark.complaints("journald did not write what it was sent")
def test_a_daemon_that_starts_does_not_wait_for_a_dead_journald(guests: Guests) -> None:
    guests.linux("kept")
    guests.start("kept")
    since = guests.host.cursor()
    guests.host.run("systemctl", "kill", "--signal=STOP", "systemd-journald")
    try:
        guests.host.run("systemctl", "restart", "kvmd", timeout=40)
        assert guests.get("kept", "State") == "running"
    finally:
        guests.host.run("systemctl", "kill", "--signal=CONT", "systemd-journald")
    guests.type("kept", "echo and on", "^and on$")
    guests.host.wait_journal("-u", "kvmd", message="journald did not write what it was sent", since=since)
    assert_complete(guests, "kept")


def test_others_may_log_what_they_like(guests: Guests) -> None:
    """In a guest's name: it is no line of the guest, and nobody takes it for one."""
    guests.linux("forged", extra='[serial]\nready = "^guest: ready|^forged"\n')
    guests.start("forged")
    invocation = guests.serial("forged")[-1]["KVMD_INVOCATION_ID"]
    fields = f"KVMD_GUEST=forged\nKVMD_STREAM=serial\nKVMD_INVOCATION_ID={invocation}\nMESSAGE=forged\n"
    for offset in ("xyz", "999999999", "-5"):
        entry = f"{fields}KVMD_OFFSET={offset}\nKVMD_LENGTH=7\n"
        guests.host.run("setpriv", "--reuid=nobody", "logger", "--journald", input=entry)
    guests.host.run("journalctl", "--sync")
    guests.host.run("systemctl", "restart", "kvmd")
    guests.type("forged", "echo genuine", "^genuine$")
    path = "/org/kvmd1/guest/forged"
    log = guests.host.run("busctl", "call", "org.kvmd1", path, "org.kvmd1.Guest", "ReadLog", "t", "500").stdout
    assert '"genuine"' in log
    assert '"forged"' not in log


def test_a_flood_keeps_nobody_waiting(guests: Guests) -> None:
    """Three guests print endlessly; another one's line is in the journal at once, and D-Bus calls are answered."""
    guests.host.write(ROM, lab.guests.rom(2**32 - 1))
    guests.linux("quiet")
    guests.start("quiet")
    since = guests.host.cursor()
    floods = []
    for name in ("flood1", "flood2", "flood3"):
        guests.write(name, f'memory = "32M"\n[qemu]\nargs = ["-bios", "{ROM}"]\n')
        guests.start(name, ready=False)
        # An emulated guest is slow; this stands in for one under KVM.
        floods.append(guests.host.popen("sh", "-c", f"exec yes Give me a cookie > /run/kvmd/{name}/serial.out"))
        guests.host.wait_journal(HELD_BACK, f"KVMD_GUEST={name}", since=since)
    lines, calls = json.loads(guests.host.run("python3", "-c", LATENCY, "quiet", "20").stdout)
    pending = guests.get("flood1", "SerialPending")
    for flood in floods:
        flood.kill()
        flood.wait()
    print(f"lines {max(lines):.3f} s, calls {max(calls):.3f} s at most")
    assert max(lines) < 1
    assert max(calls) < 0.2
    assert pending > 128 << 10
    assert len(guests.host.journal(HELD_BACK, since=since)) == 3
    guests.host.run("rm", ROM)


@pytest.fixture
def full_run(guests: Guests) -> Iterator[str]:
    """A file; whoever writes to it until there is no room has filled /run."""
    used = int(guests.host.run("df", "--output=used", "-k", "/run").stdout.split()[1])
    guests.host.run("mount", "-o", f"remount,size={used + 1024}k", "/run")
    yield "/run/filler"
    guests.host.run("rm", "-f", "/run/filler")
    guests.host.run("mount", "-o", "remount,size=20%", "/run")


def fill(guests: Guests, file: str) -> None:
    done = guests.host.run("dd", "if=/dev/zero", f"of={file}", "bs=4k", check=False)
    assert "No space left on device" in done.stderr


def test_no_room_in_run(guests: Guests, full_run: str) -> None:
    guests.linux("cramped")
    guests.start("cramped")
    since = guests.host.cursor()
    fill(guests, full_run)
    guests.host.run("sh", "-c", "echo 'flood 10000' > /run/kvmd/cramped/serial.in")
    notice = guests.host.wait_journal(HELD_BACK, "KVMD_GUEST=cramped", since=since)
    assert "cannot write /run/kvmd/cramped/serial.spool: No space left on device" in notice["MESSAGE"]
    guests.host.run("rm", full_run)
    guests.wait("cramped", "^flood 00010000", since)
    assert numbers(assert_complete(guests, "cramped")) == list(range(1, 10001))


@pytest.mark.complaints("could not be started")
def test_a_start_without_room_in_run(guests: Guests, full_run: str) -> None:
    guests.linux("roomless")
    fill(guests, full_run)
    failed = guests.call("StartGuest", "s", "roomless", check=False)
    assert "cannot write /run/kvmd/roomless/guest.toml: No space left on device" in failed.stderr
    assert guests.host.run("ls", "/run/kvmd/roomless", check=False).returncode != 0
    guests.host.run("rm", full_run)
    guests.start("roomless")


def test_an_installer_that_paints(guests: Guests) -> None:
    """Progress by carriage return, a full screen, 100 kB without an end: few entries, and text."""
    guests.linux("paints")
    guests.start("paints")
    since = guests.host.cursor()
    painting = (
        "i=0; while [ $i -lt 40 ]; do i=$((i + 1)); printf '%s of 40 done\\r' $i; usleep 50000; done; echo; "
        "printf '\\033%%G\\033[2J\\033[1;1H\\033(0lqqk\\033(B Install \\000\\351t\\351 <OK>\\n'; "
        "head -c 100000 /dev/zero | tr '\\000' x; echo; echo painted"
    )
    guests.type("paints", f"sh {painting}", "^painted")
    lines = [entry["MESSAGE"] for entry in guests.host.journal("KVMD_GUEST=paints", "KVMD_STREAM=serial", since=since)]
    progress = [line for line in lines if "of 40 done" in line]
    assert 1 <= len(progress) <= 4
    assert "40 of 40 done" in progress[-1]
    assert any(line.endswith("Install \ufffdt\ufffd <OK>") for line in lines)
    assert sum(map(len, (line for line in lines if line.startswith("xxx")))) == 100_000
    assert all(line.isprintable() or "\ufffd" in line for line in lines)
    text = guests.host.run("journalctl", "_UID=0", "KVMD_GUEST=paints", "-o", "cat", "--no-pager").stdout
    assert "blob data" not in text
    assert "\x1b" not in text
