"""Messages as they come: header before body, nothing kept of what nobody wants."""

from __future__ import annotations

import struct

import pytest
from dbus_next._private.unmarshaller import Unmarshaller
from dbus_next.message import Message as Theirs

from kvmd.systemd.message import (
    CALL,
    LONGEST,
    LONGEST_HEADER,
    RETURN,
    Incoming,
    Message,
    Splitter,
    TooLong,
    Unreadable,
    Variant,
    encode,
    error_reply,
    reply,
)

MIB = 1 << 20


def call(body: str = "x", path: str = "/a/b", sender: str = ":1.7") -> bytes:
    """As the bus hands it on: with the sender, which no caller writes."""
    message = Message(
        destination="a.b", path=path, interface="a.b.c", member="Do", signature="s", body=[body], serial=5
    )
    data = encode(message)
    _length, _serial, fields = struct.unpack_from("<III", data, 4)
    begin = 16 + fields + 7 & ~7
    field = struct.pack("<BBcxI", 7, 1, b"s", len(sender)) + sender.encode() + b"\0"
    length = begin - 16 + len(field)
    header = data[:begin] + field + bytes(-length % 8)
    return header[:12] + struct.pack("<I", length) + header[16:] + data[begin:]


def test_private_names_of_the_library() -> None:
    """Of these two kvmd makes use; under other names it would hear and say nothing."""
    assert callable(Unmarshaller.unmarshall)
    assert callable(Theirs._marshall)


@pytest.mark.parametrize("size", [1, 7, 16, 100, 1000])
def test_in_whatever_pieces_they_come(size: int) -> None:
    data = call("one") + call("two" * 100) + call("three")
    splitter = Splitter(lambda message: True)
    came = [message for at in range(0, len(data), size) for message in splitter.feed(data[at : at + size])]
    assert [message.values() for message in came] == [["one"], ["two" * 100], ["three"]]
    first = came[0]
    assert (first.kind, first.serial, first.path, first.interface, first.member) == (CALL, 5, "/a/b", "a.b.c", "Do")
    assert (first.sender, first.signature, first.answered, first.interactive) == (":1.7", "s", True, False)


def test_nothing_is_kept_of_what_is_not_wanted() -> None:
    asked: list[int] = []

    def wanted(message: Incoming) -> bool:
        asked.append(message.body_length)
        return message.body_length < 1024

    splitter = Splitter(wanted)
    data = call("x" * 3 * MIB) + call("small")
    came = []
    for at in range(0, len(data), 65536):
        came += splitter.feed(data[at : at + 65536])
        assert len(splitter._buffer) <= 65536
    assert [message.values() for message in came] == [["small"]]
    assert asked == [3 * MIB + 5, 10]


def test_a_header_too_long_is_not_looked_at() -> None:
    asked: list[str] = []
    splitter = Splitter(lambda message: not asked.append(message.path))
    long = "/" + "x" * LONGEST_HEADER
    assert [message.path for message in splitter.feed(call(path=long) + call())] == ["/a/b"]
    assert asked == ["/a/b"]


def test_a_header_that_is_none_ends_nothing() -> None:
    whole = call()
    odd = bytearray(whole)
    odd[18] = ord("v")  # the type of the first field
    early = bytearray(whole)
    struct.pack_into("<I", early, 20, 1 << 30)  # its length
    splitter = Splitter(lambda message: True)
    assert len(list(splitter.feed(bytes(odd) + bytes(early) + whole))) == 1
    with pytest.raises(Unreadable, match="does not speak D-Bus"):
        list(splitter.feed(b"GET / HTTP/1.0\r\n\r\n"))


def test_a_body_that_is_none() -> None:
    whole = bytearray(call("x" * 8))
    struct.pack_into("<I", whole, len(whole) - 13, 1 << 20)  # the length of the string
    (message,) = Splitter(lambda message: True).feed(bytes(whole))
    with pytest.raises(Unreadable, match="the body of Do cannot be read"):
        message.values()


def test_big_endian() -> None:
    fields = (
        struct.pack(">BBcxI", 3, 1, b"s", 4) + b"Ping\0" + b"\0" * 3 + struct.pack(">BBcxB", 8, 1, b"g", 1) + b"u\0"
    )
    data = struct.pack(">cBBBIII", b"B", CALL, 1, 1, 4, 9, len(fields)) + fields
    data += b"\0" * (-len(data) % 8) + struct.pack(">I", 77)
    (message,) = Splitter(lambda message: True).feed(data)
    assert (message.member, message.signature, message.serial, message.answered) == ("Ping", "u", 9, False)


def test_answers() -> None:
    (asked,) = Splitter(lambda message: True).feed(call())
    answer, refusal = reply(asked, "v", [Variant("u", 7)], []), error_reply(asked, "a.b.No", "because")
    answer.serial = refusal.serial = 1
    came, refused = Splitter(lambda message: True).feed(encode(answer) + encode(refusal))
    assert (came.kind, came.reply_serial, came.values()[0].value) == (RETURN, 5, 7)
    assert (refused.error_name, refused.reply_serial, refused.values()) == ("a.b.No", 5, ["because"])
    large = reply(asked, "s", ["x" * LONGEST], [])
    large.serial = 2
    with pytest.raises(TooLong, match="16 MiB"):
        encode(large)
