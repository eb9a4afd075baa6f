"""The part of `tests/bench/run peers` that runs inside the host; the last line printed is JSON: {series: [value, …]}.

bench.inside_peers prepare        libvirt's daemons, and a journal that keeps every line
bench.inside_peers serial N       one guest that prints, N times
bench.inside_peers autostart N    50 guests at once, N times; libvirt's once
bench.inside_peers fill COUNT     start guests until kvmd and libvirt have COUNT each; they stay
bench.inside_peers memory         proportional set sizes
bench.inside_peers recovery N     both daemons killed, N times
bench.inside_peers idle SECONDS   what both daemons do meanwhile
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from systemd import journal

from .inside import BARE, CONFIGURATION, MANAGER, PATIENCE, ROM, SCRATCH, Client, wait_until

LINES = 20_000
LINE = 64  # bytes
CHATTY = "/var/lib/kvmd/chatty"  # a ROM that prints LINES lines
AUTOSTARTED = 50
VIRSH = 4  # connections to libvirt side by side
SETTLE = 1.0  # seconds between measurements
LIBVIRT = ("libvirtd", "virtlogd")

# As little of a machine as libvirt makes; the file is written by virtlogd.
DOMAIN = """<domain type="qemu" xmlns:qemu="http://libvirt.org/schemas/domain/qemu/1.0">
<name>{name}</name><memory unit="MiB">32</memory><vcpu>1</vcpu><os><type machine="q35">hvm</type></os>
<devices><emulator>/usr/bin/qemu-system-x86_64</emulator><controller type="usb" model="none"/>
<memballoon model="none"/><serial type="file"><source path="{serial}"/></serial></devices>
<qemu:commandline><qemu:arg value="-bios"/><qemu:arg value="{rom}"/></qemu:commandline></domain>
"""

Series = defaultdict[str, list[float]]


def run(*argv: str, input: str = "") -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=120, input=input).stdout


def main_pid(service: str) -> int:
    return int(run("systemctl", "show", "-P", "MainPID", service))


def pids_of_libvirt() -> list[int]:
    return [pid for pid in map(main_pid, LIBVIRT) if pid]


def cpu(*pids: int) -> float:
    """Microseconds that these processes have used."""
    ticks = (Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[11:13] for pid in pids)
    return sum(int(field) for fields in ticks for field in fields) * 1e6 / os.sysconf("SC_CLK_TCK")


def switches(*pids: int) -> int:
    """Context switches of these processes and their threads."""
    statuses = (path.read_text() for pid in pids for path in Path(f"/proc/{pid}/task").glob("*/status"))
    return sum(int(row.split()[1]) for status in statuses for row in status.splitlines() if "ctxt_switches" in row)


def pss(*pids: int) -> float:
    """MiB."""
    rollups = (Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines() for pid in pids)
    return sum(int(row.split()[1]) for rollup in rollups for row in rollup if row.startswith("Pss:")) / 1024


# --- guests -----------------------------------------------------------------------------------------------------------


async def connect() -> Client:
    client = Client()
    await client.connect()
    return client


async def declare(client: Client, names: Sequence[str], rom: str = ROM) -> None:
    """Guest files for kvmd."""
    for name in names:
        text = f'memory = "32M"\naccelerator = "tcg"\n[qemu]\nargs = ["-bios", "{rom}"]\n'
        (CONFIGURATION / f"{name}.toml").write_text(text)
    await client.call(MANAGER, "Reload")


def start_units(names: Sequence[str]) -> None:
    run("systemctl", "start", *(f"kvmd@{name}" for name in names))


async def end(client: Client, names: Sequence[str]) -> None:
    """Power off, files gone, and systemd has noticed."""
    await asyncio.gather(
        *(client.call(("org.kvmd1", f"/org/kvmd1/guest/{name}", "org.kvmd1.Guest"), "Terminate") for name in names)
    )
    for name in names:
        await client.quiet(name)
        (CONFIGURATION / f"{name}.toml").unlink()
    await client.call(MANAGER, "Reload")


async def running(client: Client) -> int:
    guests: list[tuple[str, str, str]]
    (guests,) = await client.call(MANAGER, "ListGuests")  # type: ignore[assignment]
    return sum("running" in guest for guest in guests)


def serial_file(name: str) -> Path:
    return SCRATCH / f"{name}.serial"


def virsh(*commands: str) -> None:
    """Some connections to libvirt side by side, each with its share of the commands."""
    shares = [commands[first::VIRSH] for first in range(VIRSH)]
    shells = [subprocess.Popen(["virsh", "-q"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) for _ in shares]
    for shell, share in zip(shells, shares, strict=True):
        assert shell.stdin
        shell.stdin.write("".join(f"{command}\n" for command in share).encode())
        shell.stdin.close()
    for shell in shells:
        shell.wait(120)


def define(names: Sequence[str], rom: str = ROM) -> None:
    """Domains for libvirt."""
    for name in names:
        (SCRATCH / f"{name}.xml").write_text(DOMAIN.format(name=name, rom=rom, serial=serial_file(name)))
    virsh(*(f"define {SCRATCH / name}.xml" for name in names))


def undefine(names: Sequence[str]) -> None:
    virsh(*(f"destroy {name}" for name in names))
    virsh(*(f"undefine {name}" for name in names))
    for name in names:
        serial_file(name).unlink()


def active() -> int:
    return len(run("virsh", "-q", "list", "--name").split())


def has_printed(path: Path, size: int = 1) -> bool:
    return path.exists() and path.stat().st_size >= size


def wait_for_output(paths: Sequence[Path], begin: int) -> float:
    """Milliseconds since ``begin`` when the last of these files has its first byte."""
    for path in paths:
        wait_until(lambda path=path: has_printed(path), f"output in {path}", 0.005)  # type: ignore[misc]
    return (time.perf_counter_ns() - begin) / 1e6


# --- serial -----------------------------------------------------------------------------------------------------------


def stamps(*matches: str) -> tuple[float, float]:
    """When the journal got the first and the last of LINES lines, in seconds since the epoch; waits for the last."""
    with journal.Reader(journal.LOCAL_ONLY) as reader:
        for match in matches:
            reader.add_match(match)

        def complete() -> bool:
            reader.process()
            reader.seek_tail()
            return str(reader.get_previous().get("MESSAGE", "")).startswith(f"{LINES:08d} ")

        wait_until(complete, f"{LINES} lines in the journal with {matches}", 0.1)
        reader.seek_tail()
        last = reader.get_previous()["__REALTIME_TIMESTAMP"].timestamp()
        reader.seek_head()
        entries = iter(reader.get_next, {})
        first = next(entries)["__REALTIME_TIMESTAMP"].timestamp()
        count = 1 + sum(1 for _ in entries)
    if count != LINES:
        raise RuntimeError(f"{count} lines in the journal with {matches}")
    return first, last


def log_bare(series: Series, number: int) -> None:
    name = f"bare-{number}"
    journald = main_pid("systemd-journald")
    before = cpu(journald)
    argv = [*BARE[:-1], CHATTY, "-serial", "stdio", "-monitor", "none"]
    qemu = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    cat = subprocess.Popen(["systemd-cat", "-t", name], stdin=qemu.stdout)
    assert qemu.stdout
    qemu.stdout.close()
    first, last = stamps(f"SYSLOG_IDENTIFIER={name}")
    spent = cpu(journald) - before
    own = cpu(cat.pid)
    qemu.kill()
    qemu.wait()
    cat.wait(PATIENCE)
    add_serial(series, "bare", last - first, own, spent)


async def log_kvmd(series: Series, client: Client, number: int) -> None:
    name = f"chatty{number}"
    await declare(client, [name], CHATTY)
    journald, daemon = main_pid("systemd-journald"), main_pid("kvmd")
    before = cpu(journald)
    await client.start(name)
    own = cpu(daemon)
    first, last = stamps(f"KVMD_GUEST={name}", "KVMD_STREAM=serial")
    add_serial(series, "kvmd", last - first, cpu(daemon) - own, cpu(journald) - before)
    await end(client, [name])


def log_libvirt(series: Series) -> None:
    define(["chatty"], CHATTY)
    path = serial_file("chatty")
    run("systemctl", "start", "virtlogd.service")
    logger = main_pid("virtlogd")
    own = cpu(logger)
    run("virsh", "-q", "start", "chatty")
    wait_until(lambda: has_printed(path), "libvirt's first line", 0.005)
    begin, size = time.perf_counter(), path.stat().st_size
    wait_until(lambda: has_printed(path, LINES * LINE), "libvirt's last line", 0.005)
    seconds = (time.perf_counter() - begin) * LINES * LINE / (LINES * LINE - size)
    add_serial(series, "libvirt", seconds, cpu(logger) - own, 0)
    undefine(["chatty"])


def add_serial(series: Series, who: str, seconds: float, own: float, journald: float) -> None:
    """Microseconds for each line."""
    series[f"serial: {who}"].append(seconds * 1e6 / LINES)
    series[f"serial CPU: {who}"].append(own / LINES)
    series[f"serial CPU with journald: {who}"].append((own + journald) / LINES)


async def serial(count: int) -> Series:
    series, client = Series(list), await connect()
    for number in range(count):
        log_bare(series, number)
        await log_kvmd(series, client, number)
        log_libvirt(series)
    return series


# --- autostart --------------------------------------------------------------------------------------------------------


def autostart_bare() -> float:
    paths = [serial_file(f"bare{number}") for number in range(AUTOSTARTED)]
    scope = ("systemd-run", "--scope", "--quiet", "--collect", "--", *BARE)
    begin = time.perf_counter_ns()
    children = [subprocess.Popen([*scope, "-serial", f"file:{path}"]) for path in paths]
    spent = wait_for_output(paths, begin)
    for child, path in zip(children, paths, strict=True):
        child.kill()  # QEMU: systemd-run has become it
        child.wait(PATIENCE)
        path.unlink()
    return spent


async def autostart_kvmd(client: Client, names: Sequence[str]) -> float:
    """As `systemctl start` of all units, which is what a boot does."""
    await declare(client, names)
    begin = time.time_ns()
    start_units(names)
    last: dict[str, float] = {}
    with journal.Reader(journal.LOCAL_ONLY) as reader:
        reader.add_match("KVMD_STREAM=serial", "KVMD_OFFSET=0")
        reader.seek_realtime(begin / 1e9)

        def complete() -> bool:
            while entry := reader.get_next():
                last[entry["KVMD_GUEST"]] = entry["__REALTIME_TIMESTAMP"].timestamp()
            reader.process()
            return set(names) <= last.keys()

        wait_until(complete, "the first line of each guest")
    await end(client, names)
    return (max(last.values()) - begin / 1e9) * 1e3


def autostart_libvirt(names: Sequence[str]) -> float:
    """libvirtd starts, for the first time since boot."""
    define(names)
    virsh(*(f"autostart {name}" for name in names))
    run("systemctl", "stop", "libvirtd.service")
    Path("/run/libvirt/qemu/autostarted").unlink(missing_ok=True)
    begin = time.perf_counter_ns()
    run("systemctl", "start", "libvirtd.service")
    spent = wait_for_output([serial_file(name) for name in names], begin)
    undefine(names)
    return spent


async def autostart(count: int) -> Series:
    series, client = Series(list), await connect()
    names = [f"auto{number}" for number in range(AUTOSTARTED)]
    for _ in range(count):
        series["autostart: bare"].append(autostart_bare())
        await asyncio.sleep(SETTLE)
        series["autostart: kvmd"].append(await autostart_kvmd(client, names))
        await asyncio.sleep(SETTLE)
    series["autostart: libvirt"].append(autostart_libvirt(names))
    return series


# --- many guests ------------------------------------------------------------------------------------------------------


async def fill(count: int) -> Series:
    client = await connect()
    names = [f"many{number}" for number in range(await running(client), count)]
    await declare(client, names)
    start_units(names)
    define(names)
    virsh(*(f"start {name}" for name in names))
    if (found := (await running(client), active())) != (count, count):
        raise RuntimeError(f"kvmd and libvirt have {found} guests, wanted {count} each")
    await asyncio.sleep(SETTLE)
    return Series(list)


async def recovery(count: int) -> Series:
    """SIGKILL → all guests that ran are listed as running."""
    series, client = Series(list), await connect()
    guests, domains = await running(client), active()
    for _ in range(count):
        begin = time.perf_counter_ns()
        os.kill(main_pid("kvmd"), signal.SIGKILL)
        await wait_for_guests(client, guests)
        series["recovery: kvmd"].append((time.perf_counter_ns() - begin) / 1e6)
        await asyncio.sleep(SETTLE)
        begin = time.perf_counter_ns()
        os.kill(main_pid("libvirtd"), signal.SIGKILL)
        wait_until(lambda: list_domains() >= domains, "libvirt's domains", 0.005)
        series["recovery: libvirt"].append((time.perf_counter_ns() - begin) / 1e6)
        await asyncio.sleep(SETTLE)
    return series


async def wait_for_guests(client: Client, count: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            if await running(client) >= count:
                return
        except RuntimeError:  # not on the bus yet
            pass
        if time.monotonic() > deadline:
            raise TimeoutError(f"kvmd does not list {count} guests again")
        await asyncio.sleep(0.005)


def list_domains() -> int:
    done = subprocess.run(["virsh", "-q", "list", "--name"], capture_output=True, text=True, timeout=60)
    return len(done.stdout.split()) if not done.returncode else -1


def memory() -> Series:
    return Series(list, {"memory: kvmd": [pss(main_pid("kvmd"))], "memory: libvirt": [pss(*pids_of_libvirt())]})


def idle(seconds: int) -> Series:
    """Milliseconds of CPU and context switches, each second."""
    groups = {"kvmd": [main_pid("kvmd")], "libvirt": pids_of_libvirt()}
    before = {who: (cpu(*pids), switches(*pids)) for who, pids in groups.items()}
    time.sleep(seconds)
    series = Series(list)
    for who, pids in groups.items():
        series[f"idle CPU: {who}"].append((cpu(*pids) - before[who][0]) / 1e3 / seconds)
        series[f"idle switches: {who}"].append((switches(*pids) - before[who][1]) / seconds)
    return series


# --- all of it --------------------------------------------------------------------------------------------------------


def prepare() -> Series:
    SCRATCH.mkdir(exist_ok=True)
    SCRATCH.chmod(0o777)
    drop_in = Path("/run/systemd/journald.conf.d/bench.conf")
    drop_in.parent.mkdir(parents=True, exist_ok=True)
    drop_in.write_text("[Journal]\nRateLimitIntervalSec=0\n")  # systemd-cat has no unit of its own to say so
    run("systemctl", "restart", "systemd-journald")
    run("systemctl", "start", "kvmd", "virtlogd.socket", "libvirtd.socket", "libvirtd.service")
    return Series(list)


def main(verb: str, count: int) -> Series:
    match verb:
        case "prepare":
            return prepare()
        case "serial":
            return asyncio.run(serial(count))
        case "autostart":
            return asyncio.run(autostart(count))
        case "fill":
            return asyncio.run(fill(count))
        case "recovery":
            return asyncio.run(recovery(count))
        case "memory":
            return memory()
        case _:
            return idle(count)


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]))))
