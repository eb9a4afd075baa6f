"""The screen of a guest: by VNC through the bus, a socket and TCP, and as a picture; of SeaBIOS, and of memtest86+."""

from __future__ import annotations

import base64
import json
import os
import struct
import zlib
from pathlib import Path

import lab
import pytest

from .guests import Guests

# What a viewer does, who speaks as little RFB (RFC 6143) as there is: prints the type of security, width, height, and
# how many colours the first picture has.
VIEWER = """
import asyncio, json, os, socket, struct, sys
from dbus_next import BusType, Message
from dbus_next.aio import MessageBus
async def ask(path, member):
    bus = await MessageBus(bus_type=BusType.SYSTEM, negotiate_unix_fd=True).connect()
    call = Message(destination="org.kvmd1", path=path, interface="org.kvmd1.Guest", member=member)
    reply = await bus.call(call)
    bus.disconnect()
    assert reply.unix_fds, reply.body
    return reply.unix_fds[reply.body[0]]
def call(path, member):
    return asyncio.run(ask(path, member))
def display(path):
    return socket.socket(fileno=call(path, "OpenDisplay"))
def at(path):
    viewer = socket.socket(socket.AF_UNIX)
    viewer.connect(path)
    return viewer
def greet(viewer, wanted=1):
    viewer.settimeout(20)
    file = viewer.makefile("rwb")
    assert file.read(12) == b"RFB 003.008\\n"
    file.write(b"RFB 003.008\\n"); file.flush()
    types = file.read(file.read(1)[0])
    if wanted not in types:
        return file, types[0], 0, 0
    file.write(bytes([wanted])); file.flush()
    assert file.read(4) == bytes(4)
    file.write(b"\\0"); file.flush()  # exclusive: all the others are to go
    width, height = struct.unpack(">HH", file.read(4))
    file.read(16)  # a pixel format, and then a name
    file.read(struct.unpack(">I", file.read(4))[0])
    return file, types[0], width, height
def look(viewer):
    file, security, width, height = greet(viewer)
    file.write(struct.pack(">BxH i", 2, 1, 0) + struct.pack(">BBHHHH", 3, 0, 0, 0, width, height)); file.flush()
    kind, count = struct.unpack(">BxH", file.read(4))
    pixels = b""
    for _ in range(count):
        x, y, w, h, encoding = struct.unpack(">HHHHi", file.read(12))
        assert encoding == 0, encoding
        pixels += file.read(w * h * 4)
    colours = len({pixels[i:i + 4] for i in range(0, len(pixels), 4)})
    print(json.dumps([security, width, height, len(pixels), colours]))
def shoot(path, name):
    picture = call(path, "Screenshot")
    assert os.lseek(picture, 0, os.SEEK_CUR) == 0
    try:
        os.write(picture, b"x")
        sys.exit("the picture can be changed")
    except OSError:
        pass
    open(name, "wb").write(os.read(picture, 1 << 24))
"""


def run(guests: Guests, script: str) -> str:
    return guests.host.run("python3", "-c", f"{VIEWER}\n{script}", timeout=60).stdout


def look(guests: Guests, viewer: str) -> list[int]:
    seen: list[int] = json.loads(run(guests, f"look({viewer})"))
    return seen


def shoot(guests: Guests, name: str) -> tuple[int, int, int]:
    """Width, height and number of colours; what is on the screen is kept where KVMD_PICTURES says."""
    run(guests, f"shoot({guests.path(name)!r}, '/tmp/shot.png')")
    data = guests.host.run("base64", "/tmp/shot.png").stdout
    guests.host.run("rm", "/tmp/shot.png")
    picture = base64.b64decode(data)
    if directory := os.environ.get("KVMD_PICTURES"):
        (Path(directory) / f"{name}.png").write_bytes(picture)
    return decode(picture)


def decode(picture: bytes) -> tuple[int, int, int]:
    """Of a PNG of 8 bits, red, green and blue, not interlaced (RFC 2083)."""
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    at, packed, header = 8, b"", b""
    while at < len(picture):
        (length,), kind = struct.unpack_from(">I", picture, at), picture[at + 4 : at + 8]
        chunk = picture[at + 8 : at + 8 + length]
        packed, header = packed + (chunk if kind == b"IDAT" else b""), chunk if kind == b"IHDR" else header
        at += length + 12
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    assert (depth, colour, interlaced) == (8, 2, 0)
    stride, rows, above, colours = 3 * width + 1, zlib.decompress(packed), bytes(3 * width), set()
    assert len(rows) == stride * height
    for start in range(0, len(rows), stride):
        above = _unfilter(rows[start], rows[start + 1 : start + stride], above)
        colours |= {above[i : i + 3] for i in range(0, len(above), 3)}
    return width, height, len(colours)


def _unfilter(kind: int, row: bytes, above: bytes) -> bytes:
    done = bytearray(row)
    for i, value in enumerate(row if kind else b""):
        left, up, corner = (done[i - 3] if i > 2 else 0), above[i], (above[i - 3] if i > 2 else 0)
        guess = _paeth(left, up, corner) if kind == 4 else (0, left, up, (left + up) // 2)[kind]
        done[i] = (value + guess) & 0xFF
    return bytes(done)


def _paeth(left: int, up: int, corner: int) -> int:
    guess = left + up - corner
    return min((left, up, corner), key=lambda each: abs(guess - each))


def descriptors(guests: Guests, name: str) -> int:
    return len(guests.host.run("ls", f"/proc/{guests.get(name, 'PID')}/fd").stdout.split())


def until_text(guests: Guests, name: str, size: tuple[int, int]) -> None:
    """Firmware takes a moment until it has a mode of its own, and writes something."""
    for _ in range(30):
        width, height, colours = shoot(guests, name)
        if (width, height) == size and colours > 1:
            return
    pytest.fail(f"the screen of {name} has {width}x{height} and {colours} colours")


def test_viewers_and_pictures(guests: Guests) -> None:
    host: lab.Host = guests.host
    host.copy_in(lab.roots.systems() / "boot/memtest86+x64.bin", "/var/lib/kvmd/images/memtest")
    guests.write("bios", 'memory = "64M"\n')
    boot = '[boot]\nkernel = "memtest"\ncmdline = "console=ttyS0,115200"\n'
    guests.write("memtest", f'machine = "pc"\nmemory = "64M"\n{boot}[display]\nvnc = true\n')
    guests.linux("blind")
    guests.start("bios", "memtest", "blind", ready=False)
    for method in ("Screenshot", "OpenDisplay"):
        refused = guests.guest("blind", method, check=False).stderr
        assert "guest blind has no screen (set vnc = true under [display] in its file, and restart it)" in refused
    until_text(guests, "bios", (720, 400))
    guests.wait("memtest", "Testing")
    assert shoot(guests, "memtest")[2] > 1
    bios, memtest = f"display({guests.path('bios')!r})", "at('/run/kvmd/memtest/vnc')"
    assert look(guests, bios)[:4] == [1, 720, 400, 4 * 720 * 400]
    security, width, height, pixels, colours = look(guests, memtest)
    assert (security, pixels) == (1, 4 * width * height)
    assert colours > 1
    assert host.run("stat", "-c", "%U %a", "/run/kvmd/memtest/vnc").stdout == "root 700\n"
    assert host.run("ls", "/run/kvmd/bios/vnc", check=False).returncode

    # one after the other, and while it is paused: nothing stays with QEMU
    shots = f"for n in range(30): shoot({guests.path('bios')!r}, '/dev/null')"
    before = descriptors(guests, "bios")
    run(guests, shots)
    guests.guest("bios", "Pause")
    run(guests, shots)
    guests.guest("bios", "Resume")
    assert descriptors(guests, "bios") == before

    # viewers that never read, though they asked for everything, keep nobody waiting; and there are 16 at most
    script = f"""
idle = [display({guests.path("memtest")!r}) for _ in range(15)]
for viewer in idle:
    file, _, width, height = greet(viewer)
    for _ in range(200):
        file.write(struct.pack(">BBHHHH", 3, 0, 0, 0, width, height))
    file.flush()
look({memtest})
shoot({guests.path("memtest")!r}, "/dev/null")
last = display({guests.path("memtest")!r})
try:
    call({guests.path("memtest")!r}, "OpenDisplay")
except AssertionError as error:
    print(error)
print(len({memtest}.recv(12)))
last.close()
look({memtest})
"""
    first, busy, hung_up, again = run(guests, script).splitlines()
    assert json.loads(first) == json.loads(again) == [1, width, height, pixels, json.loads(first)[4]]
    assert "guest memtest has 16 viewers already (close one)" in busy
    assert hung_up == "0"
    assert guests.get("memtest", "State") == "running"

    # the next daemon; who looks on goes on
    script = f"""
import subprocess
viewer = display({guests.path("memtest")!r})
file, _, width, height = greet(viewer)
subprocess.run(["systemctl", "restart", "kvmd"], check=True)
file.write(struct.pack(">BBHHHH", 3, 0, 0, 0, width, height)); file.flush()
print(file.read(1))
look({memtest})
"""
    assert run(guests, script).startswith("b'\\x00'\n[1, ")
    for name in ("bios", "memtest"):
        assert shoot(guests, name)[2] > 1
    guests.clear()
    host.run("rm", "/var/lib/kvmd/images/memtest")


@pytest.mark.complaints("is already used by guest clash")
def test_by_tcp_with_a_password(guests: Guests) -> None:
    """Where the file wants it: no password in any command line, and none asked for on the bus."""
    host: lab.Host = guests.host
    host.write("/etc/vnc-password", "secret12\n", 0o600)
    display = '[display]\nvnc = true\naddress = "{}"\n'
    password = 'password_file = "/etc/vnc-password"\n'
    guests.write("four", f'memory = "64M"\n{display.format("0.0.0.0:5907")}{password}')
    guests.write("six", f'memory = "64M"\n{display.format("[::1]:5908")}')
    guests.start("four", "six", ready=False)
    assert "secret12" not in host.run("ps", "-eo", "args").stdout

    def tcp(family: str, address: str, port: int) -> str:
        connect = f"viewer = socket.socket(socket.{family}); viewer.connect(({address!r}, {port}))"
        return run(guests, f"{connect}; print(greet(viewer)[1])")

    assert tcp("AF_INET", "127.0.0.1", 5907) == "2\n"  # a password
    assert tcp("AF_INET6", "::1", 5908) == "1\n"  # none
    assert look(guests, f"display({guests.path('four')!r})")[0] == 1
    assert look(guests, "at('/run/kvmd/four/vnc')")[0] == 1
    guests.write("clash", display.format("[::1]:5908"))
    checked = host.run("kvmd", "--check", check=False).stdout
    assert '"[::1]:5908" is already used by guest clash (choose another)' in checked, checked
    guests.clear()
    host.run("rm", "/etc/vnc-password")
