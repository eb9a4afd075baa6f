"""A disposable systemd host in half a second: a container with its own journal, bus and network."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from . import guests, roots
from .machine import Machine
from .runs import Run
from .store import LabError

BOOT_TIMEOUT = 60.0
STOP_TIMEOUT = 120.0
IMAGES = "var/lib/kvmd/images"


class Host(Machine):
    """A container, booted from the root of a release, with kvmd installed when a package is given.

    ``others``: firewalld, NetworkManager and iptables are installed too, and wait to be started. ``libvirt``: or it.
    """

    def __init__(
        self,
        release: str = "bookworm",
        deb: Path | None = None,
        *,
        name: str = "host",
        others: bool = False,
        libvirt: bool = False,
    ) -> None:
        super().__init__(name)
        self.release = release
        self.deb = deb
        self.extra = "others" if others else "libvirt" if libvirt else ""
        self._process: subprocess.Popen[bytes] | None = None
        self._leader = 0

    def start(self) -> None:
        lower = [roots.root(self.release, self.extra)]
        if self.deb:
            lower.insert(0, roots.layer(self.release, self.deb, self.extra))
        self._run = Run.new(self.name)
        tree = self.directory / "root"
        roots.mount_overlay(self.directory / "upper", lower, tree)
        (tree / "etc/machine-id").write_text(f"{uuid.uuid4().hex}\n")
        (tree / "etc/hostname").write_text(f"{self.name}\n")
        install_guest(self.release, tree)
        self._boot(tree)

    def _boot(self, tree: Path) -> None:
        """Start nspawn, and wait until systemd in it says that all it wanted to start has started."""
        notify = self.directory / "notify"
        environment = {"NOTIFY_SOCKET": str(notify), "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"}
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
            listener.bind(str(notify))
            # fmt: off
            self._process = self._running.popen(
                self._running.console,
                "systemd-nspawn", "--quiet", "--boot", "-D", tree,
                f"--machine={self.directory.name}",
                "--private-network", "--bind=/dev/net/tun", "--capability=all",
                "--register=no", "--keep-unit", "--notify-ready=yes",
                "--resolv-conf=off", "--timezone=off", "--link-journal=no", "--console=pipe",
                env={**os.environ, **environment},
            )
            # fmt: on
            self._wait_for_boot(listener, self._process)
        self.run("systemctl", "is-system-running", "--wait", check=False)

    def _wait_for_boot(self, listener: socket.socket, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + BOOT_TIMEOUT
        listener.settimeout(1)  # how soon a dead nspawn is noticed
        while time.monotonic() < deadline and process.poll() is None:
            try:
                words = listener.recv(4096).decode().split()
            except TimeoutError:
                continue
            for word in words:
                if word.startswith("X_NSPAWN_LEADER_PID="):
                    self._leader = int(word.partition("=")[2])
            if "READY=1" in words:
                return
        raise LabError(f"{self.name} did not boot ({self.directory}); its console:\n{self.console()[-3000:]}")

    def enter(self, argv: Sequence[str]) -> list[str]:
        """nsenter, when killed, leaves its child behind: the parent-death signal takes it along."""
        pid = str(self._leader)
        # fmt: off
        return [
            "nsenter", "-t", pid, "-m", "-p", "-n", "-u", "-i", "-C", f"--root=/proc/{pid}/root",
            "setpriv", "--pdeathsig", "TERM", "--", *argv,
        ]
        # fmt: on

    def poweroff(self) -> str:
        """`systemctl poweroff`, to its end; returns what the console said."""
        assert self._process
        self.run("systemctl", "poweroff")
        self._process.wait(STOP_TIMEOUT)
        return self.console()

    def keep(self) -> None:
        """Let go of the host: it runs on until somebody attaches to it and stops it."""
        self._running.keep(self._leader)
        self._run = self._process = None

    @classmethod
    def attach(cls, run: Run) -> Self:
        """The host of a run that was kept."""
        host = cls(name=run.directory.name)
        host._run = run
        host._leader = run.kept
        return host

    def stop(self) -> None:
        """End the host at once and remove every trace of it."""
        super().stop()
        if self._process:
            self._process.wait()
            self._process = None


def install_guest(release: str, tree: Path) -> None:
    """The guests' kernel, packed and unpacked, and initrd, where guest files look for images."""
    (tree / IMAGES).mkdir(parents=True, exist_ok=True)
    shutil.copyfile(guests.kernel(release), tree / IMAGES / "vmlinuz")
    shutil.copyfile(guests.unpacked_kernel(release), tree / IMAGES / "vmlinux")
    shutil.copyfile(guests.initrd(release), tree / IMAGES / "initrd.img")
