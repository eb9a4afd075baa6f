"""Guests on a host of the lab, as a person would handle them."""

from __future__ import annotations

import json
import os
import shlex
import time
from typing import Any

import lab
import pytest

# For fixtures; hosts of one release come one after the other, at one worker.
RELEASES = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in lab.roots.RELEASES.values()]
SERVICE = ("org.kvmd1", "/org/kvmd1", "org.kvmd1.Manager")


def mostly(release: str) -> list[Any]:
    """For what is slow, and the same on both: this one, and with $KVMD_ALL the other, too."""
    return [each for each in RELEASES if os.environ.get("KVMD_ALL") or each.values == (release,)]


class Guests:
    """Writes files, starts and stops with systemctl and busctl, types at consoles."""

    def __init__(self, host: lab.Machine) -> None:
        self.host = host
        self.names: set[str] = set()
        self._paths: dict[str, str] = {}

    def write(self, name: str, text: str) -> None:
        self.names.add(name)
        self.host.write(f"/etc/kvmd/{name}.toml", text)
        self.call("Reload")

    def linux(
        self,
        name: str,
        *,
        last: int | None = None,
        extra: str = "",
        cmdline: str = "",
        top: str = "",
        initrd: str = "initrd.img",
    ) -> None:
        """A guest with the lab's Linux; ``last`` is the last number of its addresses on the LAN."""
        words = [lab.guests.CMDLINE, f"kvmd.name={name}", cmdline]
        network = ""
        if last is not None:
            words.append(f"kvmd.addr=192.0.2.{last}/24 kvmd.gw=192.0.2.1")
            words.append(f"kvmd.addr6=2001:db8:1::{last}/64 kvmd.gw6=2001:db8:1::1")
            network = f'[[network]]\naddress = ["192.0.2.{last}", "2001:db8:1::{last}"]\n'
        boot = f'[boot]\nkernel = "vmlinux"\ninitrd = "{initrd}"\ncmdline = "{" ".join(words)}"\n'
        self.write(name, f'memory = "128M"\nstop_timeout = "20s"\n{top}\n{boot}{network}{extra}')

    def start(self, *names: str, ready: bool = True) -> None:
        since = self.host.cursor()
        self.host.run("systemctl", "start", *(f"kvmd@{name}" for name in names))
        for name in names if ready else ():
            self.wait(name, f"^guest: ready {name}", since)

    def wait(self, name: str, message: str, since: str | None = None, timeout: float = 40) -> lab.Entry:
        """The guest's serial line that matches."""
        match = (f"KVMD_GUEST={name}", "KVMD_STREAM=serial")
        return self.host.wait_journal(*match, message=message, since=since, timeout=timeout)

    def type(self, name: str, line: str, answer: str) -> lab.Entry:
        """Type a line at the guest's console, and wait for the line that answers it."""
        since = self.host.cursor()
        self.host.run("sh", "-c", f"printf '%s\\n' {shlex.quote(line)} > /run/kvmd/{name}/serial.in")
        return self.wait(name, answer, since)

    def serial(self, name: str) -> list[lab.Entry]:
        return self.host.journal(f"KVMD_GUEST={name}", "KVMD_STREAM=serial")

    def call(self, member: str, signature: str = "", *arguments: str, check: bool = True) -> Any:
        """A method of org.kvmd1.Manager; its values, or with check=False the finished busctl."""
        return self._busctl("call", *SERVICE, member, signature, *arguments, check=check)

    def guest(self, name: str, member: str, signature: str = "", *arguments: str, check: bool = True) -> Any:
        """A method of org.kvmd1.Guest."""
        words = (member, signature, *arguments)
        return self._busctl("call", "org.kvmd1", self.path(name), "org.kvmd1.Guest", *words, check=check)

    def get(self, name: str, prop: str) -> Any:
        return self._busctl("get-property", "org.kvmd1", self.path(name), "org.kvmd1.Guest", prop)

    def until(self, name: str, prop: str, value: object) -> None:
        """Asks until the property is so."""
        deadline = time.monotonic() + 20
        while (found := self.get(name, prop)) != value:
            assert time.monotonic() < deadline, f"{prop} of {name} stays {found}"

    def path(self, name: str) -> str:
        """Of the guest's object: asked for once, since it says no more than the name."""
        if name not in self._paths:
            self._paths[name] = self.call("GetGuest", "s", name)[0]
        return self._paths[name]

    def _busctl(self, verb: str, *words: str, check: bool = True) -> Any:
        command = ("busctl", "--json=short", "--timeout=60", verb, *(word for word in words if word != ""))
        done = self.host.run(*command, check=check)
        if not check:
            return done
        return json.loads(done.stdout)["data"] if done.stdout.strip() else None

    def active(self, name: str) -> str:
        return self.host.show(f"kvmd@{name}.service")["ActiveState"]

    def status(self, name: str) -> str:
        """With the last lines of the journal: also with those that journald has not taken yet."""
        self.host.run("journalctl", "--sync")
        return self.host.run("systemctl", "status", "--no-pager", "-l", f"kvmd@{name}", check=False).stdout

    def clear(self) -> None:
        """All guests off, all files gone."""
        units = [f"kvmd@{name}.service" for name in self.names]
        if units:
            for name in self.names:
                self.guest_off(name)
            self.host.run("systemctl", "stop", *units)
            self.host.run("systemctl", "reset-failed", *units, check=False)
            self.host.run("rm", "-f", *(f"/etc/kvmd/{name}.toml" for name in self.names))
            self.call("Reload")

    def guest_off(self, name: str) -> None:
        """At once: what a test leaves running need not be asked politely."""
        if self.call("GetGuest", "s", name, check=False).returncode == 0 and self.get(name, "PID"):
            self.guest(name, "Terminate")
