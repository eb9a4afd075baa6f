"""One running guest: started as one stack of things to undo, observed by pidfd and QMP, ended once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from enum import Enum
from syslog import LOG_ERR, LOG_INFO, LOG_NOTICE, LOG_WARNING
from typing import Any, Literal

from kvmd import runtime
from kvmd.console.streams import Streams
from kvmd.errors import KvmdError, StartFailed, Timeout, Unavailable
from kvmd.guest import Guest, StartOptions
from kvmd.guests import ending
from kvmd.guests.borrowed import Borrowed
from kvmd.guests.handles import InUse, Use, open_handles
from kvmd.guests.nics import Nics
from kvmd.guests.readiness import Readiness
from kvmd.guests.stall import Stall
from kvmd.guests.steering import Steering
from kvmd.guests.tpm import Tpm
from kvmd.network.dnsmasq import Dnsmasq
from kvmd.network.lan import Lan
from kvmd.qemu import users
from kvmd.qemu.accelerator import Kvm
from kvmd.qemu.argv import argv
from kvmd.qemu.process import Descriptors, Process, spawn
from kvmd.qemu.qmp import Qmp, QmpError
from kvmd.runtime import Runtime
from kvmd.systemd import scope
from kvmd.systemd.journal import Event, Journal
from kvmd.systemd.sysbus import DISCONNECTED, BusError
from kvmd.systemd.units import Systemd

POWER_BUTTON_INTERVAL = 2.0
QUIT_TIMEOUT = 2.0
GREETING_TIMEOUT = 90.0  # QEMU may have much memory to allocate first
MONITOR_PATIENCE = 0.3
MOST_DRIVES = 16  # that QEMU is asked about: of each it says up to 3 KiB, and more than 64 KiB are not read


class State(Enum):
    """As on the bus."""

    STOPPED = "stopped"
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPING = "stopping"
    FAILED = "failed"


@dataclass(frozen=True)
class Host:
    """What every guest of this host shares."""

    lan: Lan
    systemd: Systemd
    journal: Journal
    dnsmasq: Dnsmasq


async def all_of(*work: Coroutine[Any, Any, None]) -> None:
    """Do everything at once; the first failure ends the rest, and is raised."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Machine:
    """A guest from the moment it is asked to start until all it left is gone; ``closed`` is set then."""

    def __init__(
        self,
        guest: Guest,
        options: StartOptions,
        snapshot: Mapping[str, bytes],
        host: Host,
        changed: Callable[[], None],
    ) -> None:
        self.guest = guest
        self._options = options
        self._booted = guest.started_with(options)
        self._snapshot = snapshot
        self._host = host
        self._changed = changed
        self._runtime = Runtime(guest.name)
        self._readiness = Readiness(guest, self._runtime, host.journal, changed)
        self.ready = self._readiness.ready
        self._nics = Nics(guest, host.lan, host.dnsmasq)
        self._tpm = Tpm(guest, host.systemd, lambda: bool(self._end), self._say_tpm_lost)
        self._borrowed = Borrowed(guest, self._runtime, host.systemd, lambda: bool(self._end), self._say_device_lost)
        self._state = State.STARTING
        self._undo = AsyncExitStack()
        self._qmp = Qmp(self._on_event, self._say_lost)
        self._stall = Stall(self._booted)
        self.steering = Steering(self._booted, self._runtime, self._qmp, self._stall, self._warn)
        self._told: str | None = None
        self._asking: asyncio.Task[None] | None = None
        self._unregistered = False
        self._end = ""
        self._timed_out = False
        self._starter: asyncio.Task[Any] | None = None
        self._greeted = self._abandoned = False
        self.halted = False  # asked to end
        self._leaving = asyncio.Event()  # asked to, or over
        self._streams: Streams | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._monitor: asyncio.Task[None] | None = None
        self._process: Process | None = None
        self.result = "success"
        self.failure = ""
        self.accelerator: Literal["", "kvm", "tcg"] = ""
        self.started = 0
        self.uses: list[Use] = []
        self.released = asyncio.Event()
        self.closed = asyncio.Event()
        self._boots = False  # anew, and nobody has told dnsmasq yet
        self._forgetting: asyncio.Task[None] | None = None

    @property
    def state(self) -> State:
        if self._state is State.RUNNING and self._stall.reason is not None:
            return State.PAUSED
        return self._state

    @state.setter
    def state(self, state: State) -> None:
        if state is not self._state:
            self._state = state
            self._changed()

    @property
    def reason(self) -> str:
        """Why it stands still, if there is more to say than that."""
        return self._stall.reason or ""

    @property
    def pid(self) -> int:
        return self._process.pid if self._process and not self._process.ended.is_set() else 0

    @property
    def serial_bytes(self) -> int:
        return self._streams.serial.spool.taken if self._streams else 0

    @property
    def serial_pending(self) -> int:
        return self._streams.serial.spool.pending if self._streams else 0

    async def start(self, find_kvm: Awaitable[Kvm], in_use: InUse) -> None:
        """Returns once QEMU runs and the network is applied. ``in_use``: images of guests that run.

        Raises ``KvmdError``; nothing is left over then.
        """
        self._starter = asyncio.current_task()
        try:
            async with AsyncExitStack() as undo:
                await self._start(undo, await find_kvm, in_use)
                self._undo = undo.pop_all()
        except BaseException as error:
            if self.halted:
                self.failure = str(self.stopped())
                self._say(Event.STOPPED, f"Guest {self.guest.name} is off ({ending.SUCCESS}): {self.failure}")
                self._close(State.STOPPED, ending.SUCCESS)
                raise self.stopped() from None
            if isinstance(error, KvmdError):
                self.failure = str(error)
                self._say(Event.START_FAILED, f"Guest {self.guest.name} could not be started: {error}", LOG_ERR)
            self._close(State.FAILED, "start-failed")
            raise
        self._watcher = asyncio.create_task(self._watch(), name=f"watch {self.guest.name}")
        self._say(Event.STARTED, f"Guest {self.guest.name} is running ({self.accelerator}, PID {self.pid})")

    async def _start(self, undo: AsyncExitStack, kvm: Kvm, in_use: InUse) -> None:
        booted, options = self._booted, self._options
        if booted.lacks(options.boot):
            raise StartFailed(f"it has no {options.boot} to boot from")
        self.accelerator = accelerator = self._choose_accelerator(kvm)
        taken = runtime.user_ids(but=self.guest.name)
        user = users.choose(self.guest.name, taken)
        if accelerator == "kvm" and kvm.group is not None:
            user = replace(user, groups=(kvm.group,))
        notes = {"stop_timeout": f"{self.guest.stop_timeout}\n".encode(), **self._tpm.choose_user({*taken, user.uid})}
        self._runtime.make({**self._snapshot, **notes}, user.uid, user.gid)
        streams = self._own_runtime(undo)
        self._runtime.write_options(options)
        users.publish(self.guest.name, user)
        streams.keep()
        with Descriptors() as descriptors:
            host = (self._runtime, self._host.lan, self._readiness, self._tpm, self._borrowed)
            warnings, self.uses, handles = await open_handles(
                booted, accelerator, user, *host, descriptors, undo, self._warn, in_use, options.boot
            )
            self._runtime.write({"images": json.dumps(self.uses).encode()})
            self.steering.media.begin(handles.images)
            for warning in warnings:
                self._warn(f"may have trouble: {warning}")
            command = ["qemu-system-x86_64", *argv(booted, handles)]
            stderr = descriptors.take(self._runtime.stderr())
            process, release, give_up = await spawn(command, descriptors, user, stderr)
        self._own_process(undo, process)
        self._tpm.watch(process)
        self._borrowed.watch(process)
        undo.callback(self.steering.agent.close)
        try:
            await self._host.systemd.start_transient(self.guest.scope, scope.properties(self.guest, process.pid))
        except BaseException as error:
            give_up()
            if isinstance(error, StartFailed):
                raise StartFailed(scope.blame(self.guest, str(error))) from error
            raise
        release()
        self.released.set()
        invocation = await self._host.systemd.invocation_id(self.guest.scope)
        self._runtime.write({"invocation": invocation.encode()})
        streams.follow(invocation, resume=False)
        await all_of(self._greet(undo, streams), *self._nics.claims())
        undo.push_async_callback(self.steering.screen.close)
        self.steering.screen.listen()
        with contextlib.suppress(QmpError):  # it has ended: the pidfd tells
            await self.steering.boot_normally(booted, options.boot)
            await self._look()
        await self._nics.configure(undo)
        self._runtime.write_pid(process.pid)
        self.started = self._runtime.started()
        await self.register()
        if not self.halted:
            self.state = State.RUNNING
        self._readiness.runs()

    async def adopt(self, pid: int) -> None:
        """Take over a guest that an earlier daemon started.

        Raises ``ProcessLookupError`` where it has ended, ``StartFailed`` where it must be left alone.
        """
        process = Process(pid)
        try:
            streams = self._own_runtime(self._undo)
        except StartFailed:
            process.close()
            raise
        self._own_process(self._undo, process)
        self._undo.push_async_callback(self._qmp.close)
        self._undo.push_async_callback(self.steering.screen.close)
        self._nics.adopt(self._undo)
        await self._tpm.adopt(process, self._undo)
        await self._borrowed.adopt(process, self._undo)
        self._undo.callback(self.steering.agent.close)
        self.steering.agent.adopt()
        self.released.set()
        invocation = self._runtime.invocation()
        streams.follow(invocation, resume=True)
        self.started = self._runtime.started()
        self.uses = self._runtime.images()
        self.steering.media.recall()
        await self._readiness.resume(invocation)
        self._monitor = asyncio.create_task(self._take_monitor(), name=f"monitor of {self.guest.name}")
        self._watcher = asyncio.create_task(self._watch(), name=f"watch {self.guest.name}")
        self.state = State.RUNNING
        self._say(Event.ADOPTED, f"Guest {self.guest.name} was running already (PID {self.pid})")
        await asyncio.wait((self._monitor,), timeout=MONITOR_PATIENCE)

    async def _take_monitor(self) -> None:
        """A QEMU that hangs, or is stopped, keeps nobody waiting: it answers once it goes on."""
        try:
            await self._qmp.connect(self._runtime.path / "qmp")
            self.accelerator = "kvm" if await self._qmp.query("query-kvm", "enabled") is True else "tcg"
            await self.steering.boot_normally(self._booted, self._options.boot)
            await self._look()
            self.steering.screen.listen()
            await self.steering.media.look()
            self._changed()
        except KvmdError as error:
            self._say_lost(str(error))

    async def _look(self) -> None:
        """Ask whether it stands still. Raises ``QmpError``."""
        status = await self._qmp.query("query-status", "status")
        few = len(self._booted.disks) + len(self._booted.cdroms) <= MOST_DRIVES
        drives = await self._qmp.execute("query-block") if status == "io-error" and few else None
        self._tell(self._stall.look(status, drives))

    def _tell(self, news: str) -> None:
        if news:
            self._say(Event.DISK, f"Guest {self.guest.name} {news}", LOG_WARNING)
        if self._stall.reason != self._told:
            self._told = self._stall.reason
            self._changed()

    def _say_lost(self, why: str) -> None:
        if self.pid:
            self._say(Event.FAILED, f"Guest {self.guest.name} cannot be steered: {why}", LOG_ERR)

    def _say_tpm_lost(self) -> None:
        what = f"Guest {self.guest.name} has lost its TPM: it runs on, but ends at its next reset"
        self._say(Event.TPM, f"{what} (systemctl restart kvmd@{self.guest.name})", LOG_WARNING)

    def _say_device_lost(self, what: str) -> None:
        self._say(Event.SHARE, f"Guest {self.guest.name} {what}", LOG_WARNING)

    def _choose_accelerator(self, kvm: Kvm) -> Literal["kvm", "tcg"]:
        if self.guest.accelerator == "tcg":
            return "tcg"
        if kvm.usable:
            return "kvm"
        if self.guest.accelerator == "kvm":
            raise StartFailed(f'KVM is not usable: {kvm.reason}; accelerator = "auto" would emulate instead')
        warning = f"Guest {self.guest.name} is emulated (TCG), much slower than KVM: {kvm.reason}"
        self._say(Event.EMULATED, warning, LOG_WARNING)
        return "tcg"

    def _own_runtime(self, undo: AsyncExitStack) -> Streams:
        undo.callback(users.withdraw, self.guest.name)
        undo.callback(self._runtime.remove)
        undo.callback(self._readiness.close)  # after its last words
        log = self.guest.serial.log
        self._streams = Streams(self.guest.name, self._runtime, self._host.journal, log=log, heard=self._readiness.hear)
        undo.push_async_callback(self._streams.close)
        return self._streams

    def _own_process(self, undo: AsyncExitStack, process: Process) -> None:
        self._process = process
        undo.callback(process.close)
        undo.push_async_callback(self._kill)

    async def wait_ready(self) -> None:
        """Returns once the guest is ready. Raises ``Timeout``, after cutting its power, or ``StartFailed``."""
        try:
            await self._readiness.wait(self._leaving)
        except (StartFailed, asyncio.CancelledError):
            if self.halted:
                self.failure = str(self.stopped())
                raise self.stopped() from None
            raise
        except Timeout as error:
            self._timed_out = True
            self.failure = str(error)
            await self._cut_power()
            raise

    def stopped(self) -> StartFailed:
        """What whoever waits for the start of a guest is told that is ``halted``."""
        return StartFailed(f"guest {self.guest.name} was stopped while it was starting")

    async def _greet(self, undo: AsyncExitStack, streams: Streams) -> None:
        """Wait for QEMU's greeting, or for its end and the reason it gave."""
        assert self._process is not None
        undo.push_async_callback(self._qmp.close)
        greeting = asyncio.create_task(self._qmp.connect(self._runtime.path / "qmp"))
        ended = asyncio.create_task(self._process.ended.wait())
        try:
            await asyncio.wait((greeting, ended), timeout=GREETING_TIMEOUT, return_when=asyncio.FIRST_COMPLETED)
            if greeting.done():
                if not (error := greeting.exception()):
                    self._greeted = True
                    return
                await asyncio.wait((ended,), timeout=QUIT_TIMEOUT)
                if not ended.done():
                    raise StartFailed(f"QEMU does not say that it runs: {error}")
            elif not ended.done():
                seconds = f"{GREETING_TIMEOUT:g} s"
                raise StartFailed(f"QEMU did not say within {seconds} that it runs{self._blame_args('wait')}")
        finally:
            greeting.cancel()
            ended.cancel()
        words = await streams.last_words()
        raise StartFailed(
            f"QEMU refused: {words}" if words else f"QEMU ended at once and gave no reason{self._blame_args('end')}"
        )

    def _blame_args(self, verb: str) -> str:
        args = ", ".join(json.dumps(word) for word in self.guest.qemu_args)
        return f" (what of args = [{args}] under [qemu] makes it {verb}?)" if args else ""

    async def configure(self) -> None:
        """The LAN has changed, perhaps: tell the guest, where it is told anything."""
        for error in await self._nics.configure_again():
            if self.state in (State.RUNNING, State.PAUSED):
                message = f"Guest {self.guest.name} is not told what has changed in its network: {error}"
                self._say(Event.NETWORK, message, LOG_WARNING)

    async def register(self) -> None:
        """With systemd-machined, if it runs: it only shows the guest, and what it refuses is said once."""
        name, uuid = self.guest.name, self.guest.uuid.bytes
        try:
            await self._host.systemd.register_machine(name, uuid, self.pid, self._nics.indexes())
        except KvmdError as error:
            if self.pid and not self._unregistered:
                self._unregistered = True
                self._say(Event.NOT_REGISTERED, f"Guest {name} is not shown by machinectl: {error}", LOG_NOTICE)

    # end

    async def _watch(self) -> None:
        assert self._process
        await self._process.ended.wait()
        if self._monitor:
            await self._monitor
        await self._qmp.drain()
        try:
            adopted = self._monitor is not None
            result = await ending.judge(self._host.systemd, self.guest, self._end, self._timed_out, adopted)
        except BusError as error:
            if error.name == DISCONNECTED:
                return  # this daemon ends; the next one asks again
            result = ending.CRASH
        try:
            await self._undo.aclose()
        except (KvmdError, OSError) as error:
            self._say(Event.FAILED, f"Guest {self.guest.name} left something over: {error}", LOG_WARNING)
        if result in ending.ASKED_FOR:
            event = (
                Event.START_FAILED if self._timed_out and self.failure and not self.halted else ending.EVENTS[result]
            )
            reason = f": {self.failure}" if self.failure else ""
            self._say(event, f"Guest {self.guest.name} is off ({result}){reason}")
        else:
            reason = ending.LOST_TPM if result == ending.CRASH and self._tpm.lost else ending.REASONS[result]
            self._say(ending.EVENTS[result], f"Guest {self.guest.name} failed: {reason}", LOG_ERR)
        self._close(State.STOPPED if result in ending.ASKED_FOR else State.FAILED, result)

    def _close(self, state: State, result: str) -> None:
        self.result = result
        self.released.set()
        self._leaving.set()
        self.closed.set()
        self.state = state

    def _on_event(self, event: str, data: Mapping[str, Any]) -> None:
        match event:
            case "SHUTDOWN":
                self._end = str(data.get("reason", ""))
            case "DEVICE_TRAY_MOVED":
                self.steering.media.hear(data)
            case "RESET":
                self._boots = True
                if not self._forgetting:
                    self._forgetting = asyncio.create_task(self._forget(), name=f"forget leases of {self.guest.name}")
            case "STOP" | "RESUME" | "SUSPEND" | "WAKEUP" | "BLOCK_IO_ERROR":
                self._tell(self._stall.hear(event, data))
                if event == "STOP" and self._stall.reason == "" and not self._asking:
                    self._asking = asyncio.create_task(self._ask_why(), name=f"ask why {self.guest.name} stands still")

    async def _ask_why(self) -> None:
        """Of a stop that nobody has asked for, such as an error of KVM's, the event does not say it."""
        try:
            with contextlib.suppress(QmpError):
                await self._look()
        finally:
            self._asking = None

    async def _forget(self) -> None:
        """Once more for all the resets meanwhile."""
        try:
            while self._boots:
                self._boots = False
                await self._nics.forget()
        finally:
            self._forgetting = None

    async def stop(self) -> None:
        """Press the power button until it is heard, cut the power after ``stop_timeout``; returns once all is gone.

        A start in progress ends: at once while QEMU does not run yet.
        """
        self._leave()
        await self._end_start(at_once=not self._greeted)
        deadline = time.monotonic() + self.guest.stop_timeout
        self.steering.agent.begin_to_shut_down()
        failed = f"did not power off within {self.guest.stop_timeout:g} s"
        while not self.closed.is_set() and (left := deadline - time.monotonic()) > 0:
            # Pressed before the guest's ACPI driver is up it is lost for ever: press again.
            try:
                async with asyncio.timeout(min(POWER_BUTTON_INTERVAL, left)):
                    with contextlib.suppress(QmpError):
                        await self.steering.resume()
                        await self.steering.press_power_button()
                    await self.closed.wait()
            except TimeoutError:
                continue
            except Unavailable:
                failed = f"cannot power off ({self.reason})"
                break
        if not self.closed.is_set():
            self._timed_out = True
            self._say(Event.FAILED, f"Guest {self.guest.name} {failed}: cutting its power", LOG_WARNING)
            await self._cut_power()

    async def terminate(self) -> None:
        """Cut the power, also of one that starts; returns once all is gone."""
        self._leave()
        await self._end_start(at_once=True)
        if not self.closed.is_set():
            await self._cut_power()

    def _leave(self) -> None:
        if self.closed.is_set():
            return
        self.halted = True
        self._leaving.set()
        self.state = State.STOPPING

    async def _end_start(self, *, at_once: bool) -> None:
        """Return once there is no start in progress. One whose QEMU runs is through with it in some seconds."""
        if self._starter is None or self._watcher or self.closed.is_set():
            return
        if at_once and not self._abandoned:
            self._abandoned = True  # a second time it would hit what clears up
            self._starter.cancel()
        await asyncio.wait((self._starter,))

    async def _cut_power(self) -> None:
        self.state = State.STOPPING
        with contextlib.suppress(QmpError, TimeoutError):
            async with asyncio.timeout(QUIT_TIMEOUT):
                await self._qmp.execute("quit")
                self._nics.give_up()  # while QEMU ends
                await self.closed.wait()
        if not self.closed.is_set() and self._process:
            self._end = self._end or "killed"
            self._process.signal(signal.SIGKILL)
            await self.closed.wait()

    async def _kill(self) -> None:
        assert self._process
        self._process.signal(signal.SIGKILL)
        await self._process.ended.wait()

    # go on otherwise

    async def set_limits(self, guest: Guest, snapshot: Mapping[str, bytes]) -> None:
        """Go on as ``guest``, which differs in its limits only. Raises ``KvmdError``."""
        try:
            await self._host.systemd.set_properties(guest.scope, scope.changed_limits(guest))
        except KvmdError as error:
            raise Unavailable(scope.blame(guest, f"systemd refused it: {error}")) from error
        self.guest = guest
        self._runtime.write(snapshot)

    def open_console(self, position: int | None = None) -> tuple[int, int]:
        """As ``Streams.open_console``."""
        assert self._streams is not None
        return self._streams.open_console(position)

    def _warn(self, what: str) -> None:
        self._say(Event.FILE, f"Guest {self.guest.name} {what}", LOG_WARNING)

    def _say(self, event: Event, message: str, priority: int = LOG_INFO) -> None:
        self._host.journal.say(event, message, self.guest.name, priority)
