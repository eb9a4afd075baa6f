"""D-Bus messages: the header of one looked at before its body, and dbus-next, the codec of both.

The one room that knows the library, and but two private names of it: others have ``Message`` and ``Variant`` from here.
A body costs dbus-next a second and 40 MiB for each MiB; a header here 10 µs, and nothing is kept of what is not wanted.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from struct import unpack_from
from typing import Any

from dbus_next._private.unmarshaller import Unmarshaller
from dbus_next.constants import MessageFlag, MessageType
from dbus_next.message import Message
from dbus_next.signature import Variant

from kvmd.errors import KvmdError

__all__ = [
    "CALL",
    "ERROR",
    "RETURN",
    "SIGNAL",
    "Incoming",
    "Message",
    "MessageFlag",
    "Splitter",
    "TooLong",
    "Unreadable",
    "Variant",
    "encode",
    "error_reply",
    "reply",
]

# D-Bus specification, "Message Protocol": types, flags, header fields.
CALL, RETURN, ERROR, SIGNAL = 1, 2, 3, 4
NO_REPLY_EXPECTED = 1
ALLOW_INTERACTIVE_AUTHORIZATION = 4
PATH, INTERFACE, MEMBER, ERROR_NAME, REPLY_SERIAL, DESTINATION, SENDER, SIGNATURE = range(1, 9)
FIXED = 16  # bytes of a header, before its fields
LONGEST = 16 << 20  # bytes of a message of ours; the bus throws out who sends 32 MiB (max_message_size, dbus-daemon(1))
LONGEST_HEADER = 8192  # bytes; names have 255 at most, only a path may be longer


class Unreadable(Exception):
    """What came is no D-Bus, or no body of that signature."""


class TooLong(KvmdError):
    dbus_name = "org.freedesktop.DBus.Error.LimitsExceeded"


class Incoming:
    """A message as it came: its header, and its body by ``values`` for who wants it."""

    __slots__ = ("_fields", "body_length", "flags", "frame", "kind", "serial")

    def __init__(self, header: bytearray, order: str, fields_end: int) -> None:
        """Raises ``Unreadable``."""
        self.kind, self.flags = header[1], header[2]
        self.body_length, self.serial = unpack_from(order + "II", header, 4)
        self.frame = b""
        self._fields = fields = dict[int, Any]()
        at = FIXED
        try:
            while at < fields_end:
                code, kind = header[at], header[at + 2]  # a struct, of a variant whose signature is one letter
                if header[at + 1] != 1 or kind not in b"gosu":
                    raise Unreadable("a header field of a type that none has")
                if kind == ord("g"):
                    begin, end = at + 5, at + 5 + header[at + 4]
                    fields[code] = header[begin:end].decode()
                    at = end + 1
                else:
                    (number,) = unpack_from(order + "I", header, at + 4)
                    at += 8
                    if kind == ord("u"):
                        fields[code] = number
                    else:
                        fields[code] = header[at : at + number].decode()
                        at += number + 1
                if at > fields_end:
                    raise Unreadable("a header field that ends after all of them")
                at = at + 7 & ~7
        except (IndexError, ValueError) as error:
            raise Unreadable(f"a header that ends early, or is no text: {error}") from error

    def _text(self, code: int) -> str:
        value = self._fields.get(code, "")
        return value if isinstance(value, str) else ""

    @property
    def path(self) -> str:
        return self._text(PATH)

    @property
    def interface(self) -> str:
        """Empty where the call names none."""
        return self._text(INTERFACE)

    @property
    def member(self) -> str:
        return self._text(MEMBER)

    @property
    def error_name(self) -> str:
        return self._text(ERROR_NAME)

    @property
    def sender(self) -> str:
        """The unique name; the bus itself writes it, and has none but its own."""
        return self._text(SENDER)

    @property
    def signature(self) -> str:
        return self._text(SIGNATURE)

    @property
    def reply_serial(self) -> int:
        value = self._fields.get(REPLY_SERIAL, 0)
        return value if isinstance(value, int) else 0

    @property
    def answered(self) -> bool:
        """Whether the caller waits for an answer."""
        return not self.flags & NO_REPLY_EXPECTED

    @property
    def interactive(self) -> bool:
        """Whether a person may be asked for a password."""
        return bool(self.flags & ALLOW_INTERACTIVE_AUTHORIZATION)

    def values(self) -> list[Any]:
        """The body. Raises ``Unreadable``.

        For signatures that are known only: dbus-next keeps each it has seen for ever.
        """
        try:
            message = Unmarshaller(io.BytesIO(self.frame)).unmarshall()  # type: ignore[no-untyped-call]
        except Exception as error:
            raise Unreadable(f"the body of {self.member or 'the answer'} cannot be read: {error}") from error
        return list(message.body)


class Splitter:
    """Bytes of the bus → messages. Of one that is not wanted, or whose header is too long, no byte is kept."""

    def __init__(self, wanted: Callable[[Incoming], bool]) -> None:
        """``wanted(message)`` is asked once for each, when there is no more of it than its header."""
        self._wanted = wanted
        self._buffer = bytearray()
        self._message: Incoming | None = None
        self._length = 0  # of the message whose header has been read
        self._skip = 0

    def feed(self, data: bytes) -> Iterator[Incoming]:
        """The messages that are whole now. Raises ``Unreadable`` for what is no D-Bus at all."""
        self._buffer += data
        while self._drop() and (self._message or self._begin()):
            if self._message is None:
                continue  # it is not wanted
            if len(self._buffer) < self._length:
                return
            message, self._message = self._message, None
            message.frame = bytes(self._buffer[: self._length])
            del self._buffer[: self._length]
            yield message

    def _drop(self) -> bool:
        """Whether all that is to be skipped has come."""
        if self._skip:
            gone = min(self._skip, len(self._buffer))
            del self._buffer[:gone]
            self._skip -= gone
        return not self._skip

    def _begin(self) -> bool:
        """Whether there is a next header; it has been looked at then."""
        buffer = self._buffer
        if len(buffer) < FIXED:
            return False
        order = {ord("l"): "<", ord("B"): ">"}.get(buffer[0])
        if order is None or buffer[3] != 1:
            raise Unreadable("it does not speak D-Bus")
        body, _serial, fields = unpack_from(order + "III", buffer, 4)
        header = FIXED + fields + 7 & ~7
        if fields <= LONGEST_HEADER:
            if len(buffer) < header:
                return False
            try:
                message = Incoming(buffer, order, FIXED + fields)
            except Unreadable:
                message = None
            if message and self._wanted(message):
                self._message, self._length = message, header + body
                return True
        self._skip = header + body
        return True


def encode(message: Message) -> bytes:
    """Raises ``TooLong``, or whatever dbus-next does for a body that is not of the message's signature."""
    data = bytes(message._marshall(negotiate_unix_fd=True))  # type: ignore[no-untyped-call]
    if len(data) > LONGEST:
        raise TooLong(f"there is more to say than the bus takes at once ({len(data) >> 20} MiB)")
    return data


def reply(call: Incoming, signature: str, values: list[Any], descriptors: list[int]) -> Message:
    return Message(
        message_type=MessageType.METHOD_RETURN,
        reply_serial=call.serial,
        destination=call.sender,
        signature=signature,
        body=values,
        unix_fds=descriptors,
    )


def error_reply(call: Incoming, name: str, text: str) -> Message:
    return Message(
        message_type=MessageType.ERROR,
        reply_serial=call.serial,
        destination=call.sender,
        error_name=name,
        signature="s",
        body=[text],
    )
