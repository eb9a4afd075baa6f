"""media, screenshot, view."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import socket
import struct
import sys
import time
from pathlib import Path

from kvmd.ctl.bus import GUEST, Bus, connect
from kvmd.ctl.failure import USAGE, Failure
from kvmd.ctl.guests import Guest, one
from kvmd.ctl.progress import columns
from kvmd.ctl.table import render

PIECE = 1 << 16  # bytes
# Viewers of VNC, and how each is told a port of this machine.
VIEWERS = {
    "remote-viewer": "vnc://127.0.0.1:{port}",
    "vncviewer": "127.0.0.1::{port}",
    "gvncviewer": "127.0.0.1:{display}",
    "vinagre": "vnc://127.0.0.1:{port}",
    "krdc": "vnc://127.0.0.1:{port}",
}


async def run(arguments: argparse.Namespace) -> int:
    async with connect() as bus:
        guest = await one(bus, arguments.name)
        return await {"media": _media, "screenshot": _screenshot, "view": _view}[arguments.verb](bus, guest, arguments)


def local(path: str) -> str:
    """What is here goes by its whole path; the rest is an image of kvmd's."""
    here = Path(path)
    return str(here.absolute()) if here.exists() else path


async def _media(bus: Bus, guest: Guest, arguments: argparse.Namespace) -> int:
    if arguments.eject and (arguments.image or not arguments.device):
        raise Failure("--eject wants a drive, and no image (kvmctl media NAME cdrom0 --eject)", status=USAGE)
    if arguments.eject:
        method = "ForceEjectMedia" if arguments.force else "EjectMedia"
        await bus.call(guest.path, GUEST, method, "s", arguments.device)
    elif arguments.image:
        await bus.call(guest.path, GUEST, "InsertMedia", "ss", arguments.device, local(arguments.image))
    elif arguments.device and arguments.device not in guest.properties["Media"]:
        raise Failure(f"guest {guest.name} has no drive {arguments.device} (it has {_drives(guest)})")
    else:
        found = {drive: path for drive, path in guest.properties["Media"].items() if arguments.device in (None, drive)}
        if arguments.json:
            print(json.dumps(found))
        else:
            rows = [(drive, path or "-") for drive, path in sorted(found.items())]
            print("\n".join(render(("DRIVE", "IMAGE"), rows, columns=columns())))
    return 0


def _drives(guest: Guest) -> str:
    return ", ".join(sorted(guest.properties["Media"])) or "none"


async def _screenshot(bus: Bus, guest: Guest, arguments: argparse.Namespace) -> int:
    name = arguments.file or f"{guest.name}-{time.strftime('%Y%m%d-%H%M%S')}.png"
    if name == "-" and sys.stdout.isatty():
        raise Failure("a picture is nothing for a terminal (kvmctl screenshot NAME FILE.png)", status=USAGE)
    with os.fdopen(await bus.call(guest.path, GUEST, "Screenshot"), "rb") as file:
        picture = file.read()
    if name == "-":
        sys.stdout.buffer.write(picture)
        return 0
    try:
        Path(name).write_bytes(picture)
    except OSError as error:
        raise Failure(f"cannot write {name}: {error.strerror}") from error
    print(json.dumps({"file": name}) if arguments.json else name)
    return 0


async def _view(bus: Bus, guest: Guest, arguments: argparse.Namespace) -> int:
    """The viewer gets a port of this machine, which takes nobody but this user."""
    program, form = _viewer(arguments.viewer)
    os.close(await bus.call(guest.path, GUEST, "OpenDisplay"))  # a refusal is better said before a window comes
    server = await asyncio.start_server(lambda *ends: _serve(bus, guest, *ends), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        viewer = await asyncio.create_subprocess_exec(program, form.format(port=port, display=port - 5900))
        status = await viewer.wait()
    finally:
        server.close()
    if status:
        raise Failure(f"{program} ended with {status}")
    return 0


def _viewer(wanted: str | None) -> tuple[str, str]:
    for name in [wanted] if wanted else VIEWERS:
        if program := shutil.which(name):
            return program, VIEWERS.get(Path(name).name, "127.0.0.1::{port}")
    names = wanted or ", ".join(VIEWERS)
    raise Failure(f"there is no viewer: {names} (install virt-viewer or tigervnc-viewer; kvmctl screenshot needs none)")


async def _serve(bus: Bus, guest: Guest, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        if owner(writer.get_extra_info("peername")) != os.getuid():
            return
        stream = socket.socket(fileno=await bus.call(guest.path, GUEST, "OpenDisplay"))
        their_reader, their_writer = await asyncio.open_connection(sock=stream)
        await asyncio.wait(
            [asyncio.create_task(_pump(reader, their_writer)), asyncio.create_task(_pump(their_reader, writer))],
            return_when=asyncio.FIRST_COMPLETED,
        )
        their_writer.close()
    except (Failure, OSError) as error:
        print(f"kvmctl: {error}", file=sys.stderr)
    finally:
        writer.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(PIECE):
            writer.write(data)
            await writer.drain()
    except OSError:
        return


def owner(peer: tuple[str, int]) -> int | None:
    """Whose socket on this machine has this IPv4 address and port (proc(5), /proc/net/tcp)."""
    address, port = peer
    [number] = struct.unpack("=I", socket.inet_aton(address))
    wanted = f"{number:08X}:{port:04X}"
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[1] == wanted:
            return int(fields[7])
    return None
