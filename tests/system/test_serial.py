"""Serial output in the journal: all fields, each line once and in order, whatever happens to the daemon."""

from __future__ import annotations

import re

import pytest

from .guests import Guests


def test_fields(guests: Guests) -> None:
    guests.linux("fields")
    guests.start("fields")
    entry = guests.type("fields", r"sh printf '\033[31mred\033[0m\033]0;title\007 \303\251 \377\n'", "red")
    assert entry["MESSAGE"] == "red é \ufffd"
    assert entry["SYSLOG_IDENTIFIER"] == "fields"
    assert entry["OBJECT_SYSTEMD_UNIT"] == "kvmd@fields.service"
    entries = guests.serial("fields")
    position = 0
    for entry in entries:
        assert int(entry["KVMD_OFFSET"]) == position
        position += int(entry["KVMD_LENGTH"])
    assert position == guests.get("fields", "SerialBytes")


def test_a_prompt_appears_after_a_pause(guests: Guests) -> None:
    guests.linux("prompt")
    guests.start("prompt")
    since = guests.host.cursor()
    guests.host.run("sh", "-c", "echo 'sh printf login:; usleep 3000000; echo root' > /run/kvmd/prompt/serial.in")
    guests.wait("prompt", "^login:$", since)
    guests.wait("prompt", "^root$", since)


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
    numbers = [
        int(match[1]) for entry in guests.serial("flood") if (match := re.match(r"flood (\d+)", entry["MESSAGE"]))
    ]
    assert numbers == list(range(1, 20001))


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
