"""CDs put into and taken out of the drives of a guest that runs and reads them."""

from __future__ import annotations

import lab
import pytest

from .guests import Guests

OBJECT = ("org.kvmd1", "/org/kvmd1/guest/cds", "org.kvmd1.Guest")
IMAGES = "/var/lib/kvmd/images"
DRIVES = "[[cdrom]]\n[[cdrom]]\npath = 'first.iso'\n"
MAKE_ISO = """
import sys, pycdlib
for word in sys.argv[1:]:
    iso = pycdlib.PyCdlib()
    iso.new(vol_ident=word.upper())
    text = f"this is {word}\\n".encode()
    iso.add_fp(__import__("io").BytesIO(text), len(text), "/WORD.;1")
    iso.write(f"/var/lib/kvmd/images/{word}.iso")
    iso.close()
"""


def start(guests: Guests) -> None:
    guests.host.run("python3", "-c", MAKE_ISO, "first", "second", "third")
    # Debian's cloud kernel has a driver for IDE, and none for SATA.
    guests.linux("cds", top='machine = "pc"', cmdline="kvmd.cdrom=1", extra=DRIVES)
    guests.start("cds")


def read(guests: Guests, drive: int, answer: str) -> None:
    """What the guest reads. That there is another CD its kernel may learn by a read that fails: no udev polls here."""
    mount = f"until mount -t iso9660 -o ro /dev/sr{drive} /root 2>/dev/null; do usleep 100000; done"
    command = f"{mount}; cat /root/word; umount /root; echo done"
    if not answer:
        guests.type("cds", f"sh mount -t iso9660 -o ro /dev/sr{drive} /root || echo empty", "^empty$")
        return
    since = guests.host.cursor()
    guests.type("cds", f"sh {command}", "^done$")
    said = [entry["MESSAGE"] for entry in guests.host.journal("KVMD_GUEST=cds", "KVMD_STREAM=serial", since=since)]
    assert f"this is {answer}" in said, said


def media(guests: Guests) -> list[str]:
    found = guests.get("cds", "Media")
    assert list(found) == ["cdrom0", "cdrom1"]
    return [path.removeprefix(f"{IMAGES}/") for path in found.values()]


def descriptors(guests: Guests) -> int:
    return len(guests.host.run("ls", f"/proc/{guests.get('cds', 'PID')}/fd").stdout.split())


def test_a_guest_reads_what_is_put_in(guests: Guests) -> None:
    """And nothing is left of what was taken out; the next daemon knows what is in, and goes on."""
    host = guests.host
    guests.write("cds", DRIVES)
    assert media(guests) == ["", "first.iso"]  # as in the file
    start(guests)
    assert media(guests) == ["", "first.iso"]
    read(guests, 0, "")
    read(guests, 1, "first")
    told = host.popen("busctl", "monitor", "org.kvmd1")
    assert told.stdout
    assert any("Monitoring bus message stream" in line for line in told.stdout)
    guests.guest("cds", "InsertMedia", "ss", "cdrom0", "second.iso")
    assert any('STRING "Media"' in line for line in told.stdout)
    told.kill()
    guests.guest("cds", "InsertMedia", "ss", "cdrom1", f"{IMAGES}/third.iso")
    assert media(guests) == ["second.iso", "third.iso"]
    read(guests, 0, "second")
    read(guests, 1, "third")

    # a hundred, and some while it is paused
    before = descriptors(guests)
    call = 'busctl call org.kvmd1 "$2" org.kvmd1.Guest InsertMedia ss cdrom1 "$iso.iso"'
    loop = f'for n in $(seq "$1"); do for iso in first third; do {call}; done; done'
    host.run("sh", "-euc", loop, "sh", "50", guests.path("cds"))
    read(guests, 1, "third")
    assert descriptors(guests) == before
    guests.guest("cds", "Pause")
    host.run("sh", "-euc", loop, "sh", "3", guests.path("cds"))
    guests.guest("cds", "InsertMedia", "ss", "cdrom1", "second.iso")
    guests.guest("cds", "Resume")
    read(guests, 1, "second")
    guests.guest("cds", "InsertMedia", "ss", "cdrom1", "third.iso")
    guests.guest("cds", "InsertMedia", "ss", "cdrom1", "third.iso")
    assert descriptors(guests) == before

    # the next daemon
    guests.guest("cds", "EjectMedia", "s", "cdrom0")
    host.run("systemctl", "restart", "kvmd")
    guests.until("cds", "Media", {"cdrom0": "", "cdrom1": f"{IMAGES}/third.iso"})
    read(guests, 0, "")
    read(guests, 1, "third")
    host.run("rm", "/run/kvmd/cds/media")  # as of an earlier version
    host.run("systemctl", "kill", "--signal=KILL", "--kill-whom=main", "kvmd")
    host.wait_journal("KVMD_GUEST=cds", message="was running already", since=host.cursor())
    guests.guest("cds", "InsertMedia", "ss", "cdrom0", "first.iso")
    guests.guest("cds", "InsertMedia", "ss", "cdrom1", "second.iso")
    assert media(guests) == ["first.iso", "second.iso"]
    read(guests, 0, "first")
    read(guests, 1, "second")

    # locked by the guest, which is asked first
    guests.type("cds", "sh mount -t iso9660 -o ro /dev/sr0 /root && echo mounted", "^mounted$")
    for call in (("InsertMedia", "ss", "cdrom0", "third.iso"), ("EjectMedia", "s", "cdrom0")):
        refused = guests.guest("cds", *call, check=False)
        assert "guest cds has locked cdrom0 and does not open it (unmount it there and try again" in refused.stderr
    assert media(guests) == ["first.iso", "second.iso"]
    guests.type("cds", "sh cat /root/word; umount /root; echo unmounted", "^unmounted$")
    guests.guest("cds", "InsertMedia", "ss", "cdrom0", "third.iso")
    read(guests, 0, "third")

    # one that gives it back when it is asked, as udev would
    guests.type("cds", "sh mount -t iso9660 -o ro /dev/sr0 /root && echo mounted", "^mounted$")
    asked = host.popen("busctl", "call", *OBJECT, "InsertMedia", "ss", "cdrom0", "second.iso")
    guests.type("cds", "sh umount /root; eject /dev/sr0; echo ejected", "^ejected$")
    assert asked.wait(20) == 0
    read(guests, 0, "second")

    guests.type("cds", "sh mount -t iso9660 -o ro /dev/sr0 /root && echo mounted", "^mounted$")
    guests.guest("cds", "ForceEjectMedia", "s", "cdrom0")
    assert media(guests) == ["", "second.iso"]
    guests.type("cds", "sh umount /root; echo unmounted", "^unmounted$")
    guests.guest("cds", "InsertMedia", "ss", "cdrom0", "first.iso")
    read(guests, 0, "first")
    host.run("sh", "-c", f"rm {IMAGES}/*.iso")


@pytest.mark.complaints("could not be started")
def test_what_is_not_put_in(guests: Guests) -> None:
    host: lab.Host = guests.host
    host.run("truncate", "-s", "1M", f"{IMAGES}/data.raw", f"{IMAGES}/cd.iso")
    host.run("mkfifo", "/srv/pipe.iso")
    disk = '[[disk]]\npath = "{}"\nformat = "raw"\n'
    guests.linux("writes", extra=disk.format("data.raw"))
    guests.linux("cds", extra="[[cdrom]]\n")
    guests.linux("none")
    guests.start("writes", "cds", "none", ready=False)

    def refusal(name: str, device: str, path: str) -> str:
        return str(guests.guest(name, "InsertMedia", "ss", device, path, check=False).stderr)

    assert "data.raw is a disk that guest writes writes to (insert a copy of it)" in refusal(
        "cds", "cdrom0", "data.raw"
    )
    assert "cannot open the CD image /var/lib/kvmd/images/no.iso: No such file" in refusal("cds", "cdrom0", "no.iso")
    assert "it is neither a file nor a block device" in refusal("cds", "cdrom0", "/srv/pipe.iso")
    assert '"../x" is not the path of a file' in refusal("cds", "cdrom0", "../x")
    assert "guest cds has no drive 'cdrom1' (it has cdrom0)" in refusal("cds", "cdrom1", "cd.iso")
    assert "(it has none: add [[cdrom]] to its file, and restart it)" in refusal("none", "cdrom0", "cd.iso")
    guests.guest("cds", "InsertMedia", "ss", "cdrom0", "cd.iso")
    guests.linux("late", extra=disk.format("cd.iso"))
    refused = guests.call("StartGuest", "s", "late", check=False)
    assert "cd.iso is in use by guest cds" in refused.stderr
    guests.guest("cds", "EjectMedia", "s", "cdrom0")
    guests.guest("cds", "EjectMedia", "s", "cdrom0")
    guests.start("late", ready=False)
    guests.guest_off("cds")
    assert "guest cds is not running" in refusal("cds", "cdrom0", "cd.iso")
    guests.clear()
    host.run("rm", f"{IMAGES}/data.raw", f"{IMAGES}/cd.iso", "/srv/pipe.iso")
