"""Guests are apart: what a QEMU that was broken into can reach of another one, of the host, of the system bus.

Tried from within: the attempts run as the very process that is QEMU a moment later, before its own sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import lab
import pytest

from .guests import RELEASES, Guests

QEMU = "/usr/bin/qemu-system-x86_64"
ATTEMPTS = Path(__file__).with_name("attempts.py")


@pytest.fixture(scope="module", params=RELEASES)
def guests(request: pytest.FixtureRequest, deb: Path) -> Iterator[Guests]:
    with lab.Host(request.param, deb, name=f"apart-{request.param}") as host:
        host.make_lan()
        host.write("/usr/local/lib/attempts.py", ATTEMPTS.read_text(), mode=0o755)
        yield Guests(host)


def user_of(guests: Guests, name: str) -> int:
    pid = guests.get(name, "PID")
    return int(guests.host.run("stat", "-c", "%u", f"/proc/{pid}/fd").stdout)


def test_a_qemu_reaches_nothing_of_another(guests: Guests) -> None:
    host = guests.host
    host.run("cp", "/var/lib/kvmd/images/vmlinux", "/srv/secret-kernel")
    host.run("chmod", "600", "/srv/secret-kernel")
    host.run("truncate", "-s", "1M", "/var/lib/kvmd/images/public.raw")
    host.run("chmod", "644", "/var/lib/kvmd/images/public.raw")
    disks = '[[disk]]\npath = "vault.qcow2"\nsize = "1M"\n[[disk]]\npath = "public.raw"\nformat = "raw"\n'
    own = "[tpm]\nenabled = true\n"
    guests.linux("vault", last=50, top="cpus = 2", extra=disks + own)
    text = host.read("/etc/kvmd/vault.toml").replace('kernel = "vmlinux"', 'kernel = "/srv/secret-kernel"')
    guests.write("vault", text)
    host.run("chmod", "600", "/etc/kvmd/vault.toml")
    guests.start("vault")

    tpm = int(host.read("/sys/fs/cgroup/machine.slice/kvtpm-vault.scope/cgroup.procs"))
    aim = {"pid": guests.get("vault", "PID"), "tap": "kv-vault", "uid": user_of(guests, "vault"), "tpm": tpm}
    host.write("/usr/local/lib/attempts.json", json.dumps(aim))
    host.run("mv", QEMU, f"{QEMU}.real")
    host.run("cp", "/usr/local/lib/attempts.py", QEMU)
    try:
        guests.linux("thief", top='firmware = "uefi"', extra=own)
        guests.start("thief", ready=False)
    finally:
        host.run("mv", f"{QEMU}.real", QEMU)
    host.wait_journal("KVMD_GUEST=thief", "KVMD_STREAM=qemu", message="^attempts: done")
    lines = [entry["MESSAGE"].split(": ") for entry in host.journal("KVMD_GUEST=thief", "KVMD_STREAM=qemu")]
    tried = {line[1]: line[2] for line in lines if line[0] == "attempt"}
    assert len(tried) > 90
    refusals = ("EACCES", "EPERM", "ENOENT", "ESRCH", "EISDIR")
    assert {what: how for what, how in tried.items() if how not in refusals} == {"attach to its tap 0": "EINVAL"}
    assert {line[2] for line in lines if line[0] == "control"} == {"done"}
    assert user_of(guests, "thief") != user_of(guests, "vault")
    guests.clear()


def test_a_guest_keeps_its_user_and_its_name(guests: Guests) -> None:
    host = guests.host
    long = "a-name-that-is-longer-than-a-user-may-have"
    for name in ("one", long):
        guests.linux(name)
        guests.start(name, ready=False)
    uid = user_of(guests, "one")
    assert host.run("ps", "-o", "user:40=", "-p", str(guests.get("one", "PID"))).stdout.strip() == "kv-one"
    assert host.run("getent", "passwd", str(uid)).stdout.startswith("kv-one:")
    assert host.run("getent", "group", "kv-one").stdout.split(":")[2] == str(uid)
    user = host.run("ps", "-o", "user:40=", "-p", str(guests.get(long, "PID"))).stdout.strip()
    assert user.startswith("kv-a-name-that-is-longer")
    assert len(user) == 31

    since = host.cursor()
    host.run("systemctl", "kill", "--signal=KILL", "--kill-whom=main", "kvmd")
    host.wait_journal("KVMD_GUEST=one", message="was running already", since=since)
    assert user_of(guests, "one") == uid
    guests.linux("two")
    guests.start("two", ready=False)
    assert user_of(guests, "two") not in (uid, user_of(guests, long))
    host.run("systemctl", "restart", "kvmd@one")
    assert user_of(guests, "one") == uid

    guests.clear()
    assert host.run("getent", "passwd", str(uid), check=False).returncode == 2
    assert host.run("ls", "/run/userdb").stdout == ""


def test_no_numbers_no_guest(guests: Guests) -> None:
    host = guests.host
    guests.linux("nobody")
    kept = host.read("/etc/subuid")
    host.run("sed", "-i", "/^kvmd-qemu:/d", "/etc/subuid")
    refused = guests.call("StartGuest", "s", "nobody", check=False)
    assert "there are no users for guests: /etc/subuid has no usable line of kvmd-qemu" in refused.stderr
    host.write("/etc/subuid", kept)
    guests.start("nobody", ready=False)
    guests.clear()
