"""list, status, top."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from typing import Any

from kvmd.ctl.bus import GUEST, Bus, connect
from kvmd.ctl.failure import NOT_RUNNING, USAGE, Failure
from kvmd.ctl.guests import Guest, choose, usage
from kvmd.ctl.hosts import group, there
from kvmd.ctl.progress import colourful, columns
from kvmd.ctl.table import COLOURS, RESET, render, size, span

HEAD = ("NAME", "STATE", "UP", "MEMORY", "CPU", "ADDRESS", "DESCRIPTION")
CLEAR = "\033[H\033[J"


async def run(arguments: argparse.Namespace) -> int:
    if getattr(arguments, "all_hosts", False):
        if arguments.watch:
            raise Failure("--watch is for one host", status=USAGE)
        return await _all_hosts(arguments)
    async with connect() as bus:
        return int(await {"list": _list, "status": _status, "top": _top}[arguments.verb](bus, arguments))


def _complain(failures: list[Failure]) -> int:
    for failure in failures:
        print(f"kvmctl: {failure}", file=sys.stderr)
    return max((failure.status for failure in failures), default=0)


async def _list(bus: Bus, arguments: argparse.Namespace) -> int:
    if not arguments.watch:
        return await _list_once(bus, arguments)
    changes = asyncio.Event()
    await bus.watch(lambda *_change: changes.set())
    while True:
        changes.clear()
        if sys.stdout.isatty() and not arguments.json:
            sys.stdout.write(CLEAR)
        await _list_once(bus, arguments)
        sys.stdout.flush()
        await changes.wait()


async def _list_once(bus: Bus, arguments: argparse.Namespace) -> int:
    guests, failures = await choose(bus, arguments.names)
    used = await usage(bus, guests)
    if arguments.json:
        print(json.dumps([_as_json(guest, used) for guest in guests]))
        return _complain(failures)
    rows = [_row(guest, used) for guest in guests]
    for line in render(HEAD, rows, columns=columns(), colour=colourful(), legend=not arguments.no_legend):
        print(line)
    return _complain(failures)


def _as_json(guest: Guest, used: dict[str, tuple[int, int]]) -> dict[str, Any]:
    memory, cpu = used.get(guest.name, (0, 0))
    return {**guest.properties, "MemoryCurrent": memory, "CPUUsageNSec": cpu}


def _row(guest: Guest, used: dict[str, tuple[int, int]]) -> tuple[str, ...]:
    memory, cpu = used.get(guest.name, (0, 0))
    addresses = guest.addresses
    more = f" +{len(addresses) - 1}" if len(addresses) > 1 else ""
    return (
        guest.name,
        guest.state,
        up(guest) or "-",
        size(memory) if memory else "-",
        span(cpu / 1e9) if cpu else "-",
        f"{addresses[0]}{more}" if addresses else "-",
        guest.properties["StateReason"] or guest.properties["Description"],
    )


def up(guest: Guest) -> str:
    started = guest.properties["StartTimestamp"]
    return span(time.time() - started / 1e6) if started else ""


async def _all_hosts(arguments: argparse.Namespace) -> int:
    """Each is asked now, all at once; one that does not answer is named."""
    hosts = group()
    outcomes = await asyncio.gather(*(there(host, ["list", "--json", *arguments.names]) for host in hosts))
    failures = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
    answers = [(host, outcome) for host, outcome in zip(hosts, outcomes, strict=True) if isinstance(outcome, list)]
    found = sorted(
        ((told["Name"], host, told) for host, guests in answers for told in guests), key=lambda each: each[:2]
    )
    if arguments.json:
        print(json.dumps([{"Host": host, **told} for _name, host, told in found]))
    else:
        used = [{name: (told["MemoryCurrent"], told["CPUUsageNSec"])} for name, _host, told in found]
        rows = [(host, *_row(Guest("", told), use)) for (_name, host, told), use in zip(found, used, strict=True)]
        shown = render(("HOST", *HEAD), rows, columns=columns(), colour=colourful(), legend=not arguments.no_legend)
        print("\n".join(shown))
    return _complain(failures)


async def _status(bus: Bus, arguments: argparse.Namespace) -> int:
    guests, failures = await choose(bus, arguments.names)
    used = await usage(bus, guests)
    said = await asyncio.gather(*(_last(bus, guest, arguments.lines) for guest in guests))
    logs = dict(zip((guest.name for guest in guests), said, strict=True))
    if arguments.json:
        print(json.dumps([{**_as_json(guest, used), "Log": logs[guest.name]} for guest in guests]))
    else:
        blocks = [_block(guest, used, logs[guest.name]) for guest in guests]
        print("\n\n".join("\n".join(block) for block in blocks))
    if failures:
        return _complain(failures)
    return 0 if all(guest.on for guest in guests) else NOT_RUNNING


async def _last(bus: Bus, guest: Guest, lines: int) -> list[str]:
    """Nothing for whom polkit does not let, or does not let without asking."""
    try:
        return list(await bus.call(guest.path, GUEST, "ReadLog", "t", max(lines, 0))) if lines else []
    except Failure:
        return []


def _block(guest: Guest, used: dict[str, tuple[int, int]], log: list[str]) -> list[str]:
    told = guest.properties
    state = guest.state
    if colourful() and state in COLOURS:
        state = f"{COLOURS[state]}{state}{RESET}"
    about = [told["StateReason"]] if told["StateReason"] else []
    if guest.on:
        about += [f"since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(told['StartTimestamp'] / 1e6))}"]
        about += [f"{up(guest)} ago"] if told["StartTimestamp"] else []
        about += [] if told["Ready"] else ["not ready yet"]
    elif told["Result"] != "success":
        about += [f"last run: {told['Result']}"]
    memory, cpu = used.get(guest.name, (0, 0))
    lines = [f"{guest.name}{' - ' if told['Description'] else ''}{told['Description']}"]
    lines.append(f"    State: {state}{' (' + ', '.join(about) + ')' if about else ''}")
    if guest.on:
        lines.append(f"      PID: {told['PID']} ({told['Accelerator']})")
        lines.append(f"     Uses: {size(memory) if memory else '?'} of memory, {span(cpu / 1e9)} of CPU time")
    for network in told["Networks"]:
        detail = f": {network['detail']}" if network["detail"] else ""
        where = f"{network['tap']} on {network['uplink'] or '-'}, {network['mac']}"
        lines.append(f"  Network: {where}, {network['state']}{detail}")
        lines += [f"           {address}" for address in network["addresses"]]
    for device, path in told.get("Media", {}).items():
        lines.append(f"    Media: {device}: {path or 'empty'}")
    changed = " (changed since its start: kvmctl restart)" if told["NeedsRestart"] else ""
    lines.append(f"     File: {told['ConfigFile']}{changed}")
    lines.append(f"     Boot: {'started with the host' if told['Autostart'] else 'not started with the host'}")
    return [*lines, *([""] if log else []), *(f"  {line}" for line in log)]


async def _top(bus: Bus, arguments: argparse.Namespace) -> int:
    before: dict[str, tuple[int, int]] = {}
    then = time.monotonic()
    while True:
        guests, failures = await choose(bus, arguments.names)
        on = [guest for guest in guests if guest.on]
        used, now = await usage(bus, on), time.monotonic()
        passed = now - then
        shares = {
            name: (cpu - before[name][1]) / 1e7 / passed if name in before else 0.0
            for name, (_memory, cpu) in used.items()
        }
        on.sort(key=lambda guest: (-shares[guest.name], guest.name))
        if arguments.json:
            print(json.dumps([{**_as_json(guest, used), "CPUPercent": round(shares[guest.name], 1)} for guest in on]))
        else:
            if sys.stdout.isatty() and not arguments.once:
                sys.stdout.write(CLEAR)
            rows = [_use(guest, shares[guest.name], *used[guest.name]) for guest in on]
            print("\n".join(render(("NAME", "CPU", "MEMORY", "TIME", "UP"), rows, columns=columns())))
        sys.stdout.flush()
        if arguments.once:
            return _complain(failures)
        before, then = used, now
        await asyncio.sleep(max(arguments.delay, 0.2))


def _use(guest: Guest, share: float, memory: int, cpu: int) -> tuple[str, ...]:
    return guest.name, f"{share:.1f}%", size(memory) if memory else "-", span(cpu / 1e9), up(guest)
