"""start, stop, restart, reset, pause, resume: several guests at once, and what became of each."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from typing import Any

from kvmd.ctl.bus import GUEST, MANAGER, ROOT, Bus, Variant, connect
from kvmd.ctl.console import attach
from kvmd.ctl.failure import FAILED, Failure
from kvmd.ctl.guests import Guest, choose, plain
from kvmd.ctl.progress import Progress
from kvmd.ctl.table import span

DONE = {
    "start": "{name} runs",
    "stop": "{name} is off",
    "restart": "{name} runs again",
    "reset": "{name} was reset",
    "pause": "{name} is paused",
    "resume": "{name} goes on",
}
WORDS = 10  # serial lines that are shown of a start that failed


async def run(arguments: argparse.Namespace) -> int:
    options = start_options(arguments) if arguments.verb == "start" else {}
    if getattr(arguments, "console", False) and (len(arguments.names) > 1 or arguments.no_wait):
        raise Failure("--console is for one guest, and waits for it", status=2)
    async with connect() as bus:
        guests, failures = await choose(bus, arguments.names)
        silent = arguments.json
        with Progress(silent=silent) as progress:
            await bus.watch(_teller(guests, progress))
            ticking = asyncio.create_task(_tick(progress))
            try:
                outcomes = await asyncio.gather(*(_do(bus, guest, arguments, options, progress) for guest in guests))
            except asyncio.CancelledError:
                progress.clear()
                names = " ".join(guest.name for guest in guests)
                print(f"kvmctl: {names}: it goes on without this terminal (kvmctl status {names})", file=sys.stderr)
                raise
            finally:
                ticking.cancel()
        failures += [outcome for outcome in outcomes if isinstance(outcome, Failure)]
        _report(arguments, [outcome for outcome in outcomes if isinstance(outcome, str)], failures)
        if failures:
            return max(failure.status for failure in failures) if not guests else FAILED
    if getattr(arguments, "console", False):
        return await attach(guests[0].name)
    return 0


def start_options(arguments: argparse.Namespace) -> dict[str, Variant]:
    from pathlib import Path

    options = {"boot": arguments.boot, "cdrom": arguments.cdrom}
    if arguments.cdrom and (here := Path(arguments.cdrom)).exists():
        options["cdrom"] = str(here.absolute())
    return {name: Variant("s", value) for name, value in options.items() if value}


async def _do(
    bus: Bus, guest: Guest, arguments: argparse.Namespace, options: dict[str, Variant], progress: Progress
) -> str | Failure:
    verb, began = arguments.verb, time.monotonic()
    method = "Terminate" if verb == "stop" and arguments.now else verb.capitalize()
    waits = not getattr(arguments, "no_wait", False)
    timeout = getattr(arguments, "timeout", None)
    try:
        if verb in ("stop", "restart") and not guest.on and guest.state not in ("starting", "stopping"):
            if verb == "stop":
                return f"{guest.name} was off"
            method = "Start"
        if not waits:
            await bus.call(ROOT, MANAGER, "Begin", "ss", guest.name, verb)
            return f"{guest.name}: {verb} is under way"
        progress.step(guest.name, _doing(verb, guest.properties))
        if options:
            await bus.call(guest.path, GUEST, "StartWith", "a{sv}", options, within=timeout)
        else:
            await bus.call(guest.path, GUEST, method, within=timeout)
    except TimeoutError:
        state = plain(await bus.call(guest.path, "org.freedesktop.DBus.Properties", "Get", "ss", GUEST, "State"))
        where = f"{guest.name} is {state} after {timeout:g} s, and goes on (kvmctl status {guest.name})"
        return Failure(where)
    except Failure as failure:
        return await _with_last_words(bus, guest, verb, failure)
    finally:
        progress.done(guest.name)
    return f"{DONE[verb].format(name=guest.name)}{await _how(bus, guest, verb)} ({span(time.monotonic() - began)})"


async def _how(bus: Bus, guest: Guest, verb: str) -> str:
    if verb != "stop":
        return ""
    result = plain(await bus.call(guest.path, "org.freedesktop.DBus.Properties", "Get", "ss", GUEST, "Result"))
    return {"success": "", "timeout": ": it did not power off in time, its power was cut"}.get(result, f" ({result})")


async def _with_last_words(bus: Bus, guest: Guest, verb: str, failure: Failure) -> Failure:
    text = f"{guest.name}: {failure}"
    if verb in ("start", "restart") and failure.name.endswith((".StartFailed", ".Timeout")):
        try:
            lines = await bus.call(guest.path, GUEST, "ReadLog", "t", WORDS)
        except Failure:
            lines = []
        text += "".join(f"\n  | {line}" for line in lines)
    return Failure(text, failure.name)


def _teller(guests: list[Guest], progress: Progress) -> Any:
    """Follows what becomes of each, for ``progress``."""
    by_path = {guest.path: guest for guest in guests}

    def changed(path: str, member: str, values: list[Any]) -> None:
        guest = by_path.get(path)
        if guest and member == "PropertiesChanged":
            guest.properties.update(plain(values[1]))
            if guest.state in ("starting", "stopping"):
                progress.step(guest.name, _doing("", guest.properties))
            elif guest.state == "running" and not guest.properties["Ready"]:
                progress.step(guest.name, "runs, and is not ready yet")

    return changed


def _doing(verb: str, properties: dict[str, Any]) -> str:
    state = properties["State"]
    if state == "stopping" or verb in ("stop", "restart"):
        return f"is shutting down, its power is cut after {span(properties['TimeoutStopUSec'] / 1e6)}"
    if verb == "start" or state == "starting":
        return "waits until it is ready" if properties["PID"] else "is starting"
    return f"is {state}"


async def _tick(progress: Progress) -> None:
    while True:
        await asyncio.sleep(0.5)  # the clock in it goes on
        progress.draw()


def _report(arguments: argparse.Namespace, done: list[str], failures: list[Failure]) -> None:
    if arguments.json:
        import json

        print(json.dumps({"done": done, "failed": [{"error": each.name, "message": str(each)} for each in failures]}))
        return
    for line in done:
        print(line)
    for failure in failures:
        print(f"kvmctl: {failure}", file=sys.stderr)
