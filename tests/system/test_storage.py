"""Storage that is not there yet, or no more: no blank disk takes the place of one that was used."""

from __future__ import annotations

import lab
import pytest

from .guests import Guests

DISK = '[[disk]]\npath = "{}"\nsize = "1M"\nformat = "raw"\n'
MOUNT = """[Unit]
Description=Storage of guests
[Mount]
What={}
Where=/srv/vm
Type=tmpfs
"""


def refusal(guests: Guests, name: str) -> str:
    refused = guests.call("StartGuest", "s", name, check=False)
    return str(refused.stderr)


@pytest.mark.complaints("could not be started")
def test_a_link_that_leads_nowhere(guests: Guests) -> None:
    host = guests.host
    host.run("ln", "-s", "/srv/vm/db.raw", "/var/lib/kvmd/images/db.raw")
    guests.linux("db", extra=DISK.format("db.raw"))
    said = refusal(guests, "db")
    assert "db.raw: No such file or directory (it is a link to /srv/vm/db.raw: is the file system mounted?)" in said
    assert host.run("readlink", "/var/lib/kvmd/images/db.raw").stdout == "/srv/vm/db.raw\n"
    host.run("rm", "/var/lib/kvmd/images/db.raw")


@pytest.mark.complaints("could not be started")
def test_an_image_that_has_gone(guests: Guests) -> None:
    host = guests.host
    host.run("mkdir", "-p", "/srv/gone")
    guests.linux("db", extra=DISK.format("/srv/gone/db.raw"))
    guests.start("db", ready=False)
    guests.guest_off("db")
    host.run("mount", "-t", "tmpfs", "none", "/srv/gone")
    said = refusal(guests, "db")
    assert "the disk image /srv/gone/db.raw has gone, which this guest has used before" in said
    assert "rm /var/lib/kvmd/db/disks" in said
    host.run("rm", "/etc/kvmd/db.toml")
    guests.call("Reload")
    guests.linux("db", extra=DISK.format("/srv/gone/db.raw"))
    assert "has gone" in refusal(guests, "db")
    assert host.run("ls", "-A", "/srv/gone").stdout == ""
    host.run("umount", "/srv/gone")
    guests.start("db", ready=False)
    guests.clear()
    host.run("rm", "-r", "/srv/gone")
    assert "db" not in host.run("ls", "/var/lib/kvmd").stdout.split()


def test_a_start_waits_for_its_mount(guests: Guests) -> None:
    """And goes down before it; also where only a link among the images leads there."""
    host = guests.host
    host.write("/etc/systemd/system/srv-vm.mount", MOUNT.format("none"))
    host.run("ln", "-s", "/srv/vm/linked.raw", "/var/lib/kvmd/images/linked.raw")
    guests.linux("db", extra=DISK.format("/srv/vm/my db%.raw"))
    guests.linux("link", extra=DISK.format("linked.raw"))
    host.run("systemctl", "daemon-reload")
    for name in ("db", "link"):
        shown = host.show(f"kvmd@{name}.service")
        assert "srv-vm.mount" in shown["Requires"].split(), shown
        assert "srv-vm.mount" in shown["After"].split()
        assert "remote-fs.target" in shown["After"].split()
    host.run("systemctl", "start", "kvmd@db")
    assert host.show("srv-vm.mount")["ActiveState"] == "active"
    assert host.run("findmnt", "-n", "-o", "TARGET", "-T", "/srv/vm/my db%.raw").stdout == "/srv/vm\n"
    host.run("systemctl", "stop", "srv-vm.mount")
    assert guests.active("db") == "inactive"
    assert guests.get("db", "State") == "stopped"
    guests.clear()
    host.run("rm", "-r", "/etc/systemd/system/srv-vm.mount", "/var/lib/kvmd/images/linked.raw", "/srv/vm")
    host.run("systemctl", "daemon-reload")


@pytest.mark.complaints("could not be started")
def test_a_start_fails_with_its_mount(guests: Guests) -> None:
    host: lab.Host = guests.host
    host.write("/etc/systemd/system/srv-vm.mount", MOUNT.format("none").replace("tmpfs", "ext4"))
    guests.linux("db", extra=DISK.format("/srv/vm/db.raw"))
    host.run("systemctl", "daemon-reload")
    refused = host.run("systemctl", "start", "kvmd@db", check=False)
    assert "dependency" in refused.stderr.lower()
    assert host.run("ls", "-A", "/srv/vm", check=False).stdout == ""
    guests.clear()
    host.run("systemctl", "reset-failed", "srv-vm.mount")
    host.run("rm", "-rf", "/etc/systemd/system/srv-vm.mount", "/srv/vm")
    host.run("systemctl", "daemon-reload")


@pytest.mark.complaints("could not be started")
def test_one_image_under_two_names(guests: Guests) -> None:
    """Also when a daemon has come that did not start the one that has it, and when it has another name by now."""
    host = guests.host
    host.run("truncate", "-s", "1M", "/var/lib/kvmd/images/a.raw")
    host.run("ln", "/var/lib/kvmd/images/a.raw", "/var/lib/kvmd/images/b.raw")
    host.run("ln", "-s", "a.raw", "/var/lib/kvmd/images/c.raw")
    for name in "abc":
        guests.linux(name, extra=DISK.format(f"{name}.raw"))
    guests.start("a", ready=False)
    for name in "bc":
        said = refusal(guests, name)
        path = "/var/lib/kvmd/images"
        assert f"{path}/{name}.raw is in use by guest a, which knows it as {path}/a.raw" in said
    host.run("systemctl", "restart", "kvmd")
    assert "is in use by guest a" in refusal(guests, "b")
    checked = host.run("kvmd", "--check", check=False).stdout
    assert "/etc/kvmd/c.toml:9: disk.path" in checked
    assert "is already used by guest a (images can be shared only read-only)" in checked
    guests.clear()
    host.run("sh", "-c", "rm /var/lib/kvmd/images/[abc].raw")


def test_a_guest_file_that_is_a_link(guests: Guests) -> None:
    """What it leads to is edited: that is noticed, and in any case read at the next start."""
    host = guests.host
    guests.linux("web")
    host.run("mkdir", "/srv/git")
    host.run("mv", "/etc/kvmd/web.toml", "/srv/git/web.toml")
    host.run("ln", "-s", "/srv/git/web.toml", "/etc/kvmd/web.toml")
    guests.call("Reload")
    guests.start("web", ready=False)
    assert guests.get("web", "NeedsRestart") is False
    text = host.read("/srv/git/web.toml")
    host.write("/srv/git/web.toml", f'description = "edited"\n{text}')
    guests.until("web", "NeedsRestart", True)
    host.run("systemctl", "restart", "kvmd@web")
    assert guests.get("web", "Description") == "edited"
    guests.clear()
    host.run("rm", "-r", "/srv/git")
