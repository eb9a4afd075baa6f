"""Systems that nobody has changed: installed from a CD, booted from the disk, read and typed to on the console."""

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
    host.run("rm", f"{IMAGES}/{iso}", f"{IMAGES}/installed.qcow2")


@pytest.mark.complaints("could not be started")
def test_refused_options(guests: Guests) -> None:
    guests.write("fresh", "")
    refused = guests.guest("fresh", "StartWith", "a{sv}", "1", "boot", "s", "cdrom", check=False)
    assert "it has no cdrom to boot from" in refused.stderr
    refused = guests.guest("fresh", *CD, "missing.iso", check=False)
    assert "missing.iso: No such file or directory" in refused.stderr
    refused = guests.guest("fresh", "StartWith", "a{sv}", "1", "boots", "s", "cdrom", check=False)
    assert 'there is no option "boots" (there are boot, cdrom)' in refused.stderr


def test_systems_that_are_not_linux(guests: Guests) -> None:
    """All at once: a memory test on a kernel's place; GRUB's rescue CD and iPXE, which are typed to."""
    host, systems = guests.host, lab.roots.systems()
    put(host, systems / "boot/memtest86+x64.bin", "memtest.bin")
    put(host, systems / "usr/lib/grub-rescue/grub-rescue-cdrom.iso", "grub.iso")
    put(host, systems / "usr/lib/ipxe/ipxe.iso", "ipxe.iso")
    guests.write("memtest", 'machine = "pc"\n[boot]\nkernel = "memtest.bin"\ncmdline = "console=ttyS0,115200"\n')
    guests.write("grub", "")
    guests.write("ipxe", '[[network]]\nmodel = "e1000"\n')
    since = host.cursor()
    guests.start("memtest", ready=False)
    guests.guest("grub", *CD, "grub.iso")
    guests.guest("ipxe", *CD, "ipxe.iso")
    guests.wait("grub", "automatically in", since)
    guests.type("grub", "c", "grub>")
    guests.type("grub", "echo the answer is $grub_platform", "the answer is pc")
    guests.wait("ipxe", "iPXE ", since)
    guests.wait("memtest", "Pass:", since)
    guests.clear()
    host.run("rm", *(f"{IMAGES}/{name}" for name in ("memtest.bin", "grub.iso", "ipxe.iso")))


def test_debian_installer(guests: Guests) -> None:
    put(guests.host, lab.media.debian_installer(), "debian.iso")
    guests.write("debian", 'memory = "1G"\nprofile = "legacy"\n')
    since = guests.host.cursor()
    guests.guest("debian", *CD, "debian.iso")
    guests.wait("debian", "Select a language|Choose the language", since, timeout=150)
    guests.clear()
    guests.host.run("rm", f"{IMAGES}/debian.iso")
