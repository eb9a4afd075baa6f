"""The daemon and its arguments: wiring only."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from pathlib import Path

from kvmd import __version__
from kvmd.config.directory import DIRECTORY, read
from kvmd.config.guestfile import HostIds
from kvmd.config.watch import Watch
from kvmd.errors import KvmdError, Problem

MACHINE_ID = Path("/etc/machine-id")
THREADS = 64  # of which storage that does not answer holds one for each start


def check(paths: Sequence[Path]) -> int:
    """``kvmd --check``: print every problem of every file, and to stderr what is doubtful; the exit status."""
    machine_id = ""  # derived MAC addresses are then others than this host's
    with suppress(OSError):
        machine_id = MACHINE_ID.read_text().strip()
    found = read(HostIds(machine_id), paths, same=lambda path: Path(os.path.realpath(path)))
    problems = found.problems + [Problem(str(path), 1, "", "there is no such file") for path in found.missing]
    for problem in sorted(problems):
        print(problem)
    for doubt in found.doubts:
        print(replace(doubt, what=f"warning: {doubt.what}"), file=sys.stderr)
    return 1 if problems else 0


async def serve() -> None:
    """Run until SIGTERM. Raises ``KvmdError`` when the daemon cannot work or has lost the bus."""
    from systemd import daemon

    from kvmd.bus.service import NAME, Service
    from kvmd.errors import Unavailable
    from kvmd.guests.manager import Manager
    from kvmd.network.dnsmasq import resolver_directories
    from kvmd.network.lan import Lan
    from kvmd.systemd.journal import Journal
    from kvmd.systemd.sysbus import SystemBus
    from kvmd.systemd.units import Systemd
    from kvmd.systemd.watchdog import feed, not_too_often, note_well

    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(THREADS))
    terminated = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, terminated.set)
    loop.add_signal_handler(signal.SIGINT, terminated.set)
    async with AsyncExitStack() as stack:
        try:
            journal = Journal()
        except OSError as error:
            raise Unavailable(f"cannot reach journald: {error.strerror} (is systemd-journald running?)") from error
        bus = await stack.enter_async_context(SystemBus())
        systemd = Systemd(bus)
        await systemd.start()
        await not_too_often(systemd)
        manager = Manager(systemd, journal)
        lan = await stack.enter_async_context(Lan(manager.report_network, manager.network_changed, bus=bus))
        stack.push_async_callback(manager.close)
        await manager.begin(lan)
        service = Service(bus, manager)
        manager.changed = service.refresh
        try:
            watch = Watch(DIRECTORY, manager.reload, links=True)
            stack.callback(watch.close)
        except OSError as error:
            raise Unavailable(f"cannot watch {DIRECTORY}: {error.strerror}") from error
        for directory in resolver_directories():
            with suppress(OSError):  # gone meanwhile
                stack.callback(Watch(directory, manager.resolvers_changed).close)
        await bus.own(NAME)
        daemon.notify("READY=1")
        manager.activate_units()
        await lan.begin()
        watchdog = asyncio.create_task(feed(), name="watchdog")
        well = asyncio.create_task(note_well(systemd), name="well")
        lost = asyncio.create_task(bus.lost(), name="bus")
        stop = asyncio.create_task(terminated.wait(), name="SIGTERM")
        try:
            await asyncio.wait((lost, stop, watchdog), return_when=asyncio.FIRST_COMPLETED)
            if not terminated.is_set():
                raise Unavailable("the system bus has gone; systemd starts kvmd again, guests are not disturbed")
            daemon.notify("STOPPING=1")
        finally:
            for task in (watchdog, lost, stop, well):
                task.cancel()


def main() -> int:
    parser = argparse.ArgumentParser(prog="kvmd", description="Runs the guests of /etc/kvmd (started by kvmd.service).")
    parser.add_argument("--version", action="version", version=f"kvmd {__version__}")
    parser.add_argument(
        "--check",
        nargs="*",
        type=Path,
        metavar="FILE",
        help="validate guest files (default: all of /etc/kvmd) and exit",
    )
    arguments = parser.parse_args()
    if arguments.check is not None:
        return check(arguments.check)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    try:
        asyncio.run(serve())
    except KvmdError as error:
        print(f"kvmd: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
