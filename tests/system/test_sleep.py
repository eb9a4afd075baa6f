"""Guests that are on and stand still, by [qemu] args, asleep, for a disk that is full or failed: Resume, and stop."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .guests import Guests

SMALL = "/var/lib/kvmd/images/small"
FULL = f"disk full: {SMALL}/sparse.raw"
DISK = '[[disk]]\npath = "small/sparse.raw"\nformat = "raw"\n'
FILL = "sh dd if=/dev/zero of=/dev/vda bs=1M count=24 conv=fsync 2>/dev/null && echo filled"
# Its first write fails.
BROKEN = """[qemu]
args = [
  "-blockdev", "driver=null-co,node-name=nothing,size=16777216",
  "-blockdev", "driver=blkdebug,node-name=bad,image=nothing,%s",
  "-device", "virtio-blk-pci,drive=bad,werror=%s",
]
"""
ONCE = ",".join(f"inject-error.0.{word}" for word in ("event=none", "iotype=write", "once=on"))


def reason(guests: Guests, name: str) -> tuple[str, str]:
    return guests.get(name, "State"), guests.get(name, "StateReason")


@pytest.fixture
def small(guests: Guests) -> Iterator[Guests]:
    """A file system of 16 MiB with an image of 64 MiB on it."""
    host = guests.host
    host.run("mkdir", "-p", SMALL)
    host.run("mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", SMALL)
    host.run("truncate", "-s", "64M", f"{SMALL}/sparse.raw")
    yield guests
    for name in guests.names:
        guests.guest_off(name)
    host.run("umount", SMALL)
    host.run("rmdir", SMALL)


def fill(guests: Guests, name: str) -> str:
    """Returns once the guest stands still; a cursor before."""
    since = guests.host.cursor()
    guests.host.run("sh", "-c", f'echo "{FILL}" >/run/kvmd/{name}/serial.in')
    said = guests.host.wait_journal("MESSAGE_ID=6f1c0a1f6d5d4c0e9d5f0b6f8f3c2a0f", since=since)
    assert (said["MESSAGE"], said["KVMD_GUEST"]) == (f"Guest {name} stands still: {FULL}", name)
    guests.until(name, "StateReason", FULL)
    return since


@pytest.mark.complaints("stands still")
def test_a_full_disk(small: Guests) -> None:
    small.linux("fat", extra=DISK)
    small.start("fat")
    assert reason(small, "fat") == ("running", "")
    since = fill(small, "fat")
    assert reason(small, "fat") == ("paused", FULL)
    refused = small.guest("fat", "Resume", check=False)
    assert f"guest fat stands still: {FULL} (make room, then resume it)" in refused.stderr
    assert reason(small, "fat") == ("paused", FULL)
    small.host.run("systemctl", "restart", "kvmd")
    small.until("fat", "StateReason", FULL)
    assert small.get("fat", "State") == "paused"
    assert "make room" in small.guest("fat", "Resume", check=False).stderr
    small.host.run("mount", "-o", "remount,size=64m", SMALL)
    small.guest("fat", "Resume")
    assert reason(small, "fat") == ("running", "")
    small.wait("fat", "^filled", since)
    small.host.run("systemctl", "stop", "kvmd@fat")
    assert small.get("fat", "Result") == "success"


@pytest.mark.complaints("stands still", "cannot power off")
@pytest.mark.parametrize("restarted", [False, True])
def test_a_stop_while_the_disk_is_full(small: Guests, restarted: bool) -> None:
    """Not `cont` into the same error for as long as stop_timeout."""
    small.linux("fat", extra=DISK)
    small.start("fat")
    since = fill(small, "fat")
    if restarted:
        small.host.run("systemctl", "restart", "kvmd")
    small.host.run("systemctl", "stop", "kvmd@fat", timeout=10)
    small.host.wait_journal("KVMD_GUEST=fat", message=f"cannot power off .{FULL}", since=since)
    off = small.host.wait_journal("KVMD_GUEST=fat", message="Guest fat is off .timeout.", since=since)
    assert off["MESSAGE_ID"] == "6f1c0a1f6d5d4c0e9d5f0b6f8f3c2a0b"
    assert reason(small, "fat") == ("stopped", "")


@pytest.mark.complaints("stands still")
def test_a_stop_when_there_is_room_again(small: Guests) -> None:
    small.linux("fat", extra=DISK)
    small.start("fat")
    since = fill(small, "fat")
    small.host.run("mount", "-o", "remount,size=64m", SMALL)
    small.host.run("systemctl", "stop", "kvmd@fat")
    small.wait("fat", "guest: powering off", since)
    assert small.get("fat", "Result") == "success"


@pytest.mark.complaints("disk failed: bad")
@pytest.mark.parametrize("policy", ["report", "stop"])
def test_a_disk_that_fails(guests: Guests, policy: str) -> None:
    guests.linux("broken", extra=BROKEN % (ONCE, policy))
    guests.start("broken")
    since = guests.host.cursor()
    write = "dd if=/dev/zero of=/dev/vda bs=512 count=1 conv=fsync 2>/dev/null && echo written || echo told"
    guests.host.run("sh", "-c", f'echo "sh {write}" >/run/kvmd/broken/serial.in')
    said = guests.host.wait_journal("MESSAGE_ID=6f1c0a1f6d5d4c0e9d5f0b6f8f3c2a0f", since=since)["MESSAGE"]
    if policy == "report":
        assert said == "Guest broken was told of an error: disk failed: bad (Input/output error)"
        guests.wait("broken", "^told", since)
        assert reason(guests, "broken") == ("running", "")
        return
    assert said == "Guest broken stands still: disk failed: bad (Input/output error)"
    guests.until("broken", "StateReason", "disk failed: bad (Input/output error)")
    guests.guest("broken", "Resume")
    guests.wait("broken", "^written", since)
    assert reason(guests, "broken") == ("running", "")


@pytest.mark.parametrize("how", ["Resume", "Resume by another daemon", "stop"])
def test_asleep(guests: Guests, how: str) -> None:
    """With the kernel as Debian packs it: the unpacked one, started by PVH, is reset when it wakes.

    On an emulated q35 Linux has no ACPI interrupts any more after it has slept: it hears no power button.
    """
    guests.linux("tired", top='machine = "pc"')
    guests.write("tired", guests.host.read("/etc/kvmd/tired.toml").replace("vmlinux", "vmlinuz"))
    guests.start("tired")
    since = guests.host.cursor()
    guests.host.run("sh", "-c", "echo 'sh echo mem >/sys/power/state; echo awake' >/run/kvmd/tired/serial.in")
    guests.until("tired", "StateReason", "asleep (ACPI S3)")
    assert guests.get("tired", "State") == "paused"
    if how == "stop":
        guests.host.run("systemctl", "stop", "kvmd@tired")
        guests.wait("tired", "guest: powering off", since)
        assert guests.get("tired", "Result") == "success"
        return
    if how != "Resume":
        guests.host.run("systemctl", "restart", "kvmd")
        guests.until("tired", "StateReason", "asleep (ACPI S3)")
    guests.guest("tired", "Resume")
    guests.wait("tired", "^awake", since)
    assert reason(guests, "tired") == ("running", "")


def test_not_begun(guests: Guests) -> None:
    since = guests.host.cursor()
    guests.linux("later", extra='[qemu]\nargs = ["-S"]\n')
    guests.start("later", ready=False)
    assert reason(guests, "later") == ("paused", "")
    guests.guest("later", "Resume")
    assert reason(guests, "later") == ("running", "")
    guests.wait("later", "^guest: ready later", since)


def test_why_it_has_stopped_is_asked(guests: Guests) -> None:
    """QEMU's event does not say it."""
    guests.linux("over", extra='[qemu]\nargs = ["-no-shutdown"]\n')
    guests.start("over")
    guests.type("over", "poweroff", "guest: powering off")
    guests.until("over", "StateReason", "it has powered off (-no-shutdown)")
    assert guests.get("over", "State") == "paused"
