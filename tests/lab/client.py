"""client.py DIRECTORY COMMAND…: run a command in the VM whose agent listens in that directory, as if it were here."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import socket
import sys
import threading
import uuid
from pathlib import Path
from typing import IO

LOST = 255


def free_port(directory: Path) -> tuple[Path, IO[str]]:
    """A port nobody uses, and its lock; waits for one if all are taken."""
    paths = sorted(directory.glob("agent.*.sock"))
    if not paths:  # QEMU removes its sockets when it ends
        sys.exit(f"the virtual machine of {directory.name} has ended: see its console")
    for path in paths:
        lock = path.with_suffix(".lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
        else:
            return path, lock
    lock = paths[0].with_suffix(".lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    return paths[0], lock


def main() -> int:
    path, lock = free_port(Path(sys.argv[1]))
    identity = uuid.uuid4().hex
    with lock, socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        request = {"id": identity, "argv": sys.argv[2:], "env": dict(os.environ)}
        connection.sendall(json.dumps(request).encode() + b"\n")
        threading.Thread(target=send_input, args=(connection,), daemon=True).start()
        with connection.makefile("rb") as lines:
            for line in lines:
                try:
                    message = json.loads(line)
                except ValueError:
                    continue  # the rest of a line to a client before us
                if message["id"] != identity:
                    continue
                if "rc" in message:
                    rc = int(message["rc"])
                    return rc if rc >= 0 else 128 - rc
                for name, stream in (("out", 1), ("err", 2)):
                    if name in message:
                        write_all(stream, base64.b64decode(message[name]))
    print("the VM is gone", file=sys.stderr)
    return LOST


def send_input(connection: socket.socket) -> None:
    while data := os.read(0, 65536):
        connection.sendall(json.dumps({"in": base64.b64encode(data).decode()}).encode() + b"\n")
    connection.sendall(b'{"in": null}\n')


def write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # the input thread may wait for input that never comes
