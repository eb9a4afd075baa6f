"""What can be done with a host of the lab, whatever it is made of: run, look, wait for the journal."""

from __future__ import annotations

import json
import re
import selectors
import shlex
import subprocess
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Self

from .lan import Lan
from .runs import Run, save
from .store import LabError, say

Entry = dict[str, str]

ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
    "HOME": "/root",
}

# The network state of a host, one fact per line, without what changes by itself. $1 marks each section.
LOOK = 10  # seconds

STATE = r"""
section() { name=$1; shift; "$@" 2>/dev/null | sed "s/^/$name: /"; }
section addr ip -d addr
section route4 ip -d -4 route show table all
section route6 ip -d -6 route show table all
section rule4 ip -4 rule
section rule6 ip -6 rule
section proxy4 ip -d -4 neigh show proxy
section proxy6 ip -d -6 neigh show proxy
section neigh4 ip -d -4 neigh show nud permanent
section neigh6 ip -d -6 neigh show nud permanent
section maddr ip maddr
section nft nft list ruleset
section sysctl sysctl -a -r '^net[.](ipv4[.]ip_forward$|ipv[46][.](conf|neigh)[.])'
"""
VOLATILE = re.compile(
    r"valid_lft \S+ preferred_lft \S+| expires -?\d+sec| counter packets \d+ bytes \d+| # handle \d+| \w+_timer +[\d.]+"
    r"| link_failure_count \d+"
)


class Failed(LabError):
    """A command in a host ended badly."""

    def __init__(self, argv: Sequence[str], why: str, stdout: str, stderr: str) -> None:
        words = [word if len(word) < 500 else f"{word[:500]}…" for word in argv]
        super().__init__(f"`{shlex.join(words)}` {why}\n--- stdout\n{stdout}--- stderr\n{stderr}")


class Machine:
    """A systemd host of its own. Subclasses say how it starts, ends, and how a command gets into it."""

    slowness = 1  # all timeouts are multiplied by it

    def __init__(self, name: str) -> None:
        self.name = name
        self._run: Run | None = None
        self._children: list[subprocess.Popen[Any]] = []
        self._lan: Lan | None = None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind:
            self.save_logs()
        self.stop()

    def start(self) -> None:
        raise NotImplementedError

    def stop(self) -> None:
        """End the host at once and remove every trace of it."""
        for child in self._children:
            child.kill()
            child.communicate()
        self._children.clear()
        if self._run:
            self._run.destroy()
            self._run = None

    @property
    def runs(self) -> bool:
        return self._run is not None

    @property
    def directory(self) -> Path:
        """Of this run: console log and all else there is to look at."""
        return self._running.directory

    @property
    def _running(self) -> Run:
        if not self._run:
            raise LabError(f"{self.name} is not running")
        return self._run

    def console(self) -> str:
        """What the host said on its console."""
        return self._running.console.read_text(errors="replace")

    def save_logs(self) -> None:
        """Keep the journal; the console log stays anyway. For a test that fails."""
        journal = self.directory / "journal"
        try:
            journal.write_text(self.run("journalctl", "--no-pager", "-o", "short-precise").stdout)
        except (LabError, OSError) as error:
            journal.write_text(str(error))
        say(f"logs of {self.name}: {save(journal, f'{self.directory.name}.journal.log')}, and …console.log beside it")

    def enter(self, argv: Sequence[str]) -> list[str]:
        """The command of this machine that runs argv in the host, and takes it along when it ends."""
        raise NotImplementedError

    # Commands

    def run(
        self,
        *argv: str | Path,
        check: bool = True,
        input: str | bytes | None = None,
        timeout: float = 60,
        netns: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the host to its end."""
        words = [str(word) for word in argv]
        data = input.encode() if isinstance(input, str) else input
        command = self.enter(_in_netns(netns, words))
        timeout *= self.slowness
        try:
            done = subprocess.run(command, input=data or b"", capture_output=True, timeout=timeout, env=ENVIRONMENT)
        except subprocess.TimeoutExpired as error:
            output, errors = _text(error.stdout), _text(error.stderr)
            raise Failed(words, f"in {self.name} did not end within {timeout} s", output, errors) from None
        result = subprocess.CompletedProcess(words, done.returncode, _text(done.stdout), _text(done.stderr))
        if check and result.returncode:
            raise Failed(words, f"in {self.name} ended with {result.returncode}", result.stdout, result.stderr)
        return result

    def popen(self, *argv: str | Path, netns: str | None = None, **options: Any) -> subprocess.Popen[str]:
        """Start a command in the host: stdout and stderr on one pipe unless options say otherwise. It ends with it."""
        settings: dict[str, Any] = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            "text": True,
            "errors": "replace",
            "env": ENVIRONMENT,
        } | options
        words = [str(word) for word in argv]
        child: subprocess.Popen[str] = subprocess.Popen(self.enter(_in_netns(netns, words)), **settings)
        self._children.append(child)
        return child

    # Files

    def write(self, path: str | Path, content: str | bytes, mode: int = 0o644) -> None:
        script = 'mkdir -p "$(dirname "$1")" && cat > "$1" && chmod "$2" "$1"'
        self.run("sh", "-c", script, "write", path, f"{mode:o}", input=content)

    def read(self, path: str | Path) -> str:
        return self.run("cat", path).stdout

    def copy_in(self, local: Path, path: str | Path) -> None:
        self.write(path, local.read_bytes(), local.stat().st_mode & 0o777)

    # systemd and its journal

    def journal(self, *matches: str, since: str | None = None) -> list[Entry]:
        """The journal's entries, oldest first; words are those of journalctl: FIELD=value, -u kvmd, …"""
        after = [f"--cursor={since}"] if since else []  # see wait_journal
        lines = self.run(
            "journalctl", "--quiet", "--all", "--no-pager", "-o", "json", *after, *matches
        ).stdout.splitlines()
        return [entry for entry in map(_entry, lines) if entry["__CURSOR"] != since]

    def cursor(self) -> str:
        """Where the journal ends now, for wait_journal(since=…)."""
        return self.journal("-n", "1")[0]["__CURSOR"]

    def wait_journal(
        self,
        *matches: str,
        message: str | None = None,
        where: Callable[[Entry], object] | None = None,
        since: str | None = None,
        timeout: float = 30,
    ) -> Entry:
        """The first entry that matches, now or later: journalctl words, a regular expression, a predicate."""
        timeout *= self.slowness
        deadline = time.monotonic() + timeout
        seen: list[str] = []
        while time.monotonic() < deadline:
            # journalctl may miss the newest entry until there is another one, and in a VM that may be long.
            seen = []
            look = min(deadline, time.monotonic() + LOOK * self.slowness)
            with closing(self._follow(matches, since, look)) as entries:
                for entry in entries:
                    seen.append(entry.get("MESSAGE", ""))
                    if (message is None or re.search(message, seen[-1])) and (where is None or where(entry)):
                        return entry
            if time.monotonic() < look:
                break  # the machine has gone
        wanted = " ".join([*matches, *([f"message {message!r}"] if message else [])])
        last = "\n".join(seen[-20:])
        raise LabError(f"{self.name}: no journal entry with {wanted} within {timeout} s; the last ones seen:\n{last}")

    def _follow(self, matches: Sequence[str], since: str | None, deadline: float) -> Generator[Entry, None, None]:
        """Entries as they come."""
        # Not --after-cursor: with matches that the cursor's entry does not meet, it skips one entry too many.
        after = [f"--cursor={since}"] if since else []
        follow = self.popen(
            *("journalctl", "--quiet", "--all", "--no-tail", "-f", "-o", "json", *after, *matches),
            stderr=subprocess.DEVNULL,
            bufsize=0,
            text=False,
            errors=None,
        )
        try:
            for line in read_lines(follow, deadline):
                entry = _entry(line)
                if entry["__CURSOR"] != since:
                    yield entry
        finally:
            follow.kill()
            follow.communicate()
            self._children.remove(follow)

    def show(self, unit: str) -> dict[str, str]:
        """systemctl show."""
        lines = self.run("systemctl", "show", unit).stdout.splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)

    def units(self) -> dict[str, str]:
        """Every loaded unit and its state: active/running."""
        lines = self.run("systemctl", "list-units", "--all", "--plain", "--no-legend", "--no-pager").stdout.splitlines()
        fields = [line.split(None, 4) for line in lines]
        return {unit: f"{active}/{sub}" for unit, _load, active, sub, *_ in fields}

    # Network

    @property
    def lan(self) -> Lan:
        """The LAN the host is on; made when first asked for."""
        return self._lan or self.make_lan()

    def make_lan(self, **options: bool) -> Lan:
        """A LAN with options: see Lan."""
        if self._lan:
            raise LabError(f"{self.name} has its LAN already")
        self._lan = Lan(self, **options)
        return self._lan

    def state(self) -> list[str]:
        """The host's network, one fact per line: the same before and after means nothing was left behind."""
        lines = self.run("sh", "-c", STATE).stdout.splitlines()
        cleaned = [VOLATILE.sub("", line).rstrip() for line in lines]
        return [line for line in cleaned if not line.endswith(":")]


def read_lines(child: subprocess.Popen[Any], deadline: float) -> Iterator[str]:
    """Lines of a child's unbuffered stdout as they come, until it ends or the deadline passes."""
    assert child.stdout
    buffer = b""
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while selector.select(max(0.0, deadline - time.monotonic())):
            if not (data := child.stdout.read(65536)):
                return
            *lines, buffer = (buffer + data).split(b"\n")
            yield from (_text(line) for line in lines)


def _in_netns(netns: str | None, argv: list[str]) -> list[str]:
    return ["ip", "netns", "exec", netns, *argv] if netns else argv


def _text(data: bytes | None) -> str:
    return (data or b"").decode(errors="replace")


def _entry(line: str) -> Entry:
    """An entry of `journalctl -o json`: bytes come as lists of numbers, a field set twice as a list of values."""

    def value(field: Any) -> str:
        if isinstance(field, list) and all(isinstance(item, int) for item in field):
            return bytes(field).decode(errors="replace")
        if isinstance(field, list):
            return "\n".join(value(item) for item in field)
        return "" if field is None else str(field)

    return {name: value(field) for name, field in json.loads(line).items()}
