"""A TPM of the guest's own: its log, registers and memory as a Linux guest reads them, and what ends it."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import lab
import pytest

from .guests import Guests, mostly

# A kernel that unpacks itself: UEFI wants one, and with another QEMU lays the initrd over ACPI tables that name a TPM.
GUEST = f"""memory = "160M"
stop_timeout = "20s"
firmware = "{{}}"
[boot]
kernel = "vmlinuz"
initrd = "initrd.img"
cmdline = "{lab.guests.CMDLINE} kvmd.name=safe"
[tpm]
enabled = true
"""
IDLE = 'memory = "32M"\naccelerator = "tcg"\n[tpm]\nenabled = true\n'
HOLD = """
import fcntl, os, signal, sys
file = open(sys.argv[1], "r+")
fcntl.lockf(file, fcntl.LOCK_EX)
print(os.getpid(), flush=True)
signal.pause()
"""
STATE = "/var/lib/kvmd/{}/tpm"
OWNER, INDEX, PCR = 0x40000001, 0x01500001, 16
PASSWORD = struct.pack(">IIHBH", 9, 0x40000009, 0, 0, 0)  # nobody has set one


@pytest.fixture(scope="module", params=mostly("trixie"))
def host(request: pytest.FixtureRequest, deb: Path) -> Iterator[lab.Host]:
    with lab.Host(request.param, deb, name=f"tpm-{request.param}") as host:
        host.make_lan()
        yield host


@pytest.fixture
def guests(host: lab.Host) -> Iterator[Guests]:
    """Nothing is left of them, but what they keep; this test knows what that is."""
    guests = Guests(host)
    yield guests
    guests.clear()
    assert left_over(guests) == []
    kept = {name: host.run("ls", f"/var/lib/kvmd/{name}").stdout.split() for name in guests.names}
    assert all("tpm" in names and "disks" not in names for names in kept.values()), kept
    host.run("rm", "-r", *(f"/var/lib/kvmd/{name}" for name in kept))


def left_over(guests: Guests) -> list[str]:
    """Of guests that are off."""
    run = guests.host.run("ls", "/run/kvmd", "/run/userdb").stdout.split()
    units = [unit for unit in guests.host.units() if unit.startswith("kvtpm-")]
    return [word for word in run if word not in ("/run/kvmd:", "/run/userdb:", "sysctl.json")] + units


def ask(guests: Guests, code: int, *handles: int, data: bytes = b"") -> str:
    """What the TPM answers to a command (TPM 2.0 Library, part 3), as hexadecimal digits without the header."""
    body = b"".join(struct.pack(">I", handle) for handle in handles) + (PASSWORD if handles else b"") + data
    command = struct.pack(">HII", 0x8002 if handles else 0x8001, 10 + len(body), code) + body
    octal = "".join(f"\\{byte:03o}" for byte in command)
    line = f"sh exec 3<>/dev/tpm0; printf '{octal}' >&3; echo tpm: $(head -c 999 <&3 | hexdump -ve '1/1 \"%02x\"')"
    answer = guests.type("safe", line, "^tpm: ")["MESSAGE"].removeprefix("tpm: ")
    assert answer[12:20] == "00000000", answer
    return answer[20:]


def clock(guests: Guests) -> int:
    """How often the TPM was switched on (resetCount of TPM2_ReadClock)."""
    return int(ask(guests, 0x181)[32:40], 16)


def pcr(guests: Guests) -> str:
    return ask(guests, 0x17E, data=struct.pack(">IHB3s", 1, 0x000B, 3, (1 << PCR).to_bytes(3, "little")))[-64:]


def define_and_write(guests: Guests, value: bytes) -> None:
    public = struct.pack(">IHIHH", INDEX, 0x000B, 0x02060006, 0, len(value))
    ask(guests, 0x12A, OWNER, data=struct.pack(">HH", 0, len(public)) + public)
    command = struct.pack(">H", len(value)) + value + bytes(2)
    ask(guests, 0x137, OWNER, INDEX, data=command)


def event_log(guests: Guests) -> str:
    """What the firmware has measured: the letters and digits of it."""
    log = "/sys/kernel/security/tpm0/binary_bios_measurements"
    words = f"sh mount -t securityfs none /sys/kernel/security; echo log: $(tr -cd '[:alnum:] ' <{log})"
    found = guests.type("safe", words, "^log: ")["MESSAGE"]
    assert "Spec ID Event03" in found
    return found


def swtpm(guests: Guests, name: str) -> int:
    """Its process, alone in its scope."""
    [pid] = guests.host.read(f"/sys/fs/cgroup/machine.slice/kvtpm-{name}.scope/cgroup.procs").split()
    return int(pid)


def test_a_guest_has_a_tpm_that_stays(guests: Guests) -> None:
    host = guests.host
    guests.write("safe", GUEST.format("uefi"))
    since = host.cursor()
    guests.start("safe", ready=False)
    pid, qemu = swtpm(guests, "safe"), guests.get("safe", "PID")
    status = dict(line.split(":\t", 1) for line in host.read(f"/proc/{pid}/status").splitlines() if ":\t" in line)
    uid = status["Uid"].split()[0]
    assert {*status["Uid"].split(), *status["Gid"].split()} == {uid}
    assert uid != host.run("stat", "-c", "%u", f"/proc/{qemu}/fd").stdout.strip()
    assert (status["Seccomp"], status["NoNewPrivs"], int(status["CapEff"], 16)) == ("2", "1", 0)
    assert host.run("getent", "passwd", uid).stdout.startswith("kvtpm-safe:")
    assert host.run("stat", "-c", "%U %a", STATE.format("safe")).stdout == "kvtpm-safe 700\n"
    assert not [word for word in host.run("ls", "-l", f"/proc/{qemu}/fd").stdout.split() if "/tpm" in word]

    guests.wait("safe", "^guest: ready safe", since, timeout=120)
    uefi = event_log(guests)
    assert "Boot0000" in uefi or "BootOrder" in uefi, uefi
    starts, fresh = clock(guests), pcr(guests)
    ask(guests, 0x182, PCR, data=struct.pack(">IH", 1, 0x000B) + b"extended".ljust(32))
    extended = pcr(guests)
    assert extended != fresh
    define_and_write(guests, b"kept-key")
    since = host.cursor()
    host.run("systemctl", "kill", "--signal=KILL", "--kill-whom=main", "kvmd")
    host.wait_journal("KVMD_GUEST=safe", message="was running already", since=since)
    assert swtpm(guests, "safe") == pid
    assert pcr(guests) == extended

    guests.write("safe", GUEST.format("bios"))
    host.run("systemctl", "restart", "kvmd@safe")
    guests.wait("safe", "^guest: ready safe", since, timeout=60)
    assert "Start Option ROM Scan" in event_log(guests)
    read = struct.pack(">HH", 8, 0)
    assert b"kept-key".hex() in ask(guests, 0x14E, OWNER, INDEX, data=read)
    assert clock(guests) == starts + 1
    assert pcr(guests) == fresh
    host.run("systemctl", "stop", "kvmd@safe")
    assert left_over(guests) == []
    assert "Guest safe has lost its TPM" not in "".join(entry["MESSAGE"] for entry in host.journal("KVMD_GUEST=safe"))


def test_a_lost_tpm_is_told_at_once_and_ends_the_guest_at_its_reset(guests: Guests) -> None:
    """Also where an earlier daemon started it, and where it was lost while there was none."""
    host = guests.host
    guests.write("poor", IDLE)
    guests.start("poor", ready=False)
    host.run("systemctl", "restart", "kvmd")
    since = host.cursor()
    host.run("kill", "-9", str(swtpm(guests, "poor")))
    lost = host.wait_journal("KVMD_GUEST=poor", message="Guest poor has lost its TPM", since=since)
    assert lost["MESSAGE"].endswith("ends at its next reset (systemctl restart kvmd@poor)")
    assert lost["PRIORITY"] == "4"
    assert guests.get("poor", "State") == "running"
    guests.guest("poor", "Reset", check=False)
    host.wait_journal("KVMD_GUEST=poor", message="Guest poor failed: its TPM, swtpm, was killed", since=since)
    guests.until("poor", "Result", "crashed")

    guests.start("poor", ready=False)
    host.run("systemctl", "stop", "kvmd")
    host.run("kill", "-9", str(swtpm(guests, "poor")))
    since = host.cursor()
    host.run("systemctl", "start", "kvmd")
    host.wait_journal("KVMD_GUEST=poor", message="Guest poor has lost its TPM", since=since)
    guests.guest_off("poor")
    guests.start("poor", ready=False)
    assert swtpm(guests, "poor")
    pid = guests.get("poor", "PID")
    since = host.cursor()
    host.run("kill", "-9", str(pid))
    host.wait_journal("KVMD_GUEST=poor", message="Guest poor failed: QEMU was killed or crashed", since=since)
    assert not [entry for entry in host.journal("KVMD_GUEST=poor", since=since) if "its TPM" in entry["MESSAGE"]]
    assert left_over(guests) == []


def refusal(guests: Guests, name: str) -> str:
    refused = guests.call("StartGuest", "s", name, check=False)
    assert refused.returncode
    assert left_over(guests) == []
    return str(refused.stderr)


def test_what_can_be_wrong_with_its_state(guests: Guests) -> None:
    host, state = guests.host, STATE.format("odd")
    guests.write("odd", IDLE)
    host.run("mv", "/usr/bin/swtpm", "/usr/bin/swtpm.gone")
    assert "there is no swtpm to be the guest's TPM (install swtpm)" in refusal(guests, "odd")
    host.run("mv", "/usr/bin/swtpm.gone", "/usr/bin/swtpm")

    host.run("mkdir", "-p", state)
    host.run("mount", "-t", "tmpfs", "-o", "size=4k", "none", state)
    host.run("sh", "-c", f"head -c 4096 /dev/zero > {state}/full")
    assert f"cannot use the TPM's state {state}: No space left on device" in refusal(guests, "odd")
    host.run("mount", "-o", "remount,ro", state)
    assert f"cannot use the TPM's state {state}: Read-only file system" in refusal(guests, "odd")
    host.run("umount", state)

    guests.write("odd", f'{IDLE}[qemu]\nargs = ["-no-such-option"]\n')
    assert "QEMU refused: -no-such-option: invalid option" in refusal(guests, "odd")
    guests.write("odd", IDLE)
    guests.start("odd", ready=False)
    guests.guest_off("odd")
    holder = host.popen("python3", "-c", HOLD, f"{state}/.lock")
    assert holder.stdout
    pid = holder.stdout.readline().strip()
    said = refusal(guests, "odd")
    assert f"cannot use the TPM's state {state}: process {pid} has it in use (kill {pid}, if it is a swtpm" in said
    holder.kill()
    holder.wait()
    host.run("ln", "-s", "/etc/shadow", f"{state}/link")
    assert f"cannot use the TPM's state {state}: " in refusal(guests, "odd")
    host.run("rm", f"{state}/link")
    host.run("ln", "/etc/passwd", f"{state}/hard")
    assert "hard in it is not a file, or has another name besides (remove it)" in refusal(guests, "odd")
    assert host.run("stat", "-c", "%u", "/etc/passwd").stdout == "0\n"

    host.run("sh", "-c", f"rm -r {state}/*")
    since = host.cursor()
    guests.start("odd", ready=False)
    host.wait_journal("KVMD_GUEST=odd", message=f"what its TPM had kept in {state} has gone", since=since)


def test_the_host_goes_down(host: lab.Host) -> None:
    """The guest, which may need its TPM for that, before the TPM. No test comes after this one."""
    guests = Guests(host)
    guests.write("safe", GUEST.format("bios"))
    guests.start("safe")
    host.poweroff()
    journal = host.directory / "root/var/log/journal"
    command = ["journalctl", f"--directory={journal}", "-q", "-o", "cat", "-b", "KVMD_GUEST=safe"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert "guest: powering off" in lines
    assert lines[-1] == "Guest safe is off (success)"
    assert not [line for line in lines if "lost its TPM" in line or line.startswith("swtpm")]
