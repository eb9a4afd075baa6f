"""What an earlier daemon left: guests that run are taken over, what others left is cleared away."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from dataclasses import dataclass
from syslog import LOG_ERR, LOG_WARNING

from kvmd import runtime
from kvmd.config import directory
from kvmd.config.guestfile import HostIds
from kvmd.console.streams import bury
from kvmd.errors import KvmdError, StartFailed
from kvmd.guests.ending import CRASH, EVENTS, OOM, PANIC, REASONS
from kvmd.guests.machine import Host, Machine
from kvmd.qemu import pci, users
from kvmd.runtime import Runtime
from kvmd.systemd import fdstore
from kvmd.systemd.journal import Event, synchronize
from kvmd.systemd.scope import guest_name
from kvmd.systemd.units import Systemd


@dataclass(frozen=True)
class Recovered:
    """By the guests' names."""

    machines: dict[str, Machine]
    alone: dict[str, int]  # QEMU of those that run, but could not be taken over
    failures: dict[str, str]  # results of runs before this daemon's time


async def recover(host: Host, ids: HostIds, named: Collection[str], changed: Callable[[str], None]) -> Recovered:
    """``named``: guests with a file; ``changed(name)`` is for the machines. Raises ``KvmdError``."""
    await synchronize()
    running = {guest_name(unit) for unit in await host.systemd.units("active", "kvmd-*.scope")}
    found = runtime.guests()
    left = [name for name in found if name in running]
    outcomes = dict(zip(left, await asyncio.gather(*(_adopt(name, host, ids, changed) for name in left)), strict=True))
    machines = {name: outcome for name, outcome in outcomes.items() if isinstance(outcome, Machine)}
    alone = {name: outcome for name, outcome in outcomes.items() if isinstance(outcome, int)}
    ended = [name for name in found if name not in machines and name not in alone]
    await asyncio.gather(*(_bury(name, host) for name in ended))
    for name in running.difference(found):
        await host.systemd.clear_empty_scope(f"kvmd-{name}.scope")
    failures = await _find_failures(host.systemd, set(named).difference(machines))
    for name, result in failures.items():
        if name in ended and result != "start-failed":
            message = f"Guest {name} failed while there was no kvmd: {REASONS[result]}"
            host.journal.say(EVENTS[result], message, name, LOG_ERR)
    for unit in await host.systemd.units("failed", "kvmd-*.scope"):
        if await host.systemd.scope_result(unit) == "resources":  # its process had ended before it was put there
            await host.systemd.reset_failed(unit)
    fdstore.release_inherited({*machines, *alone})
    return Recovered(machines, alone, failures)


async def _adopt(name: str, host: Host, ids: HostIds, changed: Callable[[str], None]) -> Machine | int | None:
    """Take over what runs, or undo what an earlier daemon did not get done.

    The process ID of a QEMU that goes on alone, or None where none runs.
    """
    scope = f"kvmd-{name}.scope"
    try:
        snapshot, pid = Runtime(name).read()
    except StartFailed as error:
        host.journal.say(Event.START_FAILED, f"Guest {name} was not started: {error}", name, LOG_ERR)
        await host.systemd.clear_scope(scope)
        return None
    try:
        guest = directory.recall(name, snapshot, ids)
        machine = Machine(guest, Runtime(name).options(), snapshot, host, lambda: changed(name))
        await machine.adopt(pid)
    except ProcessLookupError:
        await host.systemd.clear_scope(scope)
        return None
    except Exception as error:  # noqa: BLE001  # whatever is found: it concerns no other guest, and ends no daemon
        reason = error if isinstance(error, KvmdError) else f"{type(error).__name__}: {error}"
        message = f"Guest {name} could not be taken over and goes on alone ({reason}): systemctl stop kvmd@{name}"
        host.journal.say(Event.FAILED, message, name, LOG_ERR)
        return pid
    return machine


async def _bury(name: str, host: Host) -> None:
    pci.take_back(Runtime(name).pci())
    try:
        await bury(name, host.journal)
    except Exception as error:  # noqa: BLE001  # as above
        message = f"The last words of guest {name} could not be logged ({type(error).__name__}: {error}), ignoring"
        host.journal.say(Event.FAILED, message, name, LOG_WARNING)
        Runtime(name).remove()
    users.withdraw(name)


async def _find_failures(systemd: Systemd, names: Collection[str]) -> dict[str, str]:
    """How guests failed whose end no daemon saw, or an earlier one did, is what PID 1 knows of their units."""
    failures: dict[str, str] = {}
    for unit in await systemd.units("failed", "kvmd@*.service"):
        name = unit.removeprefix("kvmd@").removesuffix(".service")
        if name not in names:
            continue
        result, main_process = await systemd.service_result(unit)
        if not main_process:
            failures[name] = "start-failed"
        elif await systemd.scope_result(f"kvmd-{name}.scope") == "oom-kill":
            failures[name] = OOM
        else:  # a panic is QEMU's only reason to exit with an error by itself
            failures[name] = PANIC if result == "exit-code" else CRASH
    return failures
