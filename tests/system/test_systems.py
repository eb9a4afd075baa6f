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


@pytest.mark.parametrize("firmware", ["bios", "uefi"])
def test_install_then_run(guests: Guests, iso: str, firmware: str) -> None:
    """From a CD that the file does not name; given up half-way, and begun again; then from the disk, whoever resets."""
    host = guests.host
    disk = '[[disk]]\npath = "installed.qcow2"\nsize = "64M"\n'
    profile = "legacy" if firmware == "bios" else "linux"
    text = f'memory = "256M"\nmachine = "pc"\nprofile = "{profile}"\nfirmware = "{firmware}"\n'
    guests.write("fresh", text + disk.replace("size", 'bus = "ide"\nsize'))
    since = host.cursor()
    guests.guest("fresh", *CD, iso)
    guests.wait("fresh", "^guest: install to /dev/sda", since, timeout=120)
    assert not guests.get("fresh", "NeedsRestart")
    refused = guests.guest("fresh", *CD, iso, check=False)
    assert "guest fresh is on (stop it first: the options are for a start)" in refused.stderr
    guests.guest("fresh", "Terminate")
    since = host.cursor()
    guests.guest("fresh", *CD, iso)
    guests.wait("fresh", "^guest: install to /dev/sda", since, timeout=120)
    host.run("systemctl", "restart", "kvmd")
    guests.type("fresh", "yes", "^guest: installed, rebooting")
    guests.wait("fresh", "^guest: ready installed", since, timeout=120)
    guests.guest("fresh", "Stop")
    since = host.cursor()
    guests.start("fresh", ready=False)
    guests.wait("fresh", "^guest: ready installed", since, timeout=120)
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
    guests.wait("grub", "automatically in", since, timeout=120)
    guests.type("grub", "c", "grub>")
    guests.type("grub", "date", "^20[0-9]{2}-")  # SeaBIOS keeps 16 keys
    guests.wait("ipxe", "iPXE ", since, timeout=120)
    guests.wait("memtest", "Pass:", since, timeout=120)
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


CLOUD = """
memory = "512M"
[[disk]]
path = "cloud.qcow2"
base = "debian.qcow2"
size = "2G"
[[network]]
address = ["192.0.2.44", "2001:db8:1::44"]
[boot]
kernel = "vmlinux"
initrd = "root.img"
cmdline = "console=ttyS0 quiet root=/dev/vda1 rw cryptomgr.notests init_on_alloc=0 mitigations=off"
[credentials]
greeting = "hello from the host"
motd = "two\\nlines"
[cloud_init]
user_data = '''
#cloud-config
ssh_authorized_keys: [ssh-ed25519 AAAAC3Nza me@laptop]
ssh_genkeytypes: []
cloud_init_modules: [growpart, resizefs, set_hostname, users-groups, ssh]
cloud_config_modules: [runcmd]
cloud_final_modules: [scripts-user]
runcmd:
- |
  exec >/dev/ttyS0
  cd /run/credentials/@system
  echo "cloud: $(hostname), $(cut -d" " -f3 /home/debian/.ssh/authorized_keys), $(cat greeting), $(tail -n1 motd)"
  echo "cloud: root of $(($(df --output=size / | tail -n1) >> 10)) MiB"
  echo "cloud: ready"
'''
"""


def test_a_cloud_image_is_told_who_it_is(guests: Guests) -> None:
    host = guests.host
    put(host, lab.media.cloud_image(), "debian.qcow2")
    put(host, lab.vm.initrd("bookworm"), "root.img")
    guests.write("web", CLOUD)
    since = host.cursor()
    guests.start("web", ready=False)
    command = host.run("sh", "-c", "tr '\\0' ' ' < /proc/$(cat /run/kvmd/web/pid)/cmdline").stdout
    shown = host.run("busctl", "introspect", "org.kvmd1", guests.path("web")).stdout
    assert "type=11,path=" in command
    for secret in ("hello from", "AAAAC3Nza"):
        assert secret not in command + shown
    guests.wait("web", "^cloud: ready", since, timeout=400)
    said = [entry["MESSAGE"] for entry in guests.serial("web") if entry["MESSAGE"].startswith("cloud: ")]
    assert said[0] == "cloud: web, me@laptop, hello from the host, lines"
    assert 1900 < int(said[1].split()[3]) < 2048
    for address in ("192.0.2.44", "2001:db8:1::44"):
        host.run("ping", "-n", "-c", "1", "-W", "5", address, netns="alice")
    guests.clear()
    host.run("rm", *(f"{IMAGES}/{name}" for name in ("debian.qcow2", "root.img", "cloud.qcow2")))


QTREE = """
import json, socket, sys
with socket.socket(socket.AF_UNIX) as monitor:
    monitor.connect(sys.argv[1])
    lines = monitor.makefile("rw")
    for command, arguments in (("qmp_capabilities", {}), ("human-monitor-command", {"command-line": "info qtree"})):
        print(json.dumps({"execute": command, "arguments": arguments}), file=lines, flush=True)
        while "return" not in (answer := json.loads(lines.readline())):
            pass
print(answer["return"])
"""


def test_what_windows_finds(guests: Guests) -> None:
    """Device by device: as QEMU has them, and as a Linux in their place sees them."""
    host = guests.host
    extra = '[[disk]]\npath = "c.qcow2"\nsize = "1M"\n[[cdrom]]\n[[cdrom]]\n[display]\nvnc = true\n'
    guests.linux("win", last=61, top='profile = "windows"\n', extra=extra, cmdline="kvmd.addr=")
    guests.start("win")
    qtree = host.run("python3", "-c", QTREE, "/run/kvmd/win/qmp.spare").stdout
    for device in (
        *('dev: ide-hd, id "disk0"', 'dev: ide-cd, id "cdrom0"', 'dev: ide-cd, id "cdrom1"', 'dev: e1000e, id "nic0"'),
        *('dev: VGA, id "video0"', "dev: ich9-ahci", 'dev: qemu-xhci, id "usb0"', "dev: usb-tablet"),
    ):
        assert device in qtree, device
    for device in ("virtio", "hpet", "pvpanic"):
        assert f"dev: {device}" not in qtree, device
    seen = guests.type("win", "sh cat /sys/bus/pci/devices/*/device | tr '\\n' ' '; echo .", r"^0x.*\.$")["MESSAGE"]
    assert {"0x2922", "0x10d3", "0x1111", "0x000d"} <= set(seen.split())
    guests.clear()
    host.run("rm", f"{IMAGES}/c.qcow2")
