"""AF_VSOCK (vsock(7)), over which a guest's systemd says READY=1: the guest's address, and who listens to it.

systemd 254 and later, PID 1 of a guest, makes one stream connection for each notification of sd_notify(3): lines up
to the end of the stream. Whatever else a guest may send is bounded, and forgotten.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Callable
from typing import cast

from kvmd.errors import StartFailed

DEVICE = "/dev/vhost-vsock"
SET_GUEST_CID = 0x4008AF60  # linux/vhost.h
FIRST_CID = 3  # linux/vm_sockets.h: below are the hypervisor, the machine itself and the host; the last one is any
CIDS = socket.VMADDR_CID_ANY - FIRST_CID
ATTEMPTS = 64

LONGEST = 1 << 14  # bytes of a notification
CONNECTIONS = 8  # that a guest may have open at a time
PATIENCE = 10.0  # seconds that one of them may take
PAUSE = 0.001  # seconds from one to the next


def open_device(seed: int) -> tuple[int, int]:
    """/dev/vhost-vsock for one guest, and the address (CID) it has there: always that of ``seed``, unless taken.

    The kernel loads the module when the device is opened. Raises ``StartFailed``.
    """
    try:
        fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        hint = "load the module vhost_vsock, or use serial.ready"
        raise StartFailed(f"vsock.ready cannot be had without {DEVICE}: {error.strerror} ({hint})") from error
    failure = OSError()
    for cid in (FIRST_CID + (seed + attempt) % CIDS for attempt in range(ATTEMPTS)):
        try:
            fcntl.ioctl(fd, SET_GUEST_CID, struct.pack("=Q", cid))
            return fd, cid
        except OSError as error:
            failure = error
            if error.errno != errno.EADDRINUSE:
                break
    os.close(fd)
    raise StartFailed(f"cannot get a vsock address for the guest: {failure.strerror}") from failure


def listen(port: int = socket.VMADDR_PORT_ANY) -> socket.socket:
    """A socket that guests can connect to, at ``port`` or at one that is free. Raises ``StartFailed``."""
    try:
        listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            listener.bind((socket.VMADDR_CID_HOST, port))
            listener.listen()
        except OSError:
            listener.close()
            raise
    except OSError as error:
        at = "" if port == socket.VMADDR_PORT_ANY else f" at its port {port}"
        raise StartFailed(f"cannot listen to the guest over vsock{at}: {error.strerror}") from error
    return listener


class Listener:
    """Calls ``ready`` whenever the guest at ``cid`` says READY=1. To nobody else does it listen."""

    def __init__(self, cid: int, ready: Callable[[], None]) -> None:
        self.cid = cid
        self.ready = ready
        self.open: set[asyncio.Transport] = set()
        self._task: asyncio.Task[None] | None = None

    def start(self, listener: socket.socket) -> None:
        """Listen from now on; the socket is owned."""
        listener.setblocking(False)
        self._task = asyncio.create_task(self._accept(listener), name=f"vsock of {self.cid}")

    async def _accept(self, listener: socket.socket) -> None:
        """One after the other, and only so many in a second: all guests can connect."""
        loop = asyncio.get_running_loop()
        with listener:
            while True:
                with contextlib.suppress(OSError):  # gone again, or too many files are open
                    connection, _address = await loop.sock_accept(listener)
                    await loop.connect_accepted_socket(lambda: Notification(self), connection)
                await asyncio.sleep(PAUSE)

    def close(self) -> None:
        if self._task:
            self._task.cancel()
        for transport in set(self.open):
            transport.abort()


class Notification(asyncio.Protocol):
    """One connection."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._said = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        cid, _ = transport.get_extra_info("peername")
        if cid != self._listener.cid or len(self._listener.open) >= CONNECTIONS:
            self._transport.abort()
        else:
            self._listener.open.add(self._transport)
            self._deadline = asyncio.get_running_loop().call_later(PATIENCE, self._transport.abort)

    def data_received(self, data: bytes) -> None:
        self._said += data
        if len(self._said) > LONGEST:
            self._transport.abort()

    def eof_received(self) -> None:
        if b"READY=1" in self._said.split(b"\n"):
            self._listener.ready()

    def connection_lost(self, error: Exception | None) -> None:
        if self._transport in self._listener.open:
            self._listener.open.discard(self._transport)
            self._deadline.cancel()
