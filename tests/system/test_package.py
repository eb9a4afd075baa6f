"""The package as a user meets it: apt on a running host, upgrades under running guests, removal, and back again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath

import lab
import pytest
from lab import rom

from .guests import RELEASES, SERVICE, Guests

# The very package of 0.1.0, as commit fdf8fcb built it: what counts is what its daemon and its scripts left on a host.
OLD = Path(__file__).with_name("kvmd_0.1.0_all.deb")
UNITS = ("kvmd.service", "kvmd-guests.target")
STATE = ("/var/lib/systemd", "/etc/systemd")  # what deb-systemd-helper remembers, and what it did
STEADY = 'memory = "32M"\naccelerator = "tcg"\n[qemu]\nargs = ["-bios", "/var/lib/kvmd/steady.rom"]\n'


@contextmanager
def bare_host(release: str, deb: Path) -> Iterator[lab.Host]:
    """A host without kvmd, with nothing but what Debian has."""
    with lab.Host(release, name=release) as host:
        host.copy_in(deb, "/root/kvmd.deb")
        host.copy_in(OLD, "/root/old.deb")
        host.write("/var/lib/kvmd/steady.rom", rom.steady())
        yield host


@pytest.fixture(params=RELEASES, scope="module")
def host(request: pytest.FixtureRequest, deb: Path) -> Iterator[lab.Host]:
    """A host on which apt has just installed kvmd."""
    with bare_host(request.param, deb) as host:
        install(host)
        yield host


def install(host: lab.Host, package: str = "/root/kvmd.deb") -> None:
    host.run("apt-get", "install", "-y", "--reinstall", "--no-install-recommends", package)


def states(host: lab.Host, verb: str, *units: str) -> list[str]:
    """What systemctl is-active or is-enabled says of each."""
    return host.run("systemctl", verb, *units, check=False).stdout.split()


def lives(host: lab.Host, *units: str) -> list[str]:
    return [host.show(unit)["InvocationID"] for unit in units]


def files(host: lab.Host) -> set[str]:
    return set(host.run("dpkg", "-L", "kvmd").stdout.splitlines())


def test_installed(host: lab.Host) -> None:
    assert host.run("systemctl", "is-active", *UNITS).stdout.split() == ["active", "active"]
    assert host.run("systemctl", "is-enabled", *UNITS).stdout.split() == ["enabled", "enabled"]
    changed = host.run("dpkg", "--verify", "kvmd").stdout.splitlines()
    assert changed == []
    assert host.run("systemctl", "is-system-running").stdout == "running\n"


def test_units(host: lab.Host) -> None:
    done = host.run("systemd-analyze", "verify", "--man=no", *UNITS, "kvmd@x.service")
    assert done.stderr == ""


def test_commands_see_only_what_is_debians(host: lab.Host) -> None:
    """Neither the directory one is in nor the environment can slip them a module."""
    host.write("/root/argparse.py", "raise SystemExit('slipped in')\n")
    done = host.run("env", "-C", "/root", "PYTHONPATH=/root", "kvmd", "--version")
    assert done.stdout.startswith("kvmd ")


def test_upgrade_and_remove(host: lab.Host) -> None:
    """The guest does not notice the upgrade; removal shuts it down in an orderly way and keeps what the user wrote."""
    guests = Guests(host)
    guests.linux("stays")
    guests.start("stays")
    pid = guests.get("stays", "PID")
    since = host.cursor()
    install(host)
    host.wait_journal("-u", "kvmd.service", message="Started kvmd.service", since=since)
    assert guests.get("stays", "PID") == pid
    guests.type("stays", "echo still here", "^still here")

    host.run("apt-get", "remove", "-y", "kvmd", timeout=120)
    assert "guest: powering off" in [entry["MESSAGE"] for entry in guests.serial("stays")]
    assert [unit for unit, state in host.units().items() if unit.startswith("kvmd") and state != "inactive/dead"] == []
    assert host.run("find", "/usr", "-path", "*kvmd*", "-not", "-path", "*/__pycache__*").stdout == ""
    assert host.run("find", "/usr/lib", "-path", "*kvmd*").stdout == ""
    assert "echo" not in host.read("/etc/kvmd/stays.toml")
    host.run("apt-get", "purge", "-y", "kvmd")
    assert host.read("/etc/kvmd/stays.toml")


def test_again(host: lab.Host) -> None:
    """After a purge, and after a removal: as the first time, and guests whose files stayed start again."""
    guests = Guests(host)
    host.write("/etc/kvmd/steady.toml", STEADY)
    host.write("/var/lib/kvmd/images/mine", "")
    for end in ("remove", "purge"):
        install(host)
        test_installed(host)
        since = host.cursor()
        guests.start("steady", ready=False)
        guests.wait("steady", "^00000002 ", since)
        host.run("apt-get", end, "-y", "kvmd", timeout=120)
        assert guests.serial("steady")[-1]["MESSAGE"] == rom.FAREWELL
        assert host.run("find", "/run", "-path", "*kvmd*").stdout == ""
    assert host.run("find", *STATE, "-name", "*kvmd*").stdout == ""
    assert host.read("/etc/kvmd/stays.toml")
    assert host.read("/etc/kvmd/steady.toml") == STEADY
    host.run("test", "-e", "/var/lib/kvmd/images/mine")


@pytest.mark.parametrize("release", RELEASES)
def test_upgrade_from_0_1_0(release: str, deb: Path) -> None:
    """Afterwards the daemon is another; the guests, and what the administrator decided, are the same."""
    with bare_host(release, deb) as host:
        install(host, "/root/old.deb")
        guests = Guests(host)
        guests.linux("stays")
        guests.write("steady", STEADY)
        guests.start("stays")
        guests.start("steady", ready=False)
        host.run("systemctl", "enable", "kvmd@stays.service")
        host.run("systemctl", "disable", "kvmd-guests.target")
        units = (*UNITS, "kvmd@stays.service", "kvmd@steady.service")
        enabled = states(host, "is-enabled", *units)
        assert enabled == ["enabled", "disabled", "enabled", "disabled"]
        untouched = (*units[1:], "kvmd-stays.scope", "kvmd-steady.scope")
        old_daemon, others = lives(host, "kvmd.service"), lives(host, *untouched)
        pids = [guests.get(name, "PID") for name in ("stays", "steady")]
        before, since = files(host), host.cursor()

        install(host)
        version = host.run("busctl", "get-property", *SERVICE, "Version").stdout
        assert version == f's "{host.run("dpkg-query", "-W", "-f", "${Version}", "kvmd").stdout}"\n' != 's "0.1.0"\n'
        assert lives(host, "kvmd.service") != old_daemon
        assert lives(host, *untouched) == others
        assert states(host, "is-active", *units) == ["active"] * 4
        assert states(host, "is-enabled", *units) == enabled
        assert [guests.get(name, "PID") for name in ("stays", "steady")] == pids
        guests.type("stays", "echo still here", "^still here")
        guests.wait("steady", "^[0-9]{8} ", host.cursor())
        numbers = [int(entry["MESSAGE"][:8]) for entry in guests.serial("steady")]
        assert numbers == list(range(1, len(numbers) + 1))
        complaints = host.journal("-p", "warning", "_SYSTEMD_UNIT=kvmd.service", since=since)
        assert [entry["MESSAGE"] for entry in complaints] == []

        after = files(host)
        assert host.run("find", *(before - after), "-maxdepth", "0", check=False).stdout == ""
        assert host.run("find", "/etc", "/usr", "-name", "*.dpkg-*").stdout == ""
        assert host.run("dpkg", "--verify", "kvmd").stdout == ""
        compiled = map(PurePath, host.run("find", "/usr/lib/kvmd", "-name", "*.pyc").stdout.splitlines())
        modules = {f"{path.parent.parent}/{path.name.partition('.')[0]}.py" for path in compiled}
        assert modules == {path for path in after if path.endswith(".py")}

        # Nor does an upgrade start what the administrator has stopped.
        host.run("systemctl", "enable", "kvmd-guests.target")
        for verb, state in (("disable", "disabled"), ("mask", "masked")):
            host.run("systemctl", verb, "--now", "kvmd.service")
            host.run("dpkg", "--install", "/root/kvmd.deb")
            assert states(host, "is-enabled", *UNITS) == [state, "enabled"]
            assert states(host, "is-active", "kvmd.service", *units[2:]) == ["inactive", "active", "active"]
        host.run("systemctl", "unmask", "kvmd.service")
        host.run("systemctl", "enable", "--now", "kvmd.service")
        assert [guests.get(name, "PID") for name in ("stays", "steady")] == pids
        guests.type("stays", "echo and still", "^and still")
