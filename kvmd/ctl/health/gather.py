"""A host → facts. Looks only: no module is loaded, no unit started, nobody asked for a password."""

from __future__ import annotations

import asyncio
import ctypes
import grp
import importlib.util
import json
import os
import platform
import pwd
import shutil
import stat
import time
from pathlib import Path
from typing import Any

from kvmd import __version__
from kvmd.ctl.bus import DBUS, MANAGER, NAME, PROPERTIES, ROOT, connect
from kvmd.ctl.failure import Failure
from kvmd.ctl.guests import all_guests, plain
from kvmd.ctl.health.facts import Bus, Device, Facts, Guest, Link, Space
from kvmd.ctl.health.software import VIEWERS

PROTOCOL = "171"  # of kvmd's routes and neighbours
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
WITHIN = 5.0  # seconds for each program, and for each answer of the bus
DEVICES = ("/dev/kvm", "/dev/net/tun", "/dev/vhost-net", "/dev/vhost-vsock")
SPACES = ("/var/lib/kvmd/images", "/run")
TOOLS = ("qemu-img", "ip", "dnsmasq", "swtpm")
OTHERS = {
    "ovmf": ("/usr/share/OVMF/OVMF_CODE_4M.fd",),
    "virtiofsd": ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd"),
}
STA_UNSYNC, STATUS_AT = 0x40, 40  # linux/timex.h: of the status, where it lies in struct timex of 64-bit hosts


async def gather() -> Facts:
    devices = {path: device for path in DEVICES if (device := _device(path))}
    async with asyncio.TaskGroup() as group:
        bus = group.create_task(_bus())
        systemd = group.create_task(_said("systemctl", "--version"))
        qemu = group.create_task(_said("qemu-system-x86_64", "--version"))
        machine = group.create_task(_said("systemd-detect-virt", "--vm"))
        container = group.create_task(_said("systemd-detect-virt", "--container"))
        complaint = group.create_task(_nothing() if "/dev/kvm" in devices else _complaint())
        may = group.create_task(_may())
        links = group.create_task(_rows("-d", "link", "show"))
        four = group.create_task(_rows("-4", "route", "show", "default"))
        six = group.create_task(_rows("-6", "route", "show", "default"))
        tagged = group.create_task(_tagged())
    inside = _virtual(container.result())
    there = links.result()
    return Facts(
        user=pwd.getpwuid(os.geteuid()).pw_name if _has_name() else str(os.geteuid()),
        may=may.result(),
        cpuinfo=_read("/proc/cpuinfo"),
        firmware_complaint=complaint.result(),
        virtualised=inside or _virtual(machine.result()) or "none",
        container=bool(inside),
        modules=frozenset(path.name for path in Path("/sys/module").glob("kvm*")),
        nested=_read("/sys/module/kvm_intel/parameters/nested") or _read("/sys/module/kvm_amd/parameters/nested"),
        devices=devices,
        kernel=platform.release(),
        systemd=_word(systemd.result(), 1),
        qemu=_word(qemu.result(), 3),
        kvmctl=__version__,
        tools=_tools(),
        bus=bus.result(),
        uplinks=None if there is None else {4: _uplink(there, four.result()), 6: _uplink(there, six.result())},
        forwarding={4: _switch("ipv4/ip_forward"), 6: _switch("ipv6/conf/all/forwarding")},
        taps=tuple(name for link in there or () if (name := str(link.get("ifname", ""))) and _is_tap(link, name)),
        tagged=tagged.result(),
        spaces={path: _space(path) for path in SPACES},
        journal_kept=Path("/var/log/journal").is_dir(),
        ranges={file: _range(file) for file in ("/etc/subuid", "/etc/subgid")},
        synchronised=_synchronised(),
        year=time.localtime().tm_year,
    )


async def _said(*argv: str) -> str | None:
    """What it prints; None where there is no such program, or no answer."""
    program = shutil.which(argv[0], path=PATH)
    if program is None:
        return None
    null = asyncio.subprocess.DEVNULL
    child = await asyncio.create_subprocess_exec(
        program, *argv[1:], stdin=null, stdout=asyncio.subprocess.PIPE, stderr=null, env={"LC_ALL": "C", "PATH": PATH}
    )
    try:
        async with asyncio.timeout(WITHIN):
            said, _ = await child.communicate()
    except TimeoutError:
        child.kill()
        await child.wait()
        return None
    return said.decode(errors="replace")


async def _nothing() -> str:
    return ""


async def _complaint() -> str | None:
    """The kernel's about the firmware, in this boot; None for whom its log is not to be read."""
    if os.geteuid() and not {"adm", "systemd-journal"} & _groups():
        return None
    words = ("-k", "-b", "-o", "cat", "-n", "1", "--no-pager", "-q", "-g", "disabled by bios")
    return (await _said("journalctl", *words) or "").strip()


def _groups() -> set[str]:
    return {group.gr_name for group in grp.getgrall() if group.gr_gid in os.getgroups()}


async def _may() -> str:
    """Of this user, as polkit says without asking anybody."""
    if os.geteuid() == 0:
        return "yes"
    program = shutil.which("pkcheck", path=PATH)
    if program is None:
        return "no"
    null = asyncio.subprocess.DEVNULL
    words = ("--action-id", "org.kvmd1.manage-guests", "--process", str(os.getpid()))
    child = await asyncio.create_subprocess_exec(program, *words, stdin=null, stdout=null, stderr=null)
    try:
        async with asyncio.timeout(WITHIN):
            return {0: "yes", 2: "asks"}.get(await child.wait(), "no")
    except TimeoutError:
        child.kill()
        await child.wait()
        return "no"


async def _rows(*words: str) -> list[dict[str, Any]] | None:
    """Of ip(8), as JSON."""
    said = await _said("ip", "-j", *words)
    try:
        return None if said is None else [row for row in json.loads(said or "[]") if isinstance(row, dict)]
    except ValueError:
        return None


async def _tagged() -> tuple[str, ...]:
    """Routes and neighbours that carry kvmd's number."""
    four, six, proxies = await asyncio.gather(
        _rows("-4", "route", "show", "table", "all", "proto", PROTOCOL),
        _rows("-6", "route", "show", "table", "all", "proto", PROTOCOL),
        _rows("neigh", "show", "proxy"),
    )
    routes = [f"route {row.get('dst')} dev {row.get('dev')}" for row in (*(four or ()), *(six or ()))]
    entries = [row for row in proxies or () if str(row.get("protocol")) == PROTOCOL]
    return (*routes, *(f"proxy entry {row.get('dst')} dev {row.get('dev')}" for row in entries))


def _uplink(links: list[dict[str, Any]], routes: list[dict[str, Any]] | None) -> Link | None:
    """Of the default route that is taken first."""
    usable = sorted((row for row in routes or () if "dev" in row), key=lambda row: int(row.get("metric", 0)))
    if not usable:
        return None
    name = str(usable[0]["dev"])
    link = next((link for link in links if link.get("ifname") == name), {})
    flags = link.get("flags", [])
    return Link(name, link.get("link_type") == "ether" and "NOARP" not in flags and "POINTOPOINT" not in flags)


def _is_tap(link: dict[str, Any], name: str) -> bool:
    """By kvmd's name: kv-NAME, kv2-NAME."""
    return link.get("linkinfo", {}).get("info_kind") == "tun" and name.startswith("kv") and "-" in name


async def _bus() -> Bus:
    """What does not run is not started by asking: its name has an owner, or it is not asked."""
    try:
        async with connect(asks=False) as bus:
            listed: list[str] = []
            for member in ("ListNames", "ListActivatableNames"):
                listed += await bus.call("/", DBUS, member, destination=DBUS, within=WITHIN)
            if not await bus.call("/", DBUS, "NameHasOwner", "s", NAME, destination=DBUS, within=WITHIN):
                return Bus(names=frozenset(listed), silent="kvmd does not run")
            try:
                about = plain(await bus.call(ROOT, PROPERTIES, "GetAll", "s", MANAGER, within=WITHIN))
                async with asyncio.timeout(WITHIN):
                    guests = await all_guests(bus)
            except (Failure, TimeoutError) as error:
                return Bus(names=frozenset(listed), silent=str(error) or f"kvmd has not answered within {WITHIN:.0f} s")
    except (Failure, TimeoutError) as failure:
        return Bus(problem=str(failure) or "the system bus does not answer")
    return Bus(
        names=frozenset(listed),
        version=about["Version"],
        accelerator=about["Accelerator"],
        problems=tuple(about["Problems"]),
        guests=tuple(_guest(guest.properties) for guest in guests),
    )


def _guest(told: dict[str, Any]) -> Guest:
    reason = told["StateReason"] or (told["Result"] if told["State"] == "failed" else "")
    return Guest(told["Name"], told["State"], bool(told["PID"]), reason, told["NeedsRestart"], tuple(told["Networks"]))


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _virtual(said: str | None) -> str:
    """By systemd-detect-virt(1), or nothing."""
    return "" if (said or "").strip() == "none" else (said or "").strip()


def _word(said: str | None, number: int) -> str:
    return ((said or "").split() + [""] * 8)[number]


def _has_name() -> bool:
    try:
        pwd.getpwuid(os.geteuid())
    except KeyError:
        return False
    return True


def _device(path: str) -> Device | None:
    try:
        status = Path(path).stat()
    except OSError:
        return None
    if not stat.S_ISCHR(status.st_mode):
        return None
    try:
        group = grp.getgrgid(status.st_gid).gr_name
    except KeyError:
        group = str(status.st_gid)
    return Device(stat.S_IMODE(status.st_mode), group, os.access(path, os.R_OK | os.W_OK))


def _tools() -> frozenset[str]:
    found = {tool for tool in TOOLS if shutil.which(tool, path=PATH)}
    found |= {name for name, paths in OTHERS.items() if any(Path(path).exists() for path in paths)}
    found |= {"pycdlib"} if importlib.util.find_spec("pycdlib") else set()
    return frozenset(found | ({"viewer"} if any(shutil.which(viewer) for viewer in VIEWERS) else set()))


def _switch(path: str) -> bool | None:
    said = _read(f"/proc/sys/net/{path}")
    return said != "0" if said else None


def _space(path: str) -> Space:
    """Of a directory, or the nearest above it that is there to be seen."""
    for directory in (Path(path), *Path(path).parents):
        try:
            found = os.statvfs(directory)
        except OSError:
            continue
        return Space(str(directory), found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize)
    return Space(path, 0, 0)


def _range(file: str) -> str:
    for line in _read(file).splitlines():
        owner, _, numbers = line.partition(":")
        first, _, count = numbers.partition(":")
        if owner == "kvmd-qemu" and first.isdecimal() and count.isdecimal():
            return f"{count} numbers from {first}"
    return ""


def _synchronised() -> bool | None:
    """As the kernel has it, who does it aside; None where it is not to be asked, as in containers."""
    timex = ctypes.create_string_buffer(512)
    if ctypes.CDLL(None, use_errno=True).adjtimex(timex) < 0:
        return None
    return not int.from_bytes(timex.raw[STATUS_AT : STATUS_AT + 4], "little") & STA_UNSYNC
