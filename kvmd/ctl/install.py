"""install: from a CD image to a system on a disk, with what to type where an installer is silent on the serial port."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from kvmd.ctl.bus import GUEST, MANAGER, ROOT, Bus, Variant, connect
from kvmd.ctl.console import attach
from kvmd.ctl.failure import NO_SUCH_GUEST, Failure
from kvmd.ctl.files import compose, write
from kvmd.ctl.guests import Guest, one
from kvmd.ctl.progress import Progress
from kvmd.ctl.screen import local

IMAGES = Path("/var/lib/kvmd/images")
DESCRIPTOR = 32768  # byte at which ECMA-119's primary volume descriptor begins
VIRTIO = 2012  # the year from which on a BSD has drivers for it

# What its installer wants to hear before it speaks on the serial port.
HINTS = {
    "FreeBSD": "in the loader's menu press 3, then type: set console=comconsole, then: boot",
    "OpenBSD": "at boot> type: stty com0 115200, then: set tty com0, then: boot",
    "NetBSD": "in the boot menu choose its prompt, then type: consdev com0, then: boot",
    "Debian": "press Esc, then type: install console=ttyS0,115200",
    "Windows": "it has no text: press a key to boot from the CD, and go on in its picture",
}
PICTURE = "its picture: kvmctl view {name}, or kvmctl screenshot {name}"


@dataclass(frozen=True)
class Disc:
    """``system``: a key of HINTS, or nothing that is known."""

    system: str
    profile: str


async def run(arguments: argparse.Namespace) -> int:
    image = local(arguments.cdrom)
    disc = identify(Path(image) if Path(image).is_absolute() else IMAGES / image)
    async with connect() as bus:
        guest = await _guest(bus, arguments, disc)
        options = {"boot": Variant("s", "cdrom"), "cdrom": Variant("s", image)}
        with Progress(silent=arguments.json) as progress:
            progress.step(guest.name, "is starting from the CD")
            await bus.call(guest.path, GUEST, "StartWith", "a{sv}", options)
    for line in advice(guest.name, disc):
        print(line, file=sys.stderr)
    return 0 if arguments.no_console else await attach(guest.name, lines=0)


async def _guest(bus: Bus, arguments: argparse.Namespace, disc: Disc) -> Guest:
    """The one that there is, or one whose file is written now."""
    try:
        return await one(bus, arguments.name)
    except Failure as failure:
        if failure.status != NO_SUCH_GUEST:
            raise
    arguments.profile = arguments.profile or disc.profile
    path = write(arguments.name, compose(arguments))
    print(f"{path} is written (profile {arguments.profile})", file=sys.stderr)
    await bus.call(ROOT, MANAGER, "Reload")
    return await one(bus, arguments.name)


def advice(name: str, disc: Disc) -> list[str]:
    hint = [f"{disc.system}: {HINTS[disc.system]}"] if disc.system in HINTS else []
    return [*hint, PICTURE.format(name=name), f"once it is installed its disk boots: kvmctl start {name}"]


def identify(image: Path) -> Disc:
    """By its volume descriptor (ECMA-119 8.4); what is not known counts as Linux. Raises ``Failure``."""
    try:
        with image.open("rb") as file:
            file.seek(DESCRIPTOR)
            data = file.read(2048)
    except OSError as error:
        raise Failure(f"cannot read {image}: {error.strerror}") from error
    if data[1:6] != b"CD001":
        raise Failure(f"{image} is no CD image (ISO 9660)")
    field = {"system": data[8:40], "volume": data[40:72], "publisher": data[318:446]}
    words = {name: text.decode("ascii", "replace").strip().upper() for name, text in field.items()}
    year = int(data[813:817]) if data[813:817].isdigit() else 9999
    if "MICROSOFT" in words["publisher"]:
        return Disc("Windows", "windows")
    for system in ("FreeBSD", "OpenBSD", "NetBSD"):
        if any(system.upper() in text for text in words.values()):
            return Disc(system, "bsd" if year >= VIRTIO else "legacy")
    return Disc("Debian" if "DEBIAN" in words["volume"] else "", "linux")
