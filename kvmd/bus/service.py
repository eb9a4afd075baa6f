"""The D-Bus objects: dispatch → authorise → one manager call → reply. Driven by the interface XML of ``dbus/``."""

from __future__ import annotations

import contextlib
import errno
import os
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any, Protocol

from kvmd.bus.callers import Callers
from kvmd.bus.interface import OBJECT_MANAGER_XML, STANDARD_XML, Interface
from kvmd.config.options import parse_options
from kvmd.errors import KvmdError, NoSuchGuest
from kvmd.guests.manager import Manager
from kvmd.systemd.journal import log
from kvmd.systemd.message import Unreadable, error_reply, reply
from kvmd.systemd.polkit import CONSOLE, MANAGE, Polkit
from kvmd.systemd.scope import escape
from kvmd.systemd.sysbus import LIMITS_EXCEEDED, BusError, Incoming, Message, SystemBus, Variant

NAME = "org.kvmd1"
ROOT = "/org/kvmd1"
GUESTS = "/org/kvmd1/guest"
STANDARD = "org.freedesktop.DBus."
LONGEST_SENTENCE = 1 << 14  # characters: every problem of a file that is all wrong

# Whoever may talk to the bus may read; every other method asks who is calling.
OPEN = {"GetGuest", "GetGuestByPID", "ListGuests"}
# They are told who calls, too: a file that is named here is opened with no more rights than that user's.
AS_CALLER = {"InsertMedia", "StartWith"}
LOOK_AND_TYPE = {"OpenConsole", "OpenConsoleAt", "ReadLog", "OpenDisplay", "Screenshot"}


class ProtocolError(KvmdError):
    """A call that no object of ours understands; ``kind`` is the last part of its org.freedesktop.DBus.Error name."""

    def __init__(self, kind: str, text: str) -> None:
        self.dbus_name = f"org.freedesktop.DBus.Error.{kind}"
        super().__init__(text)


class Exported(Protocol):
    """What stands behind an object path: its D-Bus methods by name, and its properties."""

    def properties(self) -> dict[str, object]: ...

    def concerns(self, arguments: list[Any]) -> str:
        """The name of the guest that a call with these arguments is about, or ""."""


class ManagerObject:
    """org.kvmd1.Manager."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager

    def properties(self) -> dict[str, object]:
        return self._manager.properties()

    def concerns(self, arguments: list[Any]) -> str:
        return next((name for name in arguments if isinstance(name, str)), "")

    async def StartGuest(self, name: str) -> str:
        await self._manager.start(name)
        return guest_path(name)

    async def StopGuest(self, name: str) -> None:
        await self._manager.stop(name)

    async def RestartGuest(self, name: str) -> None:
        await self._manager.restart(name)

    async def Begin(self, name: str, verb: str) -> None:
        self._manager.enqueue(name, verb)

    async def GetGuest(self, name: str) -> str:
        self._manager.guest_properties(name)
        return guest_path(name)

    async def GetGuestByPID(self, pid: int) -> str:
        return guest_path(self._manager.by_pid(pid))

    async def ListGuests(self) -> list[list[str]]:
        return [[name, state, guest_path(name)] for name, state in self._manager.states()]

    async def Reload(self) -> None:
        await self._manager.reload()

    async def LaunchUnit(self, name: str) -> None:
        await self._manager.launch_unit(name)

    async def HaltUnit(self, name: str) -> None:
        await self._manager.halt_unit(name)


class GuestObject:
    """org.kvmd1.Guest."""

    def __init__(self, manager: Manager, name: str) -> None:
        self._manager = manager
        self._name = name

    def properties(self) -> dict[str, object]:
        return self._manager.guest_properties(self._name)

    def concerns(self, arguments: list[Any]) -> str:
        return self._name

    async def Start(self) -> None:
        await self._manager.start(self._name)

    async def StartWith(self, options: dict[str, Variant], uid: int) -> None:
        given = {name: option.value for name, option in options.items()}
        await self._manager.start(self._name, parse_options(given, uid))

    async def Stop(self) -> None:
        await self._manager.stop(self._name)

    async def Restart(self) -> None:
        await self._manager.restart(self._name)

    async def Terminate(self) -> None:
        await self._manager.terminate(self._name)

    async def Shutdown(self) -> None:
        await self._manager.running(self._name).steering.press_power_button()

    async def Reset(self) -> None:
        await self._manager.running(self._name).steering.reset()

    async def Pause(self) -> None:
        await self._manager.running(self._name).steering.pause()

    async def Resume(self) -> None:
        await self._manager.running(self._name).steering.resume()

    async def OpenConsole(self) -> int:
        return self._manager.running(self._name).open_console()[0]

    async def OpenConsoleAt(self, position: int) -> tuple[int, int]:
        return self._manager.running(self._name).open_console(position)

    async def OpenDisplay(self) -> int:
        return await self._manager.running(self._name).steering.screen.open()

    async def Screenshot(self) -> int:
        return await self._manager.running(self._name).steering.screen.shoot()

    async def InsertMedia(self, device: str, path: str, uid: int) -> None:
        await self._manager.insert_media(self._name, device, path, uid)

    async def EjectMedia(self, device: str) -> None:
        await self._manager.eject_media(self._name, device)

    async def ForceEjectMedia(self, device: str) -> None:
        await self._manager.eject_media(self._name, device, force=True)

    async def AgentAddresses(self) -> list[str]:
        return await self._manager.running(self._name).steering.agent.addresses()

    async def FreezeFileSystems(self, seconds: int) -> int:
        return await self._manager.running(self._name).steering.agent.freeze(seconds)

    async def ThawFileSystems(self) -> int:
        return await self._manager.running(self._name).steering.agent.thaw()

    async def ReadLog(self, lines: int) -> list[str]:
        return await self._manager.read_log(self._name, lines)


def guest_path(name: str) -> str:
    return f"{GUESTS}/{escape(name)}"


class Service:
    """Everything kvmd shows on the bus; ``refresh`` publishes what has changed in the manager."""

    def __init__(self, bus: SystemBus, manager: Manager) -> None:
        self._bus = bus
        self._manager = manager
        self._manager_interface = Interface.load("org.kvmd1.Manager")
        self._guest_interface = Interface.load("org.kvmd1.Guest")
        self._standard = Interface.parse(STANDARD_XML)
        self._object_manager = Interface.parse(OBJECT_MANAGER_XML)
        self._objects: dict[str, tuple[Interface, Exported]] = {ROOT: (self._manager_interface, ManagerObject(manager))}
        self._published: dict[str, dict[str, object]] = {ROOT: manager.properties()}
        self._polkit = Polkit(bus)
        self._callers = Callers(bus, self._answer)
        for name, _ in manager.states():
            self._add(name)
        bus.serve(self._callers.take)

    def refresh(self, name: str | None) -> None:
        """The manager's news: of one guest, or of the manager itself."""
        if name is None:
            self._emit_changes(ROOT)
            return
        path = guest_path(name)
        known = self._manager.shows(name)
        if known and path not in self._objects:
            self._add(name)
            added = {self._guest_interface.name: self._guest_interface.variants(self._published[path])}
            self._signal(ROOT, self._object_manager[0], "InterfacesAdded", path, added)
            self._signal(ROOT, self._manager_interface, "GuestNew", name, path)
        elif not known and path in self._objects:
            del self._objects[path], self._published[path]
            self._signal(ROOT, self._object_manager[0], "InterfacesRemoved", path, [self._guest_interface.name])
            self._signal(ROOT, self._manager_interface, "GuestRemoved", name, path)
        elif known:
            self._emit_changes(path)

    def _add(self, name: str) -> None:
        path = guest_path(name)
        guest = GuestObject(self._manager, name)
        self._objects[path] = (self._guest_interface, guest)
        self._published[path] = guest.properties()

    def _emit_changes(self, path: str) -> None:
        interface, exported = self._objects[path]
        before, now = self._published[path], exported.properties()
        self._published[path] = now
        changed = {key: value for key, value in now.items() if key not in interface.silent and before[key] != value}
        if changed:
            self._signal(path, self._standard[1], "PropertiesChanged", interface.name, interface.variants(changed), [])

    def _signal(self, path: str, interface: Interface, member: str, *body: object) -> None:
        signature = interface.signals[member]
        self._bus.send(Message.new_signal(path, interface.name, member, signature, list(body)))

    async def _answer(self, call: Incoming, uid: int) -> None:
        """Do as the call says, if its caller may, and answer whoever waits for that. Reading comes one at a time."""
        acts = self._acts(call)
        if not acts and not call.answered:
            return
        try:
            if acts:
                interface, exported = self._objects[call.path]
                self._find(interface, call)
                action = CONSOLE if call.member in LOOK_AND_TYPE else MANAGE
                await self._polkit.authorise(call, uid, action, exported.concerns(self._body(call)))
            at_once = uid == 0 or (acts and call.member != "ReadLog")
            async with contextlib.nullcontext() if at_once else self._callers.turn(uid):
                await self._reply(call, *await self._run(call, uid))
        except KvmdError as error:
            self._refuse(call, error.name if isinstance(error, BusError) else error.dbus_name, str(error))
        except Exception as error:  # noqa: BLE001 - a defect of ours: a line for us, a sentence for the caller
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                text = f"{call.member} failed: kvmd has no file descriptor left (raise LimitNOFILE= of kvmd.service)"
                self._refuse(call, LIMITS_EXCEEDED, text)
                return
            where = error.__traceback__
            while where and where.tb_next:
                where = where.tb_next
            place = f"{where.tb_frame.f_code.co_filename}:{where.tb_lineno}" if where else "?"
            log.error("internal error in %s: %s: %s (%s)", call.member, type(error).__name__, error, place)
            text = f"internal error in {call.member} (see journalctl -u kvmd)"
            self._refuse(call, "org.kvmd1.Error.Internal", text)

    async def _reply(self, call: Incoming, signature: str, values: list[Any]) -> None:
        fds = [values[0]] if signature.startswith("h") else []
        try:
            if call.answered:
                message = reply(call, signature, [0, *values[1:]] if fds else values, fds)
                with contextlib.suppress(EOFError):  # the bus has gone, and whoever called with it
                    await (self._bus.send_large(message) if call.member == "ReadLog" else self._bus.send(message))
        finally:
            for fd in fds:
                os.close(fd)

    def _refuse(self, call: Incoming, name: str, text: str) -> None:
        if call.answered:
            self._bus.send(error_reply(call, name, text[:LONGEST_SENTENCE]))

    def _acts(self, call: Incoming) -> bool:
        """Whether it may change something or hear a guest, so that its caller must be allowed to."""
        if call.path not in self._objects or call.member in OPEN:
            return False
        interface, _exported = self._objects[call.path]
        return call.interface in ("", interface.name) and call.member in interface.methods

    async def _run(self, call: Incoming, uid: int) -> tuple[str, list[Any]]:
        if call.member == "Introspect" and call.interface in ("", STANDARD + "Introspectable"):
            return "s", [self._introspect(call.path)]
        if call.interface == STANDARD + "Peer":
            signature = self._find(self._standard[2], call)
            return signature, [Path("/etc/machine-id").read_text().strip()] if signature else []
        if call.path not in self._objects:
            if call.path.startswith(GUESTS + "/"):
                raise NoSuchGuest(f"there is no guest at {call.path} (org.kvmd1.Manager.ListGuests lists them)")
            raise ProtocolError("UnknownObject", f"there is no object {call.path}")
        interface, exported = self._objects[call.path]
        if call.path == ROOT and call.interface == STANDARD + "ObjectManager":
            return self._find(self._object_manager[0], call), [self._managed()]
        if call.interface == STANDARD + "Properties":
            return self._find(self._standard[1], call), self._property(interface, exported, call)
        if call.interface not in ("", interface.name):
            raise ProtocolError("UnknownInterface", f"{call.path} has no interface {call.interface}")
        signature = self._find(interface, call)
        who = [uid] if call.member in AS_CALLER else []
        result = await getattr(exported, call.member)(*self._body(call), *who)
        if isinstance(result, tuple):
            return signature, list(result)
        return signature, [] if signature == "" else [result]

    @staticmethod
    def _find(interface: Interface, call: Incoming) -> str:
        """The out signature of the method called."""
        if call.member not in interface.methods:
            raise ProtocolError("UnknownMethod", f"{interface.name} has no method {call.member}")
        wanted, answers = interface.methods[call.member]
        if call.signature != wanted:
            raise ProtocolError("InvalidArgs", f"{call.member} takes {wanted or 'nothing'}, not {call.signature}")
        return answers

    @staticmethod
    def _body(call: Incoming) -> list[Any]:
        try:
            return call.values()
        except Unreadable as error:
            raise ProtocolError("InvalidArgs", str(error)) from error

    def _property(self, interface: Interface, exported: Exported, call: Incoming) -> list[Any]:
        if call.member == "Set":  # whatever it is to be set to
            raise ProtocolError("PropertyReadOnly", f"{interface.name} has no property that can be set (edit the file)")
        wanted, *names = self._body(call)
        if wanted not in (interface.name, ""):
            if call.member == "GetAll" and wanted.startswith(STANDARD):
                return [{}]
            raise ProtocolError("UnknownInterface", f"{call.path} has no interface {wanted}")
        values = interface.variants(exported.properties())
        if call.member == "GetAll":
            return [values]
        if names[0] not in values:
            raise ProtocolError("UnknownProperty", f"{interface.name} has no property {names[0]}")
        return [values[names[0]]]

    def _managed(self) -> dict[str, dict[str, dict[str, Variant]]]:
        return {
            path: {interface.name: interface.variants(exported.properties())}
            for path, (interface, exported) in self._objects.items()
            if path != ROOT
        }

    def _introspect(self, path: str) -> str:
        node = ElementTree.Element("node")
        if path in self._objects:
            interface, _ = self._objects[path]
            extra = self._object_manager if path == ROOT else []
            node.extend(known.element for known in [*self._standard, *extra, interface])
        below = "/" if path == "/" else path + "/"
        children = {other[len(below) :].split("/")[0] for other in self._objects if other.startswith(below)}
        for child in sorted(children):
            ElementTree.SubElement(node, "node", name=child)
        return ElementTree.tostring(node, encoding="unicode")
