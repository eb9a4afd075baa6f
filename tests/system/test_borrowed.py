"""What a guest has of the host: directories by virtiofsd, and the guest agent's channel."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import lab
import pytest

from .guests import Guests, mostly

IMAGES = "var/lib/kvmd/images"
SHARED = '[[share]]\npath = "/srv/shared"\ntag = "data"\n'
ABSENT = '[[usb]]\ndevice = "046d:c52b"\n'


@pytest.fixture(scope="module", params=mostly("trixie"))
def host(request: pytest.FixtureRequest, deb: Path) -> Iterator[lab.Host]:
    with lab.Host(request.param, deb, name=f"borrowed-{request.param}") as host:
        host.make_lan()
        yield host


@pytest.fixture
def guests(host: lab.Host) -> Iterator[Guests]:
    guests = Guests(host)
    yield guests
    guests.clear()
    assert host.run("ls", "/run/kvmd").stdout.split() in ([], ["sysctl.json"])
    assert [unit for unit in host.units() if unit.startswith("kvshare-")] == []


def refusal(guests: Guests, name: str) -> str:
    refused = guests.call("StartGuest", "s", name, check=False)
    assert refused.returncode
    return str(refused.stderr)


def test_a_guest_reads_a_directory_and_cannot_write(guests: Guests) -> None:
    """Two have the same one; it outlives the daemon; virtiofsd is nobody, and its loss is told once."""
    host = guests.host
    host.run("mkdir", "-p", "/srv/shared/sub")
    host.write("/srv/shared/file", "of the host\n")
    host.run("chmod", "777", "/srv/shared")
    host.run("ln", "-sfn", "/srv/shared", "/srv/link")
    for name in ("one", "two"):
        shared = SHARED if name == "one" else SHARED.replace("/srv/shared", "/srv/link")
        guests.linux(name, cmdline="kvmd.share=data", extra=shared)
    guests.start("one", "two")
    for name in ("one", "two"):
        assert guests.type(name, "sh cat /share/file", "of the host")
        assert guests.type(name, "sh touch /share/new && echo written || echo not written", "^not written$")
    host.write("/srv/shared/sub/later", "changed\n")
    guests.type("one", "sh cat /share/sub/later", "^changed$")

    unit = "kvshare-0-one.service"
    pid = host.show(unit)["MainPID"]
    status = dict(line.split(":\t", 1) for line in host.read(f"/proc/{pid}/status").splitlines() if ":\t" in line)
    assert "0" not in status["Uid"].split() + status["Gid"].split()
    assert (status["Seccomp"], status["NoNewPrivs"], int(status["CapEff"], 16)) == ("2", "1", 0)
    assert host.run("ls", "/srv/shared").stdout.split() == ["file", "sub"]

    since = host.cursor()
    host.run("systemctl", "kill", "--signal=KILL", "--kill-whom=main", "kvmd")
    host.wait_journal("KVMD_GUEST=one", message="was running already", since=since)
    guests.type("one", "sh cat /share/file", "of the host")
    host.run("systemctl", "stop", "kvmd@two")
    host.run("kill", "-9", str(pid))
    lost = host.wait_journal("KVMD_GUEST=one", message="Guest one has lost /srv/shared", since=since)
    assert lost["MESSAGE"].endswith("its virtiofsd has ended (systemctl restart kvmd@one)")
    guests.guest_off("one")
    guests.start("one")
    guests.type("one", "sh cat /share/file", "of the host")
    host.run("systemctl", "stop", "kvmd@one")
    told = [entry["MESSAGE"] for entry in host.journal("KVMD_GUEST=one", since=since) if "lost" in entry["MESSAGE"]]
    assert len(told) == 1
    assert not [entry for entry in host.journal("KVMD_GUEST=two", since=since) if "lost" in entry["MESSAGE"]]


def test_a_guest_writes_as_a_user_of_the_host(guests: Guests) -> None:
    """Where virtiofsd can do that without being root."""
    host = guests.host
    host.run("useradd", "alice", check=False)
    host.run("install", "-d", "-o", "alice", "-m", "700", "/srv/alices")
    share = '[[share]]\npath = "/srv/alices"\ntag = "data"\nreadonly = false\nuser = "alice"\n'
    guests.linux("writer", cmdline="kvmd.share=data", extra=share)
    if host.release == "bookworm":
        assert "only as root, which it is not (remove readonly = false, or use Debian 13)" in refusal(guests, "writer")
        return
    guests.start("writer")
    guests.type("writer", "sh echo by the guest >/share/new && chown 12:12 /share/new; echo done", "^done$")
    assert host.run("stat", "-c", "%U", "/srv/alices/new").stdout == "alice\n"
    assert host.read("/srv/alices/new") == "by the guest\n"


def test_what_can_be_wrong_with_what_is_borrowed(guests: Guests) -> None:
    host = guests.host
    guests.write("odd", SHARED.replace("/srv/shared", "/srv/nowhere"))
    assert "cannot open the shared directory /srv/nowhere: No such file or directory" in refusal(guests, "odd")
    guests.write("odd", SHARED.replace("/srv/shared", "/etc/passwd"))
    assert "cannot use the shared directory /etc/passwd: it is not a directory" in refusal(guests, "odd")
    guests.write("odd", f'{SHARED}user = "nobodys"\n')
    assert "there is no user nobodys to share a directory with" in refusal(guests, "odd")
    for program in ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd"):
        host.run("mv", program, f"{program}.gone", check=False)
    guests.write("odd", SHARED.replace("/srv/shared", "/srv"))
    assert "there is no virtiofsd to share /srv (install virtiofsd)" in refusal(guests, "odd")
    for program in ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd"):
        host.run("mv", f"{program}.gone", program, check=False)
    guests.write("odd", ABSENT)
    assert "there is no USB device 046d:c52b" in refusal(guests, "odd")
    guests.write("odd", '[[pci]]\naddress = "ffff:03:00.0"\n')
    assert "there is no PCI device ffff:03:00.0 (lspci -D lists them)" in refusal(guests, "odd")
    guests.write("odd", "")
    guests.start("odd", ready=False)
    for method in ("AgentAddresses", "ThawFileSystems"):
        refused = guests.guest("odd", method, check=False)
        assert "guest odd has no channel to an agent (enabled = true under [agent] makes one at its" in refused.stderr


def test_the_agent_of_a_guest(guests: Guests) -> None:
    """Says its addresses, freezes and thaws by itself, over a restart of the daemon, and shuts down a deaf guest."""
    host = guests.host
    shutil.copy(lab.guests.agent_initrd(host.release), host.directory / "root" / IMAGES / "agent.img")
    image = host.directory / "root" / IMAGES / "frozen.raw"
    subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", image, "8M"], check=True)
    disk = '[[disk]]\npath = "frozen.raw"\nformat = "raw"\n[agent]\nenabled = true\n'
    guests.linux("deaf", last=42, cmdline="kvmd.deaf=1 kvmd.agent=1", initrd="agent.img", extra=disk)
    guests.start("deaf")
    [addresses] = guests.guest("deaf", "AgentAddresses")
    assert {"192.0.2.42", "2001:db8:1::42"} <= set(addresses)
    assert "127.0.0.1" not in addresses

    guests.type("deaf", "sh mkdir /m; mount -t ext4 /dev/vda /m && echo mounted", "^mounted$")
    assert guests.guest("deaf", "FreezeFileSystems", "t", "300") == [1]
    assert "frozen already" in guests.guest("deaf", "FreezeFileSystems", "t", "300", check=False).stderr
    guests.type("deaf", "sh (echo x >/m/x; echo thawed) & echo begun", "^begun$")
    guests.type("deaf", "echo still", "^still$")
    assert "thawed" not in [entry["MESSAGE"] for entry in guests.serial("deaf")]
    assert guests.guest("deaf", "ThawFileSystems") == [1]
    guests.wait("deaf", "^thawed$")

    since = host.cursor()
    assert guests.guest("deaf", "FreezeFileSystems", "t", "1") == [1]
    guests.type("deaf", "sh (echo x >/m/x; echo thawed by itself) &", "^thawed by itself$")
    assert guests.guest("deaf", "FreezeFileSystems", "t", "300") == [1]
    host.run("systemctl", "restart", "kvmd")
    guests.type("deaf", "sh (echo x >/m/x; echo thawed anew) &", "^thawed anew$")
    refused = guests.guest("deaf", "FreezeFileSystems", "t", "301", check=False)
    assert "file systems are frozen for 1 to 300 seconds, not for 301" in refused.stderr

    host.run("systemctl", "stop", "kvmd@deaf")
    lines = [entry["MESSAGE"] for entry in host.journal("KVMD_GUEST=deaf", since=since)]
    assert "guest: the agent powers off" in lines
    assert lines[-1] == "Guest deaf is off (success)"
    host.run("rm", "-r", f"/{IMAGES}/frozen.raw", "/var/lib/kvmd/deaf")


def test_a_guest_whose_agent_speaks_nonsense(guests: Guests) -> None:
    """It costs nobody anything: each question ends in time, and the guest stops as it is."""
    host = guests.host
    guests.linux("odd", cmdline="kvmd.agent=1", extra="[agent]\nenabled = true\n")
    guests.start("odd")
    nonsense = "sh (while :; do printf '\\377{\"return\": [[[\\n'; done) >$(echo /dev/vport*p1) & echo begun"
    guests.type("odd", nonsense, "^begun$")
    refused = guests.guest("odd", "AgentAddresses", check=False)
    assert re.search("no agent in guest odd has answered within 5 s|cannot be read", refused.stderr), refused.stderr
    assert guests.get("odd", "State") == "running"
    host.run("systemctl", "stop", "kvmd@odd")
