"""The socket to the system bus: logged in, messages in and out, neither more at a time than the loop has time for."""

from __future__ import annotations

import asyncio
import os
import socket
from array import array
from collections import deque
from collections.abc import Callable
from urllib.parse import unquote

from kvmd.errors import Unavailable
from kvmd.systemd.message import Incoming, Splitter, Unreadable

ADDRESS = "unix:path=/run/dbus/system_bus_socket"
LOGIN = 30.0  # seconds
LONGEST_LINE = 1024  # bytes, while it logs in
CHUNK = 1 << 16  # bytes read at a time: some 500 small messages, 5 ms


class Transport:
    """One connection, from its login to its end; ``lost`` is done then, with the reason."""

    def __init__(self, wanted: Callable[[Incoming], bool], received: Callable[[Incoming], None]) -> None:
        """``wanted(message)`` as for ``Splitter``; ``received(message)`` for each of these, and it raises nothing."""
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._splitter = Splitter(wanted)
        self._received = received
        self._serial = 0
        self._waiting: deque[tuple[memoryview, list[int], asyncio.Future[None]]] = deque()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)

    async def connect(self) -> None:
        """Raises ``Unavailable``."""
        kind, _, path = os.environ.get("DBUS_SYSTEM_BUS_ADDRESS", ADDRESS).partition(";")[0].partition("=")
        loop = asyncio.get_running_loop()
        try:
            if kind != "unix:path":
                raise ConnectionError(f"DBUS_SYSTEM_BUS_ADDRESS is no unix:path= but {kind}=")
            async with asyncio.timeout(LOGIN):
                await loop.sock_connect(self._socket, unquote(path.partition(",")[0]))
                await self._login()
        except TimeoutError as error:
            self._socket.close()
            raise Unavailable(f"cannot reach the system bus: no answer within {LOGIN:g} s") from error
        except OSError as error:
            self._socket.close()
            raise Unavailable(f"cannot reach the system bus: {error} (is dbus.service running?)") from error
        loop.add_reader(self._socket, self._read)

    async def _login(self) -> None:
        """D-Bus specification, "Authentication Protocol": by the user that the kernel says we are."""
        loop = asyncio.get_running_loop()
        user = str(os.geteuid()).encode().hex()
        for line, answer in (f"\0AUTH EXTERNAL {user}", b"OK"), ("NEGOTIATE_UNIX_FD", b"AGREE_UNIX_FD"):
            await loop.sock_sendall(self._socket, f"{line}\r\n".encode())
            said = b""
            while not said.endswith(b"\r\n") and len(said) < LONGEST_LINE:
                if not (received := await loop.sock_recv(self._socket, LONGEST_LINE)):
                    raise ConnectionResetError("it closed the connection")
                said += received
            if not said.startswith(answer):
                raise ConnectionRefusedError(f"it does not let us in: {said.decode(errors='replace').strip()}")
        await loop.sock_sendall(self._socket, b"BEGIN\r\n")

    def close(self) -> None:
        self._end("it was closed")

    def _end(self, reason: str) -> None:
        if self.lost.done():
            return
        self.lost.set_result(reason)
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._socket)
        loop.remove_writer(self._socket)
        self._socket.close()
        while self._waiting:
            _data, _descriptors, sent = self._waiting.popleft()
            failed(EOFError(reason), sent)

    def _read(self) -> None:
        """Without room for descriptors, which nothing here takes: the kernel drops what comes (SCM_RIGHTS, unix(7))."""
        try:
            data = self._socket.recv(CHUNK)
        except BlockingIOError:
            return
        except OSError as error:
            self._end(str(error))
            return
        if not data:
            self._end("it was lost")
            return
        try:
            for message in self._splitter.feed(data):
                self._received(message)
        except Unreadable as error:
            self._end(str(error))

    def next_serial(self) -> int:
        self._serial += 1
        return self._serial

    def send(self, data: bytes, descriptors: list[int]) -> asyncio.Future[None]:
        """Send a message; the future is done once it has left, with its descriptors. In the order of the calls."""
        if self.lost.done():
            return failed(EOFError(self.lost.result()))
        sent: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((memoryview(data), descriptors, sent))
        if len(self._waiting) == 1:
            self._write()
        return sent

    def _write(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            data, descriptors, sent = self._waiting[0]
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", descriptors))] if descriptors else []
            try:
                written = self._socket.sendmsg([data], rights)
            except BlockingIOError:
                loop.add_writer(self._socket, self._write)
                return
            except OSError as error:
                self._end(str(error))
                return
            if written < len(data):
                self._waiting[0] = data[written:], [], sent
                continue
            self._waiting.popleft()
            if not sent.done():
                sent.set_result(None)
        loop.remove_writer(self._socket)


def failed(error: Exception, sent: asyncio.Future[None] | None = None) -> asyncio.Future[None]:
    """A message that did not leave: known to who asks, and no traceback if nobody does."""
    sent = sent or asyncio.get_running_loop().create_future()
    if not sent.done():
        sent.set_exception(error)
        sent.exception()
    return sent
