"""The connection to the system bus: dbus-next, with what a long-lived service needs on top.

The one room that knows the library: others have its ``Message`` and ``Variant`` from here.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any

from dbus_next.aio.message_bus import MessageBus
from dbus_next.constants import BusType, MessageFlag, MessageType, NameFlag, RequestNameReply
from dbus_next.errors import AuthError
from dbus_next.message import Message
from dbus_next.signature import Variant

from kvmd.errors import KvmdError, Unavailable

__all__ = ["DBUS", "DISCONNECTED", "BusError", "Message", "MessageFlag", "MessageType", "SystemBus", "Variant"]

DBUS = ("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus")

# The bus lets one connection wait for 128 replies, polkit's among them (max_replies_per_connection, dbus-daemon(1)).
WAITING = 100


DISCONNECTED = "org.freedesktop.DBus.Error.Disconnected"


class BusError(KvmdError):
    """An error reply; ``name`` is its D-Bus name, ``str()`` its text."""

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        super().__init__(text)


class _Bus(MessageBus):
    """dbus-next 0.2.3, where two things of it would end a daemon."""

    _loop: asyncio.AbstractEventLoop  # private, as _auth_readline is
    _sock: socket.socket

    def __init__(self) -> None:
        super().__init__(bus_type=BusType.SYSTEM, negotiate_unix_fd=True)
        self._waiting: deque[tuple[Message, asyncio.Future[None]]] = deque()  # the first one is being written
        self._over = False

    def send(self, message: Message) -> asyncio.Future[None]:  # type: ignore[override]
        """One after the other: a socket that is full when it begins with another one it takes for a lost connection."""
        message.serial = message.serial or self.next_serial()
        sent = asyncio.get_running_loop().create_future()
        self._waiting.append((message, sent))
        if self._over:
            self._tell_waiting()
        elif len(self._waiting) == 1:
            self._send_first()
        return sent

    def _send_first(self) -> None:
        message, sent = self._waiting[0]
        try:
            super().send(message).add_done_callback(self._written)
        except Exception as error:  # noqa: BLE001  # it cannot be marshalled: told its sender, and in nobody's way
            sent.set_exception(error)
            self._next()

    def _written(self, written: asyncio.Future[None]) -> None:
        if written.exception() or self._over:
            return  # it is lost, and who waits is told
        _message, sent = self._waiting[0]
        if not sent.done():
            sent.set_result(None)
        self._next()

    def _next(self) -> None:
        self._waiting.popleft()
        if self._waiting:
            self._send_first()

    async def lost(self) -> None:
        """Return when the connection has ended; nobody waits any more for what was not sent."""
        with contextlib.suppress(OSError, EOFError):
            await self.wait_for_disconnect()  # type: ignore[no-untyped-call]
        self._over = True
        self._tell_waiting()

    def _tell_waiting(self) -> None:
        while self._waiting:
            _message, sent = self._waiting.popleft()
            if not sent.done():
                sent.set_exception(EOFError("it was lost"))
                sent.exception()  # for who asks; no traceback if nobody does

    async def _auth_readline(self) -> str:
        """From a connection that was closed while it logs in it would read for ever, and nothing else run."""
        line = b""
        while not line.endswith(b"\r\n"):
            received = await self._loop.sock_recv(self._sock, 2)
            if not received:
                raise ConnectionResetError("it closed the connection")
            line += received
        return line[:-2].decode()


class SystemBus:
    """One connection, used by the client side (``call``, ``subscribe``) and the service side (``serve``) alike."""

    def __init__(self) -> None:
        self._bus: Any = None
        self._room = asyncio.Semaphore(WAITING)
        self._signals: list[tuple[str, str, Callable[[Message], None]]] = []
        self._serve: Callable[[Message], bool] = lambda message: False

    async def __aenter__(self) -> SystemBus:
        try:
            self._bus = _Bus()
            await self._bus.connect()
        except (OSError, EOFError, AuthError) as error:
            raise Unavailable(f"cannot reach the system bus: {error} (is dbus.service running?)") from error
        self._bus.add_message_handler(self._dispatch)
        self._lost = asyncio.create_task(self._bus.lost(), name="bus")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lost.cancel()
        self._bus.disconnect()

    async def lost(self) -> None:
        """Returns when the connection has ended."""
        await asyncio.wait((self._lost,))

    def _dispatch(self, message: Message) -> bool:
        if message.message_type is MessageType.SIGNAL:
            for interface, member, callback in self._signals:
                if message.interface == interface and message.member == member:
                    callback(message)
        elif message.message_type is MessageType.METHOD_CALL:
            for fd in message.unix_fds:  # nothing here takes descriptors; dbus-next would leave them open
                os.close(fd)
            return self._serve(message)
        return False

    async def call(
        self, target: tuple[str, str, str], member: str, signature: str = "", *body: object
    ) -> tuple[Any, ...]:
        """Call a method; the reply's values. ``target`` is destination, path, interface.

        Raises ``BusError`` for an error reply.
        """
        destination, path, interface = target
        message = Message(
            destination=destination,
            path=path,
            interface=interface,
            member=member,
            signature=signature,
            body=list(body),
        )
        try:
            async with self._room:
                if not self._bus.connected:  # dbus-next would wait for ever
                    raise EOFError("it was lost")
                reply: Message = await self._bus.call(message)
        except (OSError, EOFError) as error:
            raise BusError(DISCONNECTED, f"the system bus went away: {error}") from error
        if reply.message_type is MessageType.ERROR:
            raise BusError(reply.error_name, str(reply.body[0]) if reply.body else reply.error_name)
        return tuple(reply.body)

    async def get(self, target: tuple[str, str, str], name: str) -> Any:
        """One property of ``target``."""
        destination, path, interface = target
        properties = (destination, path, "org.freedesktop.DBus.Properties")
        (variant,) = await self.call(properties, "Get", "ss", interface, name)
        return variant.value

    def on_signal(self, interface: str, member: str, callback: Callable[[Message], None]) -> None:
        """Have ``callback`` run for each such signal that the bus sends us."""
        self._signals.append((interface, member, callback))

    async def subscribe(
        self, interface: str, member: str, callback: Callable[[Message], None], match: str = ""
    ) -> None:
        """``on_signal``, and have the bus send them; ``match`` narrows which."""
        self.on_signal(interface, member, callback)
        await self.call(DBUS, "AddMatch", "s", f"type='signal',interface='{interface}',member='{member}'{match}")

    async def uid(self, unique_name: str) -> int:
        """User ID of the sender behind a unique name (org.freedesktop.DBus.GetConnectionUnixUser)."""
        (uid,) = await self.call(DBUS, "GetConnectionUnixUser", "s", unique_name)
        return int(uid)

    def serve(self, handler: Callable[[Message], bool]) -> None:
        """Have ``handler`` see each method call; it returns whether the call is its own to answer."""
        self._serve = handler

    def send(self, message: Message) -> asyncio.Future[None]:
        """Send a message; the future is done once it has left, with its descriptors."""
        sent: asyncio.Future[None] = self._bus.send(message)
        return sent

    async def own(self, name: str) -> None:
        """Own a well-known name, or raise ``Unavailable``: another instance must not run beside this one."""
        (reply,) = await self.call(DBUS, "RequestName", "su", name, NameFlag.DO_NOT_QUEUE.value)
        if reply != RequestNameReply.PRIMARY_OWNER.value:
            raise Unavailable(f"the bus name {name} has an owner already (is another kvmd running?)")
