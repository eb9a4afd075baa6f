"""The connection to the system bus: calls, with a time limit; signals, of whom they are wanted; and calls of others.

Anybody may send anything here, of up to 32 MiB: what nobody waits for is dropped before it is read.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from kvmd.errors import KvmdError, Unavailable
from kvmd.systemd.message import (
    CALL,
    ERROR,
    SIGNAL,
    Incoming,
    Message,
    MessageFlag,
    Unreadable,
    Variant,
    encode,
    error_reply,
)
from kvmd.systemd.transport import Transport, failed

__all__ = [
    "DBUS",
    "DISCONNECTED",
    "INVALID_ARGS",
    "LIMITS_EXCEEDED",
    "TIMEOUT",
    "BusError",
    "Incoming",
    "Message",
    "SystemBus",
    "Variant",
]

DBUS = ("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus")
DO_NOT_QUEUE = 4  # flags and replies of RequestName
PRIMARY_OWNER = 1

# The bus lets one connection wait for 128 replies (max_replies_per_connection, dbus-daemon(1)); polkit has other rooms.
WAITING = 64
PATIENCE = 30.0  # seconds; PID 1 answers none while it reloads

# Bytes of a body.
LONGEST_CALL = 1024
LONGEST_SIGNAL = 256 << 10
LONGEST_ANSWER = 8 << 20
QUICK = 64 << 10  # what is larger is read beside the loop

REFUSALS = 16  # at a time: 3 ms
MOST_REFUSALS = 1 << 16  # that wait to be sent

DISCONNECTED = "org.freedesktop.DBus.Error.Disconnected"
TIMEOUT = "org.freedesktop.DBus.Error.Timeout"
INVALID_ARGS = "org.freedesktop.DBus.Error.InvalidArgs"
LIMITS_EXCEEDED = "org.freedesktop.DBus.Error.LimitsExceeded"
NAME_HAS_NO_OWNER = "org.freedesktop.DBus.Error.NameHasNoOwner"

Callback = Callable[[Incoming], None]


class BusError(KvmdError):
    """An error reply; ``name`` is its D-Bus name, ``str()`` its text."""

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        super().__init__(text)


class SystemBus:
    """One connection, used by the client side (``call``, ``subscribe``) and the service side (``serve``) alike."""

    def __init__(self) -> None:
        self._room = asyncio.Semaphore(WAITING)
        self._answers: dict[int, asyncio.Future[Incoming]] = {}
        self._owners: dict[str, str] = {DBUS[0]: DBUS[0]}  # unique names, of those whose signals are waited for
        self._owner_changed: defaultdict[str, list[Callable[[str], None]]] = defaultdict(list)
        self._signals: dict[tuple[str, str], list[tuple[str, str, Callback]]] = {}
        self._serve: Callback | None = None
        self._refusals: deque[tuple[Incoming, str, str]] = deque(maxlen=MOST_REFUSALS)
        self._refusing: asyncio.Task[None] | None = None

    async def __aenter__(self) -> SystemBus:
        self._transport = Transport(self._wanted, self._received)
        await self._transport.connect()
        self._transport.lost.add_done_callback(self._forsake)
        try:
            await self.call(DBUS, "Hello", returns="s")
        except BusError as error:
            self._transport.close()
            raise Unavailable(f"cannot reach the system bus: {error} (is dbus.service running?)") from error
        self._signals[DBUS[2], "NameOwnerChanged"] = [(DBUS[0], "sss", self._name_owner_changed)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._transport.close()

    async def lost(self) -> None:
        """Returns when the connection has ended."""
        await asyncio.wait((self._transport.lost,))

    def _forsake(self, lost: asyncio.Future[str]) -> None:
        for answer in list(self._answers.values()):
            if not answer.done():
                answer.set_exception(EOFError(lost.result()))
                answer.exception()  # for who waits; no traceback if nobody does

    # what comes

    def _wanted(self, message: Incoming) -> bool:
        if message.kind == CALL:
            if message.body_length > LONGEST_CALL:
                text = f"{message.member} takes no arguments of {message.body_length} bytes ({LONGEST_CALL} at most)"
                self.refuse(message, LIMITS_EXCEEDED, text)
                return False
            return self._serve is not None
        if message.kind == SIGNAL:
            return message.body_length <= LONGEST_SIGNAL and bool(self._listeners(message))
        answer = self._answers.get(message.reply_serial)
        if answer is None or answer.done():
            return False
        if message.body_length > LONGEST_ANSWER:
            text = f"{message.sender} answers with {message.body_length} bytes, and {LONGEST_ANSWER} are read"
            answer.set_exception(BusError(LIMITS_EXCEEDED, text))
            answer.exception()
            return False
        return True

    def _listeners(self, message: Incoming) -> list[Callback]:
        """Of a signal: only from whom it was asked for, and of the shape that was asked for."""
        return [
            callback
            for source, signature, callback in self._signals.get((message.interface, message.member), ())
            if message.sender == self._owners.get(source) and message.signature == signature
        ]

    def _received(self, message: Incoming) -> None:
        if message.kind == CALL and self._serve:
            self._serve(message)
        elif message.kind == SIGNAL:
            with contextlib.suppress(Unreadable):
                for callback in self._listeners(message):
                    callback(message)
        elif (answer := self._answers.get(message.reply_serial)) and not answer.done():
            answer.set_result(message)

    # what is called

    async def call(
        self,
        target: tuple[str, str, str],
        member: str,
        signature: str = "",
        *body: object,
        returns: str = "",
        patience: float = PATIENCE,
        room: asyncio.Semaphore | None = None,
        fds: Sequence[int] = (),
    ) -> tuple[Any, ...]:
        """Call a method; the reply's values. ``target`` is destination, path, interface.

        ``fds``: what handles ("h") in the body count; the caller keeps them.

        ``room``: of those who wait for such an answer; one who gives up after ``patience`` seconds stays in it until
        it has come, as the bus goes on to count it. Raises ``BusError``: an error reply, none in time, or one that is
        not as ``returns`` says.
        """
        destination, path, interface = target
        message = Message(
            destination=destination,
            path=path,
            interface=interface,
            member=member,
            signature=signature,
            body=list(body),
            unix_fds=list(fds),
        )
        try:
            async with asyncio.timeout(patience):
                if destination != DBUS[0]:  # which answers at once, and counts no calls of its own
                    await (room := room or self._room).acquire()
                answer = await asyncio.shield(self._ask(message, room))
        except TimeoutError as error:
            raise BusError(TIMEOUT, f"{destination} has not answered {member} within {patience:g} s") from error
        except (OSError, EOFError) as error:
            raise BusError(DISCONNECTED, f"the system bus went away: {error}") from error
        quick = answer.body_length <= QUICK
        try:
            if answer.kind == ERROR:
                told = answer.values()[0] if quick and answer.signature == "s" else answer.error_name
                raise BusError(answer.error_name, told)
            if answer.signature != returns:
                text = f"{destination} answers {member} by {answer.signature!r}, not by {returns!r}"
                raise BusError(INVALID_ARGS, text)
            return tuple(answer.values() if quick else await asyncio.to_thread(answer.values))
        except Unreadable as error:
            raise BusError(INVALID_ARGS, f"{destination}: {error}") from error

    def post(self, target: tuple[str, str, str], member: str, signature: str, *body: object) -> None:
        """Call a method, and wait for no answer."""
        destination, path, interface = target
        self.send(
            Message(
                destination=destination,
                path=path,
                interface=interface,
                member=member,
                signature=signature,
                body=list(body),
                flags=MessageFlag.NO_REPLY_EXPECTED,
            )
        )

    def _ask(self, message: Message, room: asyncio.Semaphore | None) -> asyncio.Future[Incoming]:
        answer: asyncio.Future[Incoming] = asyncio.get_running_loop().create_future()
        message.serial = serial = self._transport.next_serial()

        def done(_answer: asyncio.Future[Incoming]) -> None:
            del self._answers[serial]
            if room:
                room.release()

        self._answers[serial] = answer
        answer.add_done_callback(done)
        try:
            self._transport.send(encode(message), message.unix_fds)
        except BaseException:
            answer.cancel()
            raise
        if self._transport.lost.done():
            self._forsake(self._transport.lost)
        return answer

    async def uid(self, unique_name: str) -> int:
        """User ID of the sender behind a unique name (org.freedesktop.DBus.GetConnectionUnixUser)."""
        (uid,) = await self.call(DBUS, "GetConnectionUnixUser", "s", unique_name, returns="u")
        return int(uid)

    async def own(self, name: str) -> None:
        """Own a well-known name, or raise ``Unavailable``: another instance must not run beside this one."""
        (reply,) = await self.call(DBUS, "RequestName", "su", name, DO_NOT_QUEUE, returns="u")
        if reply != PRIMARY_OWNER:
            raise Unavailable(f"the bus name {name} has an owner already (is another kvmd running?)")

    # signals

    async def watch(self, name: str, changed: Callable[[str], None] | None = None) -> None:
        """Know whose signals are those of ``name``; ``changed(owner)`` when it has another one, or none: empty."""
        if changed:
            self._owner_changed[name].append(changed)
        if name in self._owners:
            return
        self._owners[name] = ""
        await self.add_match(f"type='signal',sender='{DBUS[0]}',member='NameOwnerChanged',arg0='{name}'")
        try:
            (self._owners[name],) = await self.call(DBUS, "GetNameOwner", "s", name, returns="s")
        except BusError as error:
            if error.name != NAME_HAS_NO_OWNER:
                raise

    def _name_owner_changed(self, message: Incoming) -> None:
        name, _before, owner = message.values()
        if name in self._owners:
            self._owners[name] = owner
            for changed in self._owner_changed[name]:
                changed(owner)

    def on_signal(self, source: str, interface: str, member: str, signature: str, callback: Callback) -> None:
        """Have ``callback`` run for each such signal of ``source``, which is watched, that the bus sends us."""
        self._signals.setdefault((interface, member), []).append((source, signature, callback))

    async def subscribe(self, source: str, interface: str, member: str, signature: str, callback: Callback) -> None:
        """``on_signal``, and have the bus send them."""
        await self.watch(source)
        self.on_signal(source, interface, member, signature, callback)
        await self.add_match(f"type='signal',sender='{source}',interface='{interface}',member='{member}'")

    async def add_match(self, rule: str) -> None:
        await self.call(DBUS, "AddMatch", "s", rule)

    async def remove_match(self, rule: str) -> None:
        await self.call(DBUS, "RemoveMatch", "s", rule)

    # what others call

    def serve(self, handler: Callback) -> None:
        """Have ``handler`` see each method call of 1 KiB or less, and answer those that are ``answered``."""
        self._serve = handler

    def send(self, message: Message) -> asyncio.Future[None]:
        """Send a signal or a reply; the future is done once it has left, with its descriptors."""
        message.serial = self._transport.next_serial()
        try:
            data = encode(message)
        except Exception as error:  # noqa: BLE001  # it cannot be marshalled: told its sender, and in nobody's way
            return failed(error)
        return self._transport.send(data, message.unix_fds)

    async def send_large(self, message: Message) -> None:
        """As ``send``, for what takes long to marshal: beside the loop, and sent when that is done."""
        message.serial = self._transport.next_serial()
        await self._transport.send(await asyncio.to_thread(encode, message), [])

    def refuse(self, call: Incoming, name: str, text: str) -> None:
        """An error for a call that is none of anybody's; a flood of such holds up nothing else."""
        if call.answered:
            self._refusals.append((call, name, text))
            if self._refusing is None:
                self._refusing = asyncio.create_task(self._refuse(), name="refusals")

    async def _refuse(self) -> None:
        """A few at a time, and the next when these have left: other answers go between."""
        while self._refusals:
            some = [self._refusals.popleft() for _ in range(min(REFUSALS, len(self._refusals)))]
            await asyncio.wait([self.send(error_reply(*refusal)) for refusal in some])
            await asyncio.sleep(0)
        self._refusing = None
