"""kvmctl as a person uses it: in a terminal of 80 columns, and in pipes."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import lab
import pytest

from .guests import Guests
from .test_systems import IMAGES, put


class Terminal:
    """A tmux of its own on the host, with a shell in it."""

    def __init__(self, host: lab.Machine) -> None:
        self._host = host
        host.run("tmux", "-L", "kvmctl", "-f", "/dev/null", "new-session", "-d", "-x", "80", "-y", "24", "sh")

    def tmux(self, *words: str) -> str:
        return self._host.run("tmux", "-L", "kvmctl", *words).stdout

    def type(self, *keys: str) -> None:
        """A line, or keys by their names."""
        self.tmux("send-keys", *(keys if len(keys) > 1 or keys[0].startswith("C-") else (keys[0], "Enter")))

    def clear(self) -> None:
        """The screen, at once."""
        self.tmux("send-keys", "-R")

    def wait(self, pattern: str, timeout: float = 20) -> re.Match[str]:
        """Until it is on the screen."""
        deadline = time.monotonic() + timeout
        while not (match := re.search(pattern, shown := self.tmux("capture-pane", "-p", "-J"), re.MULTILINE)):
            assert time.monotonic() < deadline, f"no {pattern!r} in\n{shown}"
        assert "Traceback" not in shown
        return match

    def settings(self) -> str:
        """What stty says of the terminal."""
        pane = self.tmux("display-message", "-p", "#{pane_tty}").strip()
        return self._host.run("stty", "-a", "-F", pane).stdout

    def close(self) -> None:
        self.tmux("kill-server")


@pytest.fixture
def terminal(guests: Guests) -> Iterator[Terminal]:
    terminal = Terminal(guests.host)
    yield terminal
    terminal.close()


def ctl(host: lab.Machine, *words: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = host.run("kvmctl", *words, check=False)
    assert "Traceback" not in done.stderr
    assert done.returncode == status, f"kvmctl {' '.join(words)}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done


def listed(host: lab.Machine, *words: str) -> dict[str, Any]:
    return {guest["Name"]: guest for guest in json.loads(ctl(host, "list", "--json", *words).stdout)}


def test_steering(guests: Guests) -> None:
    host = guests.host
    assert json.loads(ctl(host, "list", "--json").stdout) == []
    for number in (1, 2):
        guests.linux(f"web{number}", last=50 + number)
    assert "no guest is called as db*" in ctl(host, "start", "db*", status=4).stderr
    assert "there is no guest db" in ctl(host, "status", "db", status=4).stderr
    ctl(host, "status", "web1", status=3)
    done = ctl(host, "start", "web*", "db", status=1)
    assert re.search(r"^web1 runs \(.*s\)$", done.stdout, re.MULTILINE)
    assert "kvmctl: there is no guest db" in done.stderr
    assert {name: guest["State"] for name, guest in listed(host).items()} == {"web1": "running", "web2": "running"}
    guests.wait("web1", "^guest: ready web1")
    lines = ctl(host, "list").stdout.splitlines()
    assert lines[0].split() == ["NAME", "STATE", "UP", "MEMORY", "CPU", "ADDRESS", "DESCRIPTION"]
    assert re.match(r"web1  running  .*s +\S+ +\S+ +192\.0\.2\.51 \+1$", lines[1])
    assert "\x1b" not in "".join(lines)
    status = ctl(host, "status", "web1").stdout
    assert "State: running (since " in status
    assert "guest: ready web1" in status
    assert ctl(host, "log", "web1", "-n", "1").stdout == "guest: ready web1\n"
    ctl(host, "pause", "web1")
    assert listed(host, "web1")["web1"]["State"] == "paused"
    ctl(host, "resume", "web1")
    assert "web1" in ctl(host, "top", "--once").stdout
    assert "web2 is off (" in ctl(host, "stop", "--now", "web2").stdout
    assert ctl(host, "stop", "web2").stdout == "web2 was off\n"
    assert "under way" in ctl(host, "restart", "--no-wait", "web1").stdout
    ctl(host, "start", "web1")
    assert "web1 is off (" in ctl(host, "stop", "web1").stdout
    failed = json.loads(ctl(host, "--json", "reset", "web1", status=1).stdout)["failed"]
    assert [each["error"] for each in failed] == ["org.kvmd1.Error.NotRunning"]


def test_a_timeout_leaves_the_guest_to_it(guests: Guests) -> None:
    guests.linux("slow", extra='[serial]\nready = "^never$"\n')
    done = ctl(guests.host, "start", "--timeout", "1", "slow", status=1)
    assert "slow is running after 1 s, and goes on" in done.stderr or "slow is starting after 1 s" in done.stderr
    ctl(guests.host, "stop", "--now", "slow")


@pytest.mark.complaints("is not a size")
def test_files(guests: Guests) -> None:
    host = guests.host
    ctl(host, "new", "mail", "--memory", "64M", "--address", "192.0.2.60", "--size", "1M")
    guests.names.add("mail")
    assert "is there already (kvmctl edit mail)" in ctl(host, "new", "mail", status=1).stderr
    assert "nothing is written:" in ctl(host, "new", "other", "--address", "192.0.2.999", status=1).stderr
    host.write("/root/edit", "#!/bin/sh\nsed -i s/64M/65M/ $1\n")
    host.run("chmod", "+x", "/root/edit")
    host.run("env", "EDITOR=/root/edit", "kvmctl", "edit", "mail")
    assert 'memory = "65M"' in host.run("cat", "/etc/kvmd/mail.toml").stdout
    host.write("/root/edit", "#!/bin/sh\necho nonsense >> $1\n")
    host.run("chmod", "+x", "/root/edit")
    done = host.run("env", "EDITOR=/root/edit", "kvmctl", "edit", "mail", check=False)
    assert done.returncode == 1
    assert "mail.toml" in done.stderr
    assert "nonsense" not in host.run("cat", "/etc/kvmd/mail.toml").stdout
    host.write("/etc/kvmd/bad.toml", 'memory = "lots"\n')
    [problem] = json.loads(ctl(host, "check", "--json", status=1).stdout)
    assert (problem["file"], problem["line"], problem["key"]) == ("/etc/kvmd/bad.toml", 1, "memory")
    host.run("rm", "/etc/kvmd/bad.toml", "/root/edit")
    guests.call("Reload")


NEXT_DOOR = """#!/bin/sh
while [ "$1" != -- ]; do shift; done
[ "$2" != dead ] || { echo 'ssh: connect to host dead: No route to host' >&2; exit 255; }
exec sh -c "$3"
"""


def test_another_host(guests: Guests) -> None:
    """By ssh, of which the lab has one that only goes next door."""
    host = guests.host
    host.write("/root/bin/ssh", '#!/bin/sh\nshift 2; echo "as $0" >&2; exec sh -c "$*"\n')
    host.run("chmod", "+x", "/root/bin/ssh")
    guests.write("far", "")
    done = host.run("env", "PATH=/root/bin:/usr/bin:/bin", "kvmctl", "-H", "root@next", "list", "--json")
    assert [guest["Name"] for guest in json.loads(done.stdout)] == ["far"]
    assert "as /root/bin/ssh" in done.stderr
    host.write("/root/bin/ssh", NEXT_DOOR)
    host.run("chmod", "+x", "/root/bin/ssh")
    host.write("/etc/kvmd/kvmd.conf", '[group]\nhosts = ["a", "dead", "b"]\n')
    done = host.run("env", "PATH=/root/bin:/usr/bin:/bin", "kvmctl", "list", "--all-hosts", check=False)
    assert [line.split()[:3] for line in done.stdout.splitlines()] == [
        ["HOST", "NAME", "STATE"],
        ["a", "far", "stopped"],
        ["b", "far", "stopped"],
    ]
    assert (done.returncode, done.stderr) == (1, "kvmctl: dead: ssh: connect to host dead: No route to host\n")
    host.run("rm", "-r", "/root/bin", "/etc/kvmd/kvmd.conf")
    assert "names no hosts (write: [group]" in ctl(host, "list", "--all-hosts", status=1).stderr
    guests.call("Reload")


def test_a_console_misses_nothing(guests: Guests) -> None:
    """Also while kvmd is started anew, and killed."""
    host = guests.host
    guests.linux("web")
    guests.start("web")
    host.run("mkfifo", "/root/in")
    reader = "exec kvmctl console web 0<>/root/in >/root/out"
    host.run("systemd-run", "--quiet", "--collect", "--unit=reader", "sh", "-c", reader)
    host.run("sh", "-c", "echo flood 4000 >/root/in")
    guests.wait("web", "^flood 00000200")
    host.run("systemctl", "restart", "kvmd")
    guests.wait("web", "^flood 00001500")
    host.run("systemctl", "kill", "--signal=KILL", "kvmd")
    guests.wait("web", "^flood 00004000", timeout=60)
    host.run("timeout", "20", "sh", "-c", "until grep -q 00004000 /root/out; do :; done")
    numbers = re.findall(r"^flood (\d+)", host.run("cat", "/root/out").stdout, re.MULTILINE)
    assert [int(number) for number in numbers] == list(range(1, 4001))
    host.run("systemctl", "stop", "reader")
    host.run("rm", "/root/in", "/root/out")


@pytest.mark.complaints("QEMU was killed or crashed")
def test_a_terminal_is_as_it_was(guests: Guests, terminal: Terminal) -> None:
    """Whoever of the parties is killed."""
    host = guests.host
    guests.linux("web")
    guests.start("web")
    before = terminal.settings()
    terminal.type("kvmctl console web")
    terminal.wait(r"^Connected to web; \^\] three times within a second leaves\.")
    terminal.wait("^guest: ready web")
    terminal.type("echo hello")
    terminal.wait("^hello")
    assert terminal.settings() != before
    terminal.type("C-]", "C-]", "C-]")
    terminal.wait("^Left web: it goes on")
    assert terminal.settings() == before
    for signal in ("TERM", "HUP", "KILL"):
        terminal.clear()
        terminal.type("kvmctl console web")
        terminal.wait("^guest: ready web")
        host.run("pkill", f"-{signal}", "-o", "-f", "kvmctl console web$")
        terminal.type("echo back")
        terminal.wait("^back")
        assert terminal.settings() == before, signal
    terminal.clear()
    terminal.type("kvmctl console web")
    terminal.wait("^guest: ready web")
    since = host.cursor()
    host.run("systemctl", "kill", "--signal=KILL", "kvmd")
    host.wait_journal("_SYSTEMD_UNIT=kvmd.service", message="was running already", since=since)
    terminal.type("echo still here")
    terminal.wait("^still here")
    host.run("sh", "-c", "kill -KILL $(cat /run/kvmd/web/pid)")
    terminal.wait("^Left web: it is off")
    assert terminal.settings() == before


def test_at_80_columns(guests: Guests, terminal: Terminal) -> None:
    guests.write("web", 'description = "%s"\n' % ("a long description " * 8))
    terminal.type("kvmctl list; echo $?")
    terminal.wait("^0$")
    [line] = [line for line in terminal.tmux("capture-pane", "-p").splitlines() if line.startswith("web ")]
    assert line.endswith("…")
    assert len(line) <= 80
    terminal.clear()
    terminal.type("kvmctl list --watch")
    terminal.wait("^web +stopped")
    guests.write("mail", "")
    terminal.wait("^mail +stopped")
    terminal.type("C-c", "")
    terminal.clear()
    terminal.type("NO_COLOR=1 kvmctl start web; echo done $?")
    terminal.wait("^web runs")
    terminal.wait("^done 0")


VIEWER = """#!/usr/bin/python3
import socket, sys
with socket.create_connection(("127.0.0.1", int(sys.argv[1].rpartition(":")[2]))) as viewer:
    print(viewer.recv(12).decode(), end="", flush=True)
"""


def test_media_and_screen(guests: Guests) -> None:
    host = guests.host
    guests.write("web", "[[cdrom]]\n")
    host.write("/root/vncviewer", VIEWER)
    host.run("chmod", "+x", "/root/vncviewer")
    host.run("truncate", "-s", "1M", f"{IMAGES}/a.iso")
    assert "guest web is not running" in ctl(host, "screenshot", "web", status=1).stderr
    ctl(host, "start", "web")
    assert ctl(host, "media", "web").stdout == "DRIVE   IMAGE\ncdrom0  -\n"
    ctl(host, "media", "web", "cdrom0", "a.iso")
    assert json.loads(ctl(host, "media", "web", "--json").stdout) == {"cdrom0": f"{IMAGES}/a.iso"}
    ctl(host, "media", "web", "cdrom0", "--eject")
    assert "has no drive cdrom7 (it has cdrom0)" in ctl(host, "media", "web", "cdrom7", status=1).stderr
    ctl(host, "media", "web", "--eject", status=2)
    assert host.run("sh", "-c", "cd /root && kvmctl screenshot web shot.png").stdout == "shot.png\n"
    assert host.run("sh", "-c", "kvmctl screenshot web - | cmp -n 8 - /root/shot.png", check=False).returncode == 0
    assert host.run("head", "-c", "4", "/root/shot.png").stdout[1:] == "PNG"
    assert ctl(host, "view", "web", "--viewer", "/root/vncviewer").stdout == "RFB 003.008\n"
    assert "there is no viewer: nothing" in ctl(host, "view", "web", "--viewer", "nothing", status=1).stderr
    ctl(host, "stop", "--now", "web")
    host.run("rm", "/root/vncviewer", "/root/shot.png", f"{IMAGES}/a.iso")


def test_somebody_else(guests: Guests) -> None:
    """Everybody sees what there is; the rest is as polkit says."""
    host = guests.host
    guests.linux("web")
    guests.start("web")

    def nobody(*words: str) -> subprocess.CompletedProcess[str]:
        return host.run("setpriv", "--reuid=nobody", "--clear-groups", "kvmctl", *words, check=False)

    assert "web   running" in nobody("list").stdout
    assert "State: running" in nobody("status", "web").stdout
    for words in (("stop", "web"), ("console", "web"), ("log", "web"), ("screenshot", "web", "-")):
        done = nobody(*words)
        assert done.returncode == 1, words
        assert "(as root, or as polkit lets you: man kvmd)" in done.stderr
        assert "Traceback" not in done.stderr
    done = nobody("new", "mail")
    assert (done.returncode, done.stdout) == (1, "")
    assert "cannot write /etc/kvmd/mail.toml: Permission denied (as root)" in done.stderr


def test_whoever_waits_may_leave(guests: Guests, terminal: Terminal) -> None:
    guests.linux("slow", extra='[serial]\nready = "^never$"\n')
    terminal.type("kvmctl start slow; echo left $?")
    terminal.wait(r"^slow: (is starting|waits until it is ready) \(.*s\)$")
    terminal.type("C-c", "")
    terminal.wait(r"^kvmctl: slow: it goes on without this terminal \(kvmctl status slow\)")
    terminal.wait("^left 130$")
    assert listed(guests.host)["slow"]["State"] in ("starting", "running")
    ctl(guests.host, "stop", "--now", "slow")


@pytest.mark.complaints("is given no DNS server")
def test_from_an_iso_to_a_system_that_answers(guests: Guests) -> None:
    """The README's five commands."""
    host = guests.host
    host.write("/etc/kvmd/kvmd.conf", 'machine = "pc"\n')  # the kernel on this CD knows no SATA
    put(host, lab.media.installer(), "installer.iso")
    readme = (lab.roots.REPOSITORY / "README.md").read_text()
    section = readme.partition("## From a CD image to a system that answers\n")[2].partition("\n## ")[0]
    install, listing, console, ping, stop = re.findall(r"^# (.*)$", section, re.MULTILINE)
    guests.names.add("snape")
    done = host.run("sh", "-c", f"{install} --no-console")
    assert "/etc/kvmd/snape.toml is written (profile linux)" in done.stderr
    guests.wait("snape", "^guest: install to /dev/vda", timeout=120)
    since = host.cursor()
    host.run("sh", "-c", f"echo yes | {console}")
    guests.wait("snape", "^guest: ready installed", since, timeout=150)
    assert "snape  running" in host.run("sh", "-c", listing).stdout
    host.run("sh", "-c", ping, netns="alice")
    assert "snape is off" in host.run("sh", "-c", stop).stdout
    guests.clear()
    host.run("rm", f"{IMAGES}/installer.iso", f"{IMAGES}/snape.qcow2", "/etc/kvmd/kvmd.conf")
    guests.call("Reload")
