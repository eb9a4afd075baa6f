"""Inside a VM: runs commands that come over virtio-serial ports, one at a time on each. Not part of the product.

To the agent: {"id": I, "argv": [...]}, then {"in": BASE64} and at its end {"in": null}.
From it: {"id": I, "out": BASE64}, {"id": I, "err": BASE64}, at last {"id": I, "rc": N}. One JSON object per line.
The host's end of the port is closed when the client ends; then the command is ended, too.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

EDGE = select.EPOLLIN | select.EPOLLET  # a port whose other end is closed says so at each poll, else


class Gone(Exception):
    """Nobody is at the other end any more."""


class Port:
    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        self.buffer = b""

    def serve(self) -> None:
        poll = select.epoll()
        poll.register(self.fd, EDGE)
        while True:
            poll.poll()
            with contextlib.suppress(Gone):
                while request := self.read_line():
                    if "argv" in request:
                        Command(self, request).run()

    def read_line(self) -> dict[str, Any] | None:
        """The next request that has come entirely."""
        while b"\n" not in self.buffer:
            try:
                data = os.read(self.fd, 65536)
            except BlockingIOError:
                return None
            if not data:
                self.buffer = b""
                raise Gone
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\n")
        request: dict[str, Any] = json.loads(line)
        return request

    def send(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        while data:
            try:
                data = data[os.write(self.fd, data) :]
            except BlockingIOError:
                poll = select.poll()
                poll.register(self.fd, select.POLLOUT)
                if poll.poll()[0][1] & select.POLLHUP:
                    raise Gone from None


class Command:
    def __init__(self, port: Port, request: dict[str, Any]) -> None:
        self.port = port
        self.id = request["id"]
        self.argv: list[str] = request["argv"]
        self.environment: dict[str, str] = request["env"]

    def run(self) -> None:
        try:
            child = subprocess.Popen(
                self.argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=self.environment,
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            self.send(err=base64.b64encode(f"{error}\n".encode()).decode())
            self.send(rc=127)
            return
        with child:
            try:
                self.relay(child)
                self.send(rc=child.wait())
            except Gone:
                os.killpg(child.pid, signal.SIGTERM)
                raise

    def send(self, **fields: Any) -> None:
        self.port.send({"id": self.id, **fields})

    def relay(self, child: subprocess.Popen[bytes]) -> None:
        assert child.stdin
        assert child.stdout
        assert child.stderr
        names = {child.stdout.fileno(): "out", child.stderr.fileno(): "err"}
        poll = select.epoll()
        poll.register(self.port.fd, EDGE)
        for fd in names:
            poll.register(fd, select.EPOLLIN)
        self.take_input(child)
        while names:
            for fd, _ in poll.poll():
                if fd == self.port.fd:
                    self.take_input(child)
                elif data := os.read(fd, 65536):
                    self.send(**{names[fd]: base64.b64encode(data).decode()})
                else:
                    poll.unregister(fd)
                    del names[fd]

    def take_input(self, child: subprocess.Popen[bytes]) -> None:
        assert child.stdin
        while request := self.port.read_line():
            with contextlib.suppress(BrokenPipeError):
                if (data := request.get("in")) is None:
                    child.stdin.close()
                else:
                    child.stdin.write(base64.b64decode(data))
                    child.stdin.flush()


def main() -> None:
    for name in sorted(Path("/sys/class/virtio-ports").glob("*/name")):
        if name.read_text().startswith("lab."):
            threading.Thread(target=Port(Path("/dev") / name.parent.name).serve).start()


if __name__ == "__main__":
    main()
