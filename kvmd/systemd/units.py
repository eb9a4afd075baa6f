"""A client of systemd's manager, org.freedesktop.systemd1(5): jobs, scopes, the state of units."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from kvmd.errors import StartFailed
from kvmd.systemd.sysbus import DBUS, DISCONNECTED, INVALID_ARGS, TIMEOUT, BusError, Incoming, SystemBus, Variant

MANAGER = ("org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager")
MACHINED = ("org.freedesktop.machine1", "/org/freedesktop/machine1", "org.freedesktop.machine1.Manager")
UNIT = "org.freedesktop.systemd1.Unit"
SERVICE = "org.freedesktop.systemd1.Service"
PROPERTIES = "org.freedesktop.DBus.Properties"
NO_REPLY = "org.freedesktop.DBus.Error.NoReply"
ALREADY_SUBSCRIBED = "org.freedesktop.systemd1.AlreadySubscribed"
UNKNOWN = "unknown"
PATIENCE = 30.0  # seconds for an answer; what a job takes is waited for by signals
RELOAD = 120.0  # for that of Reload: when the generators have run, which have 90
LOOK = 5.0  # seconds after which a job or unit is looked at though nothing was heard

# What systemd answers, where it is not nothing.
RETURNS = {
    "Get": "v",
    "GetUnit": "o",
    "GetUnitProcesses": "a(sus)",
    "ListJobs": "a(usssoo)",
    "ListUnitsByPatterns": "a(ssssssouso)",
    "RestartUnit": "o",
    "StartTransientUnit": "o",
    "StartUnit": "o",
    "StopUnit": "o",
}

Properties = Sequence[tuple[str, str, object]]


class Systemd:
    """Subscribe, then ask, then wait for that very job."""

    def __init__(self, bus: SystemBus) -> None:
        self._bus = bus
        self._calling = 0
        self._jobs: dict[str, asyncio.Future[str]] = {}
        self._changed: dict[str, asyncio.Event] = {}
        self._returning: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self._bus.watch(MANAGER[0], self._owner_changed)
        await self._bus.subscribe(MANAGER[0], MANAGER[2], "JobRemoved", "uoss", self._job_removed)
        await self._bus.subscribe(MANAGER[0], MANAGER[2], "Reloading", "b", self._reloading)
        await self._subscribe()
        self._bus.on_signal(MANAGER[0], PROPERTIES, "PropertiesChanged", "sa{sv}as", self._properties_changed)
        self._bus.on_signal(MANAGER[0], MANAGER[2], "UnitNew", "so", self._unit_new)

    def _owner_changed(self, owner: str) -> None:
        """PID 1 leaves the bus and comes back when it executes itself anew; its signals meanwhile are lost."""
        if owner:
            if self._returning:
                self._returning.cancel()  # asyncio itself holds no task that nobody else does
            self._returning = asyncio.create_task(self._subscribe_again(), name="subscribe to systemd again")

    async def _subscribe_again(self) -> None:
        """It may have forgotten who wants its signals; only then is what a look shows the last word."""
        with contextlib.suppress(BusError):  # the bus has gone, too
            await self._subscribe()
        self._look_again()

    async def _subscribe(self) -> None:
        try:
            await self._call(MANAGER, "Subscribe")
        except BusError as error:
            if error.name != ALREADY_SUBSCRIBED:
                raise

    def _reloading(self, message: Incoming) -> None:
        (active,) = message.values()
        if not active:
            self._look_again()

    def _look_again(self) -> None:
        for event in self._changed.values():
            event.set()
        for job in self._jobs.values():
            if not job.done():
                job.set_result(UNKNOWN)

    async def _call(
        self, target: tuple[str, str, str], member: str, signature: str = "", *body: object, fds: Sequence[int] = ()
    ) -> tuple[Any, ...]:
        """Call a method of systemd's, once more where the call was lost as PID 1 executed itself anew."""
        while True:
            try:
                patience = RELOAD if member == "Reload" else PATIENCE
                return await self._bus.call(
                    target, member, signature, *body, returns=RETURNS.get(member, ""), patience=patience, fds=fds
                )
            except BusError as error:
                if error.name != NO_REPLY:
                    raise

    async def _get(self, path: str, interface: str, name: str, signature: str) -> Any:
        """A property. Raises ``BusError``, also for one that is not of this signature."""
        (variant,) = await self._call((MANAGER[0], path, PROPERTIES), "Get", "ss", interface, name)
        if variant.signature != signature:
            raise BusError(INVALID_ARGS, f"{MANAGER[0]}: {name} is of type {variant.signature!r}, not {signature!r}")
        return variant.value

    def _job_removed(self, message: Incoming) -> None:
        _, path, _, result = message.values()
        job = self._jobs.get(path)
        if job is None and self._calling:  # the signal may come before the reply that names the job
            job = self._jobs.setdefault(path, asyncio.get_running_loop().create_future())
        if job is not None and not job.done():
            job.set_result(result)

    def _properties_changed(self, message: Incoming) -> None:
        if event := self._changed.get(message.path):
            event.set()

    def _unit_new(self, message: Incoming) -> None:
        """Takes the place of a unit's first change after PID 1 has executed itself anew."""
        _, path = message.values()
        if event := self._changed.get(path):
            event.set()

    async def _job(self, member: str, signature: str, unit: str, *body: object, fds: Sequence[int] = ()) -> str:
        self._calling += 1
        try:
            (path,) = await self._call(MANAGER, member, signature, unit, *body, fds=fds)
            job = self._jobs.setdefault(path, asyncio.get_running_loop().create_future())
        finally:
            self._calling -= 1
        try:
            while (result := await self._heard(job)) == UNKNOWN:
                job = self._jobs[path] = asyncio.get_running_loop().create_future()
                if not await self._has_job(path):
                    wanted = ("inactive", "failed") if member == "StopUnit" else ("active",)
                    return "done" if await self.state(unit) in wanted else "failed"
            return result
        finally:
            self._jobs.pop(path, None)
            if not self._calling:
                self._jobs = {path: job for path, job in self._jobs.items() if not job.done()}

    async def _heard(self, job: asyncio.Future[str]) -> str:
        """Signals are lost, rarely, when PID 1 executes itself anew twice in a row: look again by and by."""
        done, _ = await asyncio.wait((job,), timeout=LOOK)
        return job.result() if done else UNKNOWN

    async def _has_job(self, path: str) -> bool:
        try:
            (jobs,) = await self._call(MANAGER, "ListJobs")
        except BusError as error:
            if error.name != TIMEOUT:
                raise
            return True  # as far as anybody knows
        return any(job[4] == path for job in jobs)

    async def start_unit(self, unit: str) -> str:
        """Start a unit and return its job's result: ``done``, ``failed``, ``canceled``, ``dependency`` …"""
        return await self._job("StartUnit", "ss", unit, "replace")

    async def stop_unit(self, unit: str) -> str:
        return await self._job("StopUnit", "ss", unit, "replace")

    async def restart_unit(self, unit: str) -> str:
        return await self._job("RestartUnit", "ss", unit, "replace")

    async def start_transient(self, name: str, properties: Properties) -> None:
        """Start a transient unit: a scope of the processes named in ``properties``, or a service (StartTransientUnit).

        A property of signature "h" is a descriptor, which the caller keeps.
        Raises ``StartFailed`` with systemd's reason.
        """
        fds = [value for _key, signature, value in properties if signature == "h" and isinstance(value, int)]
        values = [
            [key, Variant(signature, fds.index(value) if isinstance(value, int) and signature == "h" else value)]
            for key, signature, value in properties
        ]
        start: tuple[Any, ...] = ("StartTransientUnit", "ssa(sv)a(sa(sv))", name, "fail", values, [])
        try:
            try:
                result = await self._job(*start, fds=fds)
            except BusError as error:
                if error.name != "org.freedesktop.systemd1.UnitExists":
                    raise
                await self.clear_empty_scope(name)
                await self.reset_failed(name)  # one that failed while nobody was there to look
                result = await self._job(*start, fds=fds)
        except BusError as error:
            raise StartFailed(f"systemd refused {name}: {error}") from error
        if result != "done":
            raise StartFailed(f"systemd could not start {name}: job {result}")

    async def set_properties(self, unit: str, properties: Properties) -> None:
        """Change properties of a running unit, until it ends (SetUnitProperties). Raises ``BusError``."""
        values = [[key, Variant(signature, value)] for key, signature, value in properties]
        await self._call(MANAGER, "SetUnitProperties", "sba(sv)", unit, True, values)

    async def standard_input(self, service: str) -> bytes:
        """What the service reads (StandardInputData=); nothing if it is not loaded."""
        try:
            (path,) = await self._call(MANAGER, "GetUnit", "s", service)
            return bytes(await self._get(path, SERVICE, "StandardInputData", "ay"))
        except BusError:
            return b""

    async def reset_failed(self, unit: str) -> None:
        with contextlib.suppress(BusError):  # not loaded, or not failed
            await self._call(MANAGER, "ResetFailedUnit", "s", unit)

    async def scope_result(self, scope: str) -> str:
        """How a scope that has ended did: ``success``, ``oom-kill``, ``timeout`` … (Result of systemd.scope(5))."""
        await self.settled(scope)
        with _gone_is_no_error():
            (path,) = await self._call(MANAGER, "GetUnit", "s", scope)
            result = await self._get(path, "org.freedesktop.systemd1.Scope", "Result", "s")
            await self.reset_failed(scope)
            return str(result)
        return "success"  # systemd has forgotten it already: it did not fail

    async def clear_scope(self, scope: str) -> None:
        """SIGKILL for every process of the scope; returns once it is gone."""
        with contextlib.suppress(BusError):  # it has gone by itself
            if await self._has_processes(scope):
                await self._call(MANAGER, "KillUnit", "ssi", scope, "all", signal.SIGKILL)
                await self.settled(scope)
        await self.clear_empty_scope(scope)

    async def clear_empty_scope(self, scope: str) -> None:
        """A scope whose process died as it was put there stays active until PID 1 looks at it again."""
        with contextlib.suppress(BusError):  # no such scope
            if not await self._has_processes(scope) and await self.state(scope) == "active":
                await self.reload()
                await self.settled(scope)

    async def _has_processes(self, unit: str) -> bool:
        return bool(await self.processes(unit))

    async def processes(self, unit: str) -> list[int]:
        """The process IDs of what runs in it; none where there is no such unit. Raises ``BusError``."""
        with _gone_is_no_error():
            (processes,) = await self._call(MANAGER, "GetUnitProcesses", "s", unit)
            return [pid for _, pid, _ in processes]
        return []

    async def units(self, state: str, pattern: str) -> list[str]:
        """Names of the units in this ActiveState that match ``pattern``."""
        (units,) = await self._call(MANAGER, "ListUnitsByPatterns", "asas", [state], [pattern])
        return [unit[0] for unit in units]

    async def service_result(self, unit: str) -> tuple[str, int]:
        """How a service has ended: its Result (org.freedesktop.systemd1(5)), and the main process, 0 if it had none."""
        with _gone_is_no_error():
            (path,) = await self._call(MANAGER, "GetUnit", "s", unit)
            result = await self._get(path, SERVICE, "Result", "s")
            return str(result), int(await self._get(path, SERVICE, "ExecMainPID", "u"))
        return "success", 0  # systemd has forgotten it already: it did not fail

    async def invocation_id(self, unit: str) -> str:
        """The unit's invocation ID as 32 hexadecimal digits."""
        (path,) = await self._call(MANAGER, "GetUnit", "s", unit)
        return bytes(await self._get(path, UNIT, "InvocationID", "ay")).hex()

    async def state(self, unit: str) -> str:
        """The unit's ActiveState; one that is not loaded is inactive. Raises ``BusError`` if systemd does not say."""
        with _gone_is_no_error():
            (path,) = await self._call(MANAGER, "GetUnit", "s", unit)
            return await self._state(path)
        return "inactive"

    async def _state(self, path: str) -> str:
        return str(await self._get(path, UNIT, "ActiveState", "s"))

    async def restarts(self, unit: str) -> int:
        """How often in a row systemd has started the unit again by Restart=."""
        (path,) = await self._call(MANAGER, "GetUnit", "s", unit)
        return int(await self._get(path, SERVICE, "NRestarts", "u"))

    async def reload(self) -> None:
        """Have the generators run again (daemon-reload)."""
        with contextlib.suppress(BusError):  # ours is not the only reload; systemd says so in the journal
            await self._call(MANAGER, "Reload")

    async def settled(self, unit: str) -> None:
        """Returns once PID 1 no longer holds the unit for active or stopping."""
        path = ""
        with _gone_is_no_error():
            (path,) = await self._call(MANAGER, "GetUnit", "s", unit)
        if not path:
            return
        rules = (
            f"type='signal',sender='{MANAGER[0]}',interface='{PROPERTIES}',member='PropertiesChanged',path='{path}'",
            f"type='signal',sender='{MANAGER[0]}',interface='{MANAGER[2]}',member='UnitNew',arg1path='{path}'",
        )
        changed = self._changed.setdefault(path, asyncio.Event())
        for rule in rules:
            with contextlib.suppress(BusError):  # the bus holds 512 of ours; then the next look shows it
                await self._bus.add_match(rule)
        try:
            while True:
                changed.clear()
                try:
                    if await self._state(path) not in ("active", "deactivating"):
                        return
                except BusError as error:
                    if error.name != TIMEOUT:
                        raise
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK):
                        await changed.wait()
        finally:
            self._changed.pop(path, None)
            for rule in rules:
                with contextlib.suppress(BusError):  # it has gone, and the matches with it
                    await self._bus.remove_match(rule)

    async def watch_machined(self, appeared: Callable[[], None]) -> None:
        """Have ``appeared`` run whenever systemd-machined starts."""
        await self._bus.watch(MACHINED[0], lambda owner: appeared() if owner else None)

    async def register_machine(self, name: str, uuid: bytes, pid: int, ifindexes: list[int]) -> None:
        """Show the guest in ``machinectl list``, where systemd-machined runs; it is never started for this.

        Raises ``BusError`` where it refuses; that it knows the guest already is no error.
        """
        (running,) = await self._bus.call(DBUS, "NameHasOwner", "s", MACHINED[0], returns="b")
        if running:
            try:
                await self._bus.call(
                    *(MACHINED, "RegisterMachineWithNetwork", "sayssusai"),
                    *(name, uuid, "kvmd", "vm", pid, "", ifindexes),
                    returns="o",
                )
            except BusError as refusal:
                try:
                    await self._bus.call(MACHINED, "GetMachineByPID", "u", pid, returns="o")
                except BusError:
                    raise refusal from None


@contextlib.contextmanager
def _gone_is_no_error() -> Iterator[None]:
    """For a unit that may have been forgotten. That systemd does not answer is an error all the same."""
    try:
        yield
    except BusError as error:
        if error.name in (TIMEOUT, DISCONNECTED):
            raise
