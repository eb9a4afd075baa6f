"""The system bus, for a client: calls with their errors as sentences, and changes of properties."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from dbus_next.aio.message_bus import MessageBus
from dbus_next.constants import BusType, MessageFlag, MessageType
from dbus_next.errors import AuthError
from dbus_next.message import Message
from dbus_next.signature import Variant

from kvmd.ctl.failure import Failure

NAME, ROOT = "org.kvmd1", "/org/kvmd1"
MANAGER, GUEST = "org.kvmd1.Manager", "org.kvmd1.Guest"
PROPERTIES, OBJECT_MANAGER = "org.freedesktop.DBus.Properties", "org.freedesktop.DBus.ObjectManager"
DBUS = "org.freedesktop.DBus"
ABSENT = {f"{DBUS}.Error.{kind}" for kind in ("ServiceUnknown", "NameHasNoOwner", "NoReply", "Disconnected")}
SPAWN = f"{DBUS}.Error.Spawn."

__all__ = ["GUEST", "MANAGER", "NAME", "ROOT", "Bus", "Variant", "connect"]


class Bus:
    """A connection."""

    def __init__(self, bus: MessageBus) -> None:
        self._bus = bus

    async def call(
        self,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        *values: object,
        destination: str = NAME,
        within: float | None = None,
    ) -> Any:
        """The first value of the answer, or all, if there are more; None if none. ``within``: so many seconds.

        Raises ``Failure``, ``TimeoutError``.

        A descriptor is the caller's.
        """
        message = Message(
            destination=destination,
            path=path,
            interface=interface,
            member=member,
            signature=signature,
            body=list(values),
            flags=MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION,
        )
        async with asyncio.timeout(within):
            answer = await self._bus.call(message)
        if answer is None:
            raise Failure("the system bus has gone")
        if answer.message_type is MessageType.ERROR:
            raise _failure(answer.error_name, str(answer.body[0]) if answer.body else "", destination)
        if answer.signature.startswith("h"):  # its place among the descriptors
            answer.body[0] = answer.unix_fds[answer.body[0]]
        return answer.body[0] if len(answer.body) == 1 else answer.body or None

    async def watch(self, changed: Callable[[str, str, list[Any]], None]) -> None:
        """``changed(path, member, values)`` for each signal of kvmd's, and its coming and going as NameOwnerChanged."""

        def hear(message: Message) -> None:
            if message.message_type is not MessageType.SIGNAL:
                return
            if message.path.startswith(ROOT) or message.member == "NameOwnerChanged":
                changed(message.path, message.member, message.body)

        self._bus.add_message_handler(hear)
        for rule in (
            f"type='signal',sender='{NAME}',path_namespace='{ROOT}'",
            f"type='signal',sender='{DBUS}',member='NameOwnerChanged',arg0='{NAME}'",
        ):
            await self.call("/org/freedesktop/DBus", DBUS, "AddMatch", "s", rule, destination=DBUS)


@asynccontextmanager
async def connect(*, asks: bool = True) -> AsyncIterator[Bus]:
    """``asks``: for a password, where one is wanted. Raises ``Failure``."""
    try:
        bus = await MessageBus(bus_type=BusType.SYSTEM, negotiate_unix_fd=True).connect()
    except (OSError, AuthError, EOFError) as error:
        why = getattr(error, "strerror", None) or error
        raise Failure(f"cannot reach the system bus: {why} (does dbus run? systemctl status dbus)") from error
    agent = _agent() if asks else None
    try:
        yield Bus(bus)
    finally:
        bus.disconnect()  # type: ignore[no-untyped-call]
        if agent:
            agent.terminate()
            agent.wait()


def _agent() -> subprocess.Popen[bytes] | None:
    """Who asks for a password, where nobody else does: as systemctl has it."""
    program = shutil.which("pkttyagent")
    if os.geteuid() == 0 or program is None or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return None
    ready, notify = os.pipe()
    try:
        agent = subprocess.Popen([program, "--fallback", f"--notify-fd={notify}"], pass_fds=(notify,))
    finally:
        os.close(notify)
    with os.fdopen(ready, "rb") as pipe:
        pipe.read()  # it closes its end once it is registered
    return agent


def _failure(name: str, text: str, destination: str) -> Failure:
    if destination == NAME and (name in ABSENT or name.startswith(SPAWN)):
        return Failure("kvmd does not run (systemctl status kvmd says why)", name)
    if name == f"{DBUS}.Error.AccessDenied":
        return Failure(f"{text.rstrip('.')} (as root, or as polkit lets you: man kvmd)", name)
    return Failure(text or name, name)
