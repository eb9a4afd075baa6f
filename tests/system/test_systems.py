"""Systems that nobody has changed: installed from a CD, booted from the disk, read and typed to on the serial console."""

from __future__ import annotations

import shutil
from pathlib import Path

import lab
import pytest

from .guests import Guests

IMAGES = "/var/lib/kvmd/images"
CD = ("StartWith", "a{sv}", "2", "boot", "s", "cdrom", "cdrom", "s")


def put(host: lab.Machine, source: Path, name: str) -> None:
    """Among the images, by that name."""
    shutil.copyfile(source, host.directory / "root" / IMAGES[1:] / name)


@pytest.fixture
def iso(guests: Guests) -> str:
    put(guests.host, lab.media.installer(), "install.iso")
    return "install.iso"


@pytest.mark.parametrize("firmware", ["bios"])
def test_install_then_run(guests: Guests, iso: str, firmware: str) -> None:
    """From a CD that the file does not name; given up half-way, and begun again; then from the disk, whoever resets."""
    host = guests.host
    disk = '[[disk]]\npath = "installed.qcow2"\nsize = "64M"\n'
    guests.write("fresh", f'memory = "192M"\nprofile = "legacy"\nfirmware = "{firmware}"\n{disk}')
    since = host.cursor()
    guests.guest("fresh", *CD, iso)
    guests.wait("fresh", "^guest: install to /dev/sda", since)
    assert not guests.get("fresh", "NeedsRestart")
    refused = guests.guest("fresh", *CD, iso, check=False)
    assert "guest fresh is on (stop it first: the options are for a start)" in refused.stderr
    guests.guest("fresh", "Terminate")
    since = host.cursor()
    guests.guest("fresh", *CD, iso)
    guests.wait("fresh", "^guest: install to /dev/sda", since)
    host.run("systemctl", "restart", "kvmd")
    guests.type("fresh", "yes", "^guest: installed, rebooting")
    guests.wait("fresh", "^guest: ready installed", since)
    guests.guest("fresh", "Stop")
    since = host.cursor()
    guests.start("fresh", ready=False)
    guests.wait("fresh", "^guest: ready installed", since)
    guests.clear()
    host.run("rm", "-r", f"{IMAGES}/{iso}", f"{IMAGES}/installed.qcow2", "/var/lib/kvmd/fresh")


@pytest.mark.complaints("could not be started")
def test_refused_options(guests: Guests) -> None:
    guests.write("fresh", "")
    refused = guests.guest("fresh", "StartWith", "a{sv}", "1", "boot", "s", "cdrom", check=False)
    assert "it has no cdrom to boot from" in refused.stderr
    refused = guests.guest("fresh", *CD, "missing.iso", check=False)
    assert "missing.iso: No such file or directory" in refused.stderr
    refused = guests.guest("fresh", "StartWith", "a{sv}", "1", "boots", "s", "cdrom", check=False)
    assert 'there is no option "boots" (there are boot, cdrom)' in refused.stderr
