"""All guests: what their files say and what runs, start and stop by name, and word to the bus of what changed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from syslog import LOG_ERR
from typing import Any

from kvmd import __version__
from kvmd.config import guestfile
from kvmd.errors import Busy, InvalidOption, KvmdError, StartFailed, Unavailable
from kvmd.guest import AS_ALWAYS, NAME, Guest, StartOptions
from kvmd.guests.known import Known
from kvmd.guests.machine import Host, Machine, State
from kvmd.guests.recovery import recover
from kvmd.guests.register import Register
from kvmd.network.dnsmasq import Dnsmasq
from kvmd.network.lan import Lan
from kvmd.network.model.nicstatus import NicStatus
from kvmd.qemu import used
from kvmd.qemu.accelerator import Accelerator
from kvmd.systemd.journal import WRITTEN_BY_ROOT, Event, Journal, newest_first
from kvmd.systemd.sysbus import BusError
from kvmd.systemd.units import Systemd

LOG_LINES, LOG_BYTES = 10_000, 4 << 20  # of one reply; the bus would take 32 MiB
PROBLEMS, LONGEST_PROBLEM = 1000, 1000  # lines of the property; characters of one
LONGEST_BACK_OFF = 60.0


class Manager:
    """``changed`` is called with a guest's name, or with None for what concerns the manager itself."""

    def __init__(self, systemd: Systemd, journal: Journal) -> None:
        self._systemd = systemd
        self._journal = journal
        self._register = Register(guestfile.HostIds(""))
        self._accelerator = Accelerator(systemd, lambda: self.changed(None))
        self._tasks: set[asyncio.Task[Any]] = set()
        self._alone: dict[str, int] = {}  # QEMU of those that run, but could not be taken over
        self._reloading: asyncio.Task[None] | None = None
        self._closed = False
        self.changed: Callable[[str | None], None] = lambda name: None

    # what there is

    def properties(self) -> dict[str, object]:
        """org.kvmd1.Manager."""
        return {
            "Version": __version__,
            "Accelerator": "kvm" if self._accelerator.kvm.usable else "tcg",
            "Problems": _bounded([str(problem.for_everybody()) for problem in self._register.problems]),
        }

    def states(self) -> list[tuple[str, str]]:
        """Of the guests that the bus shows."""
        return sorted((known.name, known.state.value) for known in self._register if known.shown)

    def shows(self, name: str) -> bool:
        """Whether the bus shows this guest."""
        known = self._register.find(name)
        return known is not None and known.shown

    def guest_properties(self, name: str) -> dict[str, object]:
        """org.kvmd1.Guest. Raises ``NoSuchGuest``, or ``InvalidConfiguration`` with all that is wrong in its file."""
        return self._register.get(name).properties(self._host.lan)

    def running(self, name: str) -> Machine:
        """As ``Register.running``."""
        return self._register.running(name)

    def by_pid(self, pid: int) -> str:
        """The name of the guest. Raises ``NoSuchGuest``."""
        return self._register.by_pid(pid).name

    async def read_log(self, name: str, lines: int) -> list[str]:
        """The guest's last serial lines of this boot, oldest first, also of runs that are over; what fits in 4 MiB."""
        self._register.get(name)
        entries = newest_first(**WRITTEN_BY_ROOT, KVMD_GUEST=name, KVMD_STREAM="serial")
        return await asyncio.to_thread(_newest, entries, min(lines, LOG_LINES))

    # what the network says

    def report_network(self, tap: str, sentence: str, priority: int) -> None:
        """What ``Lan`` has to say to a person."""
        known = self._register.by_tap(tap)
        self._journal.say(Event.NETWORK, sentence, known.name if known else None, priority)

    def network_changed(self, status: NicStatus) -> None:
        if known := self._register.by_tap(status.tap):
            self.changed(known.name)
            if status.terms:
                self._configure(known)

    def resolvers_changed(self) -> None:
        """The host may have other name servers now."""
        for known in self._register:
            self._configure(known)

    def _configure(self, known: Known) -> None:
        """A guest that starts is told by itself, and once more when it runs."""
        if known.run and known.up:
            self._background(known.run.configure(), f"configure {known.name}")

    # start and stop

    async def start(self, name: str, options: StartOptions = AS_ALWAYS) -> None:
        """Start a guest, and its unit with it; returns once it runs. Starting a running guest is no error.

        With ``options`` it is: ``Busy``.
        """
        known = self._register.get(name)
        if known.on and options != AS_ALWAYS:
            raise Busy(f"guest {name} is on (stop it first: the options are for a start)")
        if known.run and known.starting is None and known.up:
            await known.run.wait_ready()
            return
        if known.run and known.starting is None:
            # PID 1 must have noticed the end of the last QEMU, lest it take the unit for active
            await self._systemd.settled(f"kvmd@{name}.service")
        task, run = self._starting(known, options)
        # The unit's own LaunchUnit joins this very start, whichever of the two comes first.
        job = asyncio.create_task(self._start_unit(f"kvmd@{name}.service", known))
        try:
            await asyncio.gather(asyncio.shield(task), job, return_exceptions=True)
        finally:
            if known.starting is task:
                known.starting = None
        task.result()
        if (result := job.result()) != "done":
            if run.halted:
                raise run.stopped()
            await run.terminate()
            raise StartFailed(f"systemd did not start kvmd@{name}.service (job {result}; see systemctl status)")

    async def _start_unit(self, unit: str, known: Known) -> str:
        if known.run:
            await known.run.released.wait()  # PID 1 has QEMU's scope to make first
            if known.run.halted:
                return "canceled"
        if self._reloading:
            await asyncio.wait((self._reloading,))
        try:
            return await self._systemd.start_unit(unit)
        except BusError as error:
            return str(error)

    async def launch_unit(self, name: str) -> None:
        """kvmd@NAME.service starts: the guest runs when this returns."""
        known, unit = self._register.get(name), f"kvmd@{name}.service"
        if known.run and known.starting is None and known.up:
            await self._launch(unit, known.run, known.run.wait_ready())
            return
        await self._back_off(unit)
        alone = known.starting is None
        task, run = self._starting(known)
        try:
            await self._launch(unit, run, asyncio.shield(task))
        finally:
            if alone and known.starting is task:
                known.starting = None
        if await self._systemd.state(unit) in ("inactive", "failed"):
            await run.terminate()  # nobody waits for it any more; one that is being stopped is left to ``halt_unit``

    async def _launch(self, unit: str, run: Machine, start: Awaitable[None]) -> None:
        """A guest that is stopped while it starts is no failure of its unit, which is stopped, too."""
        try:
            await start
        except KvmdError:
            if run.halted and await self._systemd.state(unit) == "activating":
                await self._stop_unit(unit)
            raise

    async def _back_off(self, unit: str) -> None:
        """A guest that ends again and again is started again at growing intervals. Raises ``Busy`` if it is not."""
        restarts = await self._systemd.restarts(unit)
        if restarts > 1:
            await asyncio.sleep(min(2.0 ** (restarts - 1), LONGEST_BACK_OFF))
            if await self._systemd.state(unit) != "activating":
                raise Busy(f"{unit} was stopped before its next start")

    def _starting(self, known: Known, options: StartOptions = AS_ALWAYS) -> tuple[asyncio.Task[None], Machine]:
        """The start in progress, or a new one, and of what."""
        if self._closed:
            raise Unavailable(f"kvmd is just being stopped, or started anew (start {known.name} once more)")
        if known.starting and known.run:
            return known.starting, known.run
        if known.state is State.STOPPING:
            raise Busy(f"guest {known.name} is being stopped (wait until it is off)")
        self._refuse_alone(known.name)
        if known.file.stale(known.name):  # changed a moment ago, or where nobody hears of it
            self.reload()
        guest = known.guest()
        expected = known.run.guest.nics if known.run else guest.nics
        known.run = Machine(guest, options, known.file.snapshot, self._host, lambda: self.changed(known.name))
        self.changed(known.name)
        if expected != guest.nics:
            self._declare()
        known.starting = self._background(self._start(known, known.run), f"start {known.name}")
        return known.starting, known.run

    async def _start(self, known: Known, run: Machine) -> None:
        try:
            await run.start(self._accelerator.find(run.guest), self._register.images())
            self._configure(known)
            await run.wait_ready()
        finally:
            self.changed(known.name)

    async def stop(self, name: str) -> None:
        """Stop a guest through its unit, so that systemd knows that it was asked for; returns once it is off."""
        known = self._register.get(name)
        await self._stop_unit(f"kvmd@{name}.service")
        await self._halt(known)

    def enqueue(self, name: str, verb: str) -> None:
        """Begin to start, stop or restart a guest, and return; its State tells the rest, and the journal why it fails.

        Raises ``KvmdError`` where there is nothing to begin with.
        """
        known = self._register.get(name)
        verbs: Mapping[str, Callable[[str], Coroutine[Any, Any, None]]]
        verbs = {"start": self.start, "stop": self.stop, "restart": self.restart}
        if verb not in verbs:
            raise InvalidOption(f"there is no verb {verb[:40]!a} to begin (there are {', '.join(verbs)})")
        if verb != "stop":
            known.guest()

        async def work() -> None:
            with contextlib.suppress(KvmdError):  # said in the journal
                await verbs[verb](name)

        self._background(work(), f"{verb} {name}")

    async def terminate(self, name: str) -> None:
        """Cut the power; returns once it is off. systemd is told that it was asked for. A start in progress ends."""
        known = self._register.get(name)
        run = known.run if known.run and known.starting and known.on else self.running(name)
        if run.guest.restart != "no":
            self._background(self._stop_unit(f"kvmd@{name}.service"), f"stop {name}")
        await run.terminate()

    def _background(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if self._closed:
            task.cancel()
        return task

    async def close(self) -> None:
        """Undo the starts in progress, while the network can still be heard of; what runs is left alone.

        Calls still come in, until the bus is left; they begin nothing any more.
        """
        self._closed = True
        while self._tasks:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _stop_unit(self, unit: str) -> None:
        with contextlib.suppress(BusError):
            await self._systemd.stop_unit(unit)

    async def halt_unit(self, name: str) -> None:
        """kvmd@NAME.service stops: the guest is off when this returns."""
        self._refuse_alone(name)
        await self._halt(self._register.get(name))

    def _refuse_alone(self, name: str) -> None:
        if name in self._alone and Path(f"/proc/{self._alone[name]}").exists():
            raise Busy(f"guest {name} runs out of kvmd's reach (systemctl stop kvmd@{name})")

    async def _halt(self, known: Known) -> None:
        if known.run and known.on:
            await known.run.stop()

    async def restart(self, name: str) -> None:
        """Stop, with the next start as systemd's very next job."""
        known = self._register.get(name)
        if not known.on:
            await self.start(name)
            return
        known.guest()  # nothing is stopped that could not be started again
        result = await self._systemd.restart_unit(f"kvmd@{name}.service")
        if result != "done":
            reason = known.run.failure if known.run else ""
            raise StartFailed(reason or f"systemd did not restart kvmd@{name}.service (job {result})")

    async def insert_media(self, name: str, device: str, path: str, uid: int) -> None:
        """Into a CD drive of a running guest, as ``Media.insert``."""
        try:
            await self.running(name).steering.media.insert(device, path, uid, self._register.images())
        finally:
            self.changed(name)

    async def eject_media(self, name: str, device: str, *, force: bool = False) -> None:
        """As ``Media.eject``."""
        try:
            await self.running(name).steering.media.eject(device, force=force)
        finally:
            self.changed(name)

    # files

    def reload(self) -> Awaitable[object]:
        """Read the guest files again; what runs stays as it was started, but for its limits: wait for these.

        And for systemd, which knows of them then; and for the network, which a daemon that has just started looks at,
        and clears up, after it is ready.
        """
        before, known = self._register.said_to_systemd(), self._register.names()
        names = self._read_files()
        self._declare()
        if known - self._register.names():
            self._forget()
        if self._register.said_to_systemd() != before:
            self._reloading = self._background(self._systemd.reload(), "daemon-reload")
        limits = [
            self._background(self._set_limits(guest, known.file.snapshot, run), f"limits of {known.name}")
            for known in self._register
            if (guest := known.file.guest) and (run := known.run) and known.on and guest.limits != run.guest.limits
        ]
        for name in (*names, None):
            self.changed(name)
        begun = self._background(self._host.lan.begun(), "network")
        return asyncio.gather(*limits, begun, *([self._reloading] if self._reloading else []))

    async def _set_limits(self, guest: Guest, snapshot: Mapping[str, bytes], run: Machine) -> None:
        """New limits hold at once, where nothing else has changed and none was taken away."""
        kept = run.guest.limits.keys() <= guest.limits.keys()
        if not kept or replace(guest, limits=run.guest.limits) != run.guest:
            return
        try:
            await run.set_limits(guest, snapshot)
        except (KvmdError, OSError) as error:
            message = f"The new [limits] of guest {guest.name} do not hold before its next start: {error}"
            self._journal.say(Event.FILE, message, guest.name, LOG_ERR)
        self.changed(guest.name)

    def _read_files(self) -> list[str]:
        """The names of all guests that were known or are now."""
        names, problems = self._register.read()
        for problem in problems:
            file = Path(problem.file)
            guest = file.stem if file.suffix == ".toml" and NAME.fullmatch(file.stem) else None
            self._journal.say(Event.FILE, str(problem), guest, LOG_ERR)
        return names

    def _forget(self) -> None:
        """What guests that are no more have used."""
        self._background(asyncio.to_thread(used.forget_all_but, self._register.names()), "forget images")

    def _declare(self) -> None:
        """Tell the network which taps to expect."""
        self._host.lan.declare(self._register.nics(), self._register.open_firewalls)

    async def begin(self, lan: Lan) -> None:
        """Read the files and adopt what an earlier daemon left running. Raises ``KvmdError``."""
        try:
            machine_id = Path("/etc/machine-id").read_text().strip()
        except OSError as error:
            raise Unavailable(f"cannot read /etc/machine-id: {error.strerror}") from error
        ids = guestfile.HostIds(machine_id)
        self._register = Register(ids)
        self._host = Host(lan, self._systemd, self._journal, Dnsmasq(self._systemd, self._journal))
        self._read_files()
        names = {known.name for known in self._register}
        found = await recover(self._host, ids, names, lambda name: self.changed(name))
        for name, machine in found.machines.items():
            self._register.add(name, machine)
        for name, result in found.failures.items():
            self._register.get(name).failed = result
        self._alone = found.alone
        self._declare()
        self._forget()
        await self._systemd.watch_machined(self._register_machines)
        self._register_machines()
        await self._accelerator.look()

    def _register_machines(self) -> None:
        """With a systemd-machined that has just started, or may have while there was no daemon."""
        for known in self._register:
            if known.run and known.run.pid and known.starting is None:
                self._background(known.run.register(), f"register {known.name}")

    def activate_units(self) -> None:
        """Make the units of adopted guests active where an interrupted start left them otherwise."""
        self._background(self._activate_units(), "activate units")

    async def _activate_units(self) -> None:
        with contextlib.suppress(BusError):
            active = set(await self._systemd.units("active", "kvmd@*.service"))
            for known in self._register:
                if known.on and f"kvmd@{known.name}.service" not in active:
                    self._background(self._activate_unit(known), f"activate {known.name}")

    async def _activate_unit(self, known: Known) -> None:
        unit = f"kvmd@{known.name}.service"
        with contextlib.suppress(BusError):
            if await self._systemd.state(unit) in ("inactive", "failed"):
                await self._start_unit(unit, known)


def _newest(entries: Iterator[Mapping[str, object]], lines: int) -> list[str]:
    """The messages of so many entries, or of as many as fit in one reply; the oldest first."""
    found, length = [], 0
    for entry in islice(entries, lines):
        message = str(entry.get("MESSAGE", "")).replace("\0", "�")  # D-Bus strings have no NUL
        length += len(message.encode()) + 8
        if length > LOG_BYTES:
            break
        found.append(message)
    return found[::-1]


def _bounded(lines: list[str]) -> list[str]:
    shown = [line if len(line) <= LONGEST_PROBLEM else f"{line[:LONGEST_PROBLEM]}…" for line in lines[:PROBLEMS]]
    more = len(lines) - len(shown)
    return [*shown, f"{more} more problems (kvmd --check lists all)"] if more else shown
