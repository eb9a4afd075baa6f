"""The package as a user meets it: apt on a running host, an upgrade under a running guest, removal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import lab
import pytest

from .guests import Guests

UNITS = ("kvmd.service", "kvmd-guests.target")


@pytest.fixture(params=list(lab.roots.RELEASES.values()), scope="module")
def host(request: pytest.FixtureRequest, deb: Path) -> Iterator[lab.Host]:
    """A host on which apt has just installed kvmd, with nothing but what Debian has."""
    with lab.Host(request.param, name=request.param) as host:
        host.copy_in(deb, "/root/kvmd.deb")
        host.run("apt-get", "install", "-y", "--no-install-recommends", "/root/kvmd.deb")
        yield host


def test_installed(host: lab.Host) -> None:
    assert host.run("systemctl", "is-active", *UNITS).stdout.split() == ["active", "active"]
    assert host.run("systemctl", "is-enabled", *UNITS).stdout.split() == ["enabled", "enabled"]
    changed = host.run("dpkg", "--verify", "kvmd").stdout.splitlines()
    assert changed == []
    assert host.run("systemctl", "is-system-running").stdout == "running\n"


def test_units(host: lab.Host) -> None:
    done = host.run("systemd-analyze", "verify", "--man=no", *UNITS, "kvmd@x.service")
    assert done.stderr == ""


def test_upgrade_and_remove(host: lab.Host) -> None:
    """The guest does not notice the upgrade; removal shuts it down in an orderly way and keeps what the user wrote."""
    guests = Guests(host)
    guests.linux("stays")
    guests.start("stays")
    pid = guests.get("stays", "PID")
    since = host.cursor()
    host.run("apt-get", "install", "-y", "--reinstall", "--no-install-recommends", "/root/kvmd.deb")
    host.wait_journal("-u", "kvmd.service", message="Started kvmd.service", since=since)
    assert guests.get("stays", "PID") == pid
    guests.type("stays", "echo still here", "^still here")

    host.run("apt-get", "remove", "-y", "kvmd", timeout=120)
    assert "guest: powering off" in [entry["MESSAGE"] for entry in guests.serial("stays")]
    assert [unit for unit, state in host.units().items() if unit.startswith("kvmd") and state != "inactive/dead"] == []
    assert host.run("find", "/usr", "-path", "*kvmd*", "-not", "-path", "*/__pycache__*").stdout == ""
    assert "echo" not in host.read("/etc/kvmd/stays.toml")
    host.run("apt-get", "purge", "-y", "kvmd")
    assert host.read("/etc/kvmd/stays.toml")
