"""Inside a host: what a local user may try to keep kvmd from its work; abuser.py VERB …, and root's clock beside it.

By raw messages, as no library sends all of these. The last line is JSON.
"""

from __future__ import annotations

import array
import json
import os
import select
import selectors
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from dbus_next.constants import MessageFlag, MessageType
from dbus_next.message import Message
from dbus_next.signature import Variant

KVMD = {"destination": "org.kvmd1", "path": "/org/kvmd1", "interface": "org.kvmd1.Manager"}
BUS = {"destination": "org.freedesktop.DBus", "path": "/org/freedesktop/DBus", "interface": "org.freedesktop.DBus"}
POLKIT = {
    "destination": "org.freedesktop.PolicyKit1",
    "path": "/org/freedesktop/PolicyKit1/Authority",
    "interface": "org.freedesktop.PolicyKit1.Authority",
}
MIB = 1 << 20


class Bus:
    """A connection that sends whatever it is told to."""

    def __init__(self) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect("/run/dbus/system_bus_socket")
        self.socket.sendall(b"\0AUTH EXTERNAL " + str(os.geteuid()).encode().hex().encode() + b"\r\n")
        assert self.socket.recv(200).startswith(b"OK")
        self.socket.sendall(b"NEGOTIATE_UNIX_FD\r\n")
        assert self.socket.recv(200).startswith(b"AGREE")
        self.socket.sendall(b"BEGIN\r\n")
        self.buffer = b""
        self.serial = 0
        self.name = self.call(member="Hello", **BUS)[2].split(b"\0")[0].decode()

    def message(self, **fields: Any) -> bytes:
        message = Message(**fields)
        self.serial += 1
        message.serial = self.serial
        return bytes(message._marshall(negotiate_unix_fd=True))

    def send(self, data: bytes, descriptors: int = 0) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0] * descriptors))] if descriptors else []
        sent = self.socket.sendmsg([data], rights)
        self.socket.sendall(data[sent:])

    def call(self, **fields: Any) -> tuple[int, str, bytes]:
        """Type, error name and the body's first string of the answer."""
        self.send(self.message(**fields))
        while True:
            for kind, serial, error, body in self.read():
                if serial == self.serial:
                    return kind, error, body

    def read(self) -> Iterator[tuple[int, int, str, bytes]]:
        data = self.socket.recv(1 << 20)
        if not data:
            raise ConnectionResetError("thrown off the bus")
        self.buffer += data
        while len(self.buffer) >= 16:
            body, _serial, length = struct.unpack_from("<III", self.buffer, 4)
            begin = 16 + length + 7 & ~7
            if len(self.buffer) < begin + body:
                return
            head, content, self.buffer = (
                self.buffer[:begin],
                self.buffer[begin : begin + body],
                self.buffer[begin + body :],
            )
            yield head[1], reply_serial(head), error_name(head), content[4:]

    def close(self) -> None:
        self.socket.close()


def reply_serial(head: bytes) -> int:
    at = head.find(b"\5\1u\0")
    return int(struct.unpack_from("<I", head, at + 4)[0]) if at >= 16 else 0


def error_name(head: bytes) -> str:
    at = head.find(b"\4\1s\0")
    return head[at + 8 :].split(b"\0")[0].decode() if head[1] == MessageType.ERROR.value else ""


def start_time(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


# --- abuse ------------------------------------------------------------------------------------------------------------


def descriptors(count: str) -> dict[str, object]:
    """Messages of each type with 16 descriptors each."""
    bus = Bus()
    fds = list(range(16))  # their number counts, send() says which
    alone = {"destination": "org.kvmd1"}
    kinds = (
        {
            "message_type": MessageType.SIGNAL,
            "path": "/",
            "interface": "a.b",
            "member": "C",
            "destination": "org.kvmd1",
        },
        {"message_type": MessageType.ERROR, "error_name": "a.b.C", "reply_serial": 1} | alone,
        {"message_type": MessageType.METHOD_RETURN, "reply_serial": 1} | alone,
        {"member": "ListGuests", **KVMD},
        {"member": "Ping", **KVMD, "interface": "org.freedesktop.DBus.Peer", "flags": MessageFlag.NO_REPLY_EXPECTED},
    )
    for _ in range(int(count)):
        for kind in kinds:
            bus.send(bus.message(unix_fds=fds, **kind), 16)
    return {"answer": bus.call(member="ListGuests", **KVMD)[0]}


def variants(count: str) -> dict[str, object]:
    """31 MiB each, of what takes longest to read: for the bus, which looks at each of 8 million, too."""
    return large(count, "av", b"\1y\0\7")


def octets(count: str) -> dict[str, object]:
    """31 MiB each, which the bus need not look at."""
    return large(count, "ay", b"kvmd")


def large(count: str, signature: str, element: bytes) -> dict[str, object]:
    bus = Bus()
    head = bytearray(bus.message(member="Ping", signature=signature, body=[[] if signature == "av" else b""], **KVMD))[
        :-4
    ]
    content = element * (31 * MIB // len(element))
    struct.pack_into("<I", head, 4, len(content) + 4)
    data = bytes(head) + struct.pack("<I", len(content)) + content
    begin, answers = time.monotonic(), Counter[str]()
    for _ in range(int(count)):
        bus.send(data)
        answered = False
        while not answered:
            for _kind, serial, error, _text in bus.read():
                if serial:
                    answers[error], answered = answers[error] + 1, True
    return {"seconds": time.monotonic() - begin, "answers": answers}


def long_header(count: str) -> dict[str, object]:
    bus = Bus()
    message = bus.message(flags=MessageFlag.NO_REPLY_EXPECTED, member="Ping", **KVMD | {"path": "/" + "x" * 20 * MIB})
    for _ in range(int(count)):
        bus.send(message)
    return {"answer": bus.call(member="ListGuests", **KVMD)[0]}


def small(count: str) -> dict[str, object]:
    """So many calls as fast as they go, from which nobody wants an answer."""
    bus = Bus()
    begin = time.monotonic()
    message = bus.message(member="ListGuests", flags=MessageFlag.NO_REPLY_EXPECTED, **KVMD)
    other = bus.message(member="Reload", flags=MessageFlag.NO_REPLY_EXPECTED, **KVMD)
    for _ in range(int(count) // 500):
        bus.send((message + other) * 250)
    return {"seconds": time.monotonic() - begin, "unanswered": bus.call(member="ListGuests", **KVMD)[0]}


def calls(count: str) -> dict[str, object]:
    """So many in flight, from as many connections as that takes; each must be answered once."""
    buses = [Bus() for _ in range(int(count) // 125)]
    begin = time.monotonic()
    for bus in buses:
        bus.send(b"".join(bus.message(member="GetGuest", signature="s", body=["steady"], **KVMD) for _ in range(125)))
    answers, open_calls = Counter[str](), {bus: set(range(2, 127)) for bus in buses}
    with selectors.DefaultSelector() as selector:
        for bus in buses:
            selector.register(bus.socket, selectors.EVENT_READ, bus)
        while any(open_calls.values()) and (ready := selector.select(20)):
            for key, _events in ready:
                for _kind, serial, error, _text in key.data.read():
                    if serial:
                        open_calls[key.data].remove(serial)
                        answers[error] += 1
    return {"seconds": time.monotonic() - begin, "answers": answers, "missing": sum(map(len, open_calls.values()))}


def signals(seconds: str) -> dict[str, object]:
    """As if systemd had said that a job has ended: to kvmd alone and to all, for each number that comes next."""
    bus, sent, end, errors = Bus(), 0, time.monotonic() + float(seconds), Counter[str]()
    first = int(os.environ.get("JOB", "1"))
    systemd = {"path": "/org/freedesktop/systemd1", "interface": "org.freedesktop.systemd1.Manager"}
    kind = {"message_type": MessageType.SIGNAL, "member": "JobRemoved", **systemd}
    while time.monotonic() < end:
        for number in range(first, first + 100):
            path = f"/org/freedesktop/systemd1/job/{number}"
            for result in ("failed", "done"):
                body = [number, path, "kvmd-victim.scope", result]
                for target in ({"destination": "org.kvmd1"}, {}):
                    bus.send(bus.message(signature="uoss", body=body, **kind, **target))
            bus.send(bus.message(signature="u", body=[number], destination="org.kvmd1", **kind))
            sent += 5
        while select.select([bus.socket], [], [], 0)[0]:
            errors.update(error for _kind, _serial, error, _text in bus.read())
    return {"sent": sent, "errors": errors}


def agent(count: str) -> dict[str, object]:
    """A polkit agent that never answers, and calls that it is to authenticate; until this process is ended."""
    bus = Bus()
    me = os.getpid()
    details = {"pid": Variant("u", me), "start-time": Variant("t", start_time(me)), "uid": Variant("i", os.getuid())}
    register = {"member": "RegisterAuthenticationAgent", "signature": "(sa{sv})ss", **POLKIT}
    registered = bus.call(body=[["unix-process", details], "C", "/agent"], **register)
    flags = MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION
    for _ in range(int(count)):
        bus.send(bus.message(member="StartGuest", signature="s", body=["steady"], flags=flags, **KVMD))
    answers, asked, end = Counter[str](), 0, time.monotonic() + 30
    bus.socket.settimeout(1)
    while asked + answers.total() < int(count) and time.monotonic() < end:
        try:
            for kind, _serial, _error, text in bus.read():
                if kind == MessageType.METHOD_CALL.value:
                    asked += 1
                elif kind == MessageType.ERROR.value:
                    answers[text.split(b"\0")[0].decode()] += 1
        except TimeoutError:
            continue
    print(json.dumps({"registered": registered[0], "asked": asked, "answers": answers}), flush=True)
    sys.stdin.read()
    return {}


# --- root, beside it --------------------------------------------------------------------------------------------------


def clock(seconds: str) -> dict[str, object]:
    """How long calls of root's take, one after the other: to kvmd, and to the bus itself at the same time."""
    took: dict[str, list[float]] = {"kvmd": [], "bus": []}

    def run(name: str, fields: dict[str, Any]) -> None:
        bus, end = Bus(), time.monotonic() + float(seconds)
        while time.monotonic() < end:
            begin = time.monotonic()
            kind, _error, text = bus.call(**fields)
            if kind != MessageType.METHOD_RETURN.value:
                raise RuntimeError(text.decode(errors="replace"))
            took[name].append((time.monotonic() - begin) * 1000)
            time.sleep(0.02)

    beside = threading.Thread(target=run, args=("bus", {"member": "GetId", **BUS}))
    beside.start()
    run("kvmd", {"member": "StartGuest", "signature": "s", "body": ["steady"], **KVMD})
    beside.join()
    return {
        name: {"calls": len(ms), **{key: round(value, 1) for key, value in (("median", median(ms)), ("max", max(ms)))}}
        for name, ms in took.items()
    }


VERBS: dict[str, Callable[[str], dict[str, object]]] = {
    verb.__name__: verb for verb in (descriptors, variants, octets, long_header, small, calls, signals, agent, clock)
}

if __name__ == "__main__":
    print(json.dumps(VERBS[sys.argv[1]](sys.argv[2])))
