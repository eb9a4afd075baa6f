"""Inside a host: breaks things at random instants, and looks each time whether everything is as it must be.

faults.py break SEED COUNT DEB: at least COUNT injections; the other verbs are at the end. The last line is JSON.

An episode is something asked of a guest, or nothing, and some faults soon after. Then everything must come to rest in
a state that systemd, the daemon and the processes there are agree on.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dbus_next.aio.message_bus import MessageBus
from dbus_next.constants import BusType, MessageType
from dbus_next.message import Message

CONFIGURATION = Path("/etc/kvmd")
RUNTIME = Path("/run/kvmd")
ROM = "/var/lib/kvmd/rom"
PATIENCE = 15.0  # seconds to come to rest
GIVE_UP = 5  # episodes that went wrong

TOP = 'memory = "32M"\naccelerator = "tcg"\nstop_timeout = "20s"\n'
NETWORK = '[[network]]\naddress = ["192.0.2.{0}", "2001:db8:1::{0}"]\n'
QEMU = f'[qemu]\nargs = ["-bios", "{ROM}"]\n'
READY = '[serial]\nready = "^00000003"\n'
DISK = '[[disk]]\npath = "{}.qcow2"\nsize = "1M"\n'

FILES = {
    # These run from the first fault to the last.
    "steady1": TOP + NETWORK.format(61) + QEMU,
    "steady2": TOP + NETWORK.format(62) + QEMU,
    "steady3": TOP + DISK.format("steady3") + QEMU,
    "steady4": TOP + READY + QEMU,
    # These are started and stopped.
    "victim1": TOP + NETWORK.format(71) + DISK.format("victim1") + READY + QEMU,
    "victim2": TOP + DISK.format("victim2") + QEMU,
    "victim3": TOP + NETWORK.format(73) + QEMU,
}
STEADY = [name for name in FILES if name.startswith("steady")]
VICTIMS = [name for name in FILES if name.startswith("victim")]
NETWORKED = {name: text.split('"192.0.2.')[1].split('"')[0] for name, text in FILES.items() if "192.0.2." in text}

BUSCTL = ("busctl", "--json=short", "--timeout=60")
MANAGER = ("org.kvmd1", "/org/kvmd1", "org.kvmd1.Manager")


def run(*argv: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, capture_output=True, text=True, timeout=timeout)


def launch(*argv: str) -> subprocess.Popen[str]:
    return subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def unlimited(*words: str) -> subprocess.CompletedProcess[str]:
    """systemctl; nobody breaks things by hand as often as to meet the limit of five starts in ten seconds."""
    run("systemctl", "reset-failed", words[-1])
    return run("systemctl", *words)


def call(member: str, *arguments: str) -> tuple[str, ...]:
    return (*BUSCTL, "call", *MANAGER, member, *arguments)


def guest_call(name: str, member: str) -> tuple[str, ...]:
    return (*BUSCTL, "call", "org.kvmd1", f"/org/kvmd1/guest/{name}", "org.kvmd1.Guest", member)


# --- what there is ----------------------------------------------------------------------------------------------------


def show(*units: str) -> dict[str, dict[str, str]]:
    """Some properties of each unit; asked of PID 1 itself, without the bus."""
    wanted = "Id,ActiveState,MainPID,Result,NFileDescriptorStore,ActiveEnterTimestampMonotonic"
    wanted += ",ExecMainStartTimestampMonotonic,InvocationID"
    text = run("systemctl", "show", "-p", wanted, *units).stdout
    blocks = [dict(line.split("=", 1) for line in block.splitlines()) for block in text.strip().split("\n\n")]
    return {block["Id"]: block for block in blocks if "Id" in block}


def managed() -> dict[str, dict[str, object]]:
    """What the daemon says: the properties of each guest. Empty while it says nothing."""
    words = ("--auto-start=no", "call", "org.kvmd1", "/org/kvmd1", "org.freedesktop.DBus.ObjectManager")
    done = run("busctl", "--json=short", "--timeout=5", *words, "GetManagedObjects")
    if done.returncode:
        return {}
    guests = [interfaces["org.kvmd1.Guest"] for interfaces in json.loads(done.stdout)["data"][0].values()]
    return {guest["Name"]["data"]: {key: value["data"] for key, value in guest.items()} for guest in guests}


def processes() -> dict[str, list[int]]:
    """Every QEMU there is, by guest."""
    found: defaultdict[str, list[int]] = defaultdict(list)
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if words[0].startswith(b"qemu-system"):
                name = next(word for word in words if word.startswith(b"guest="))
                found[name.decode().removeprefix("guest=").split(",")[0]].append(int(path.parent.name))
    return found


def addresses(*command: str) -> list[str]:
    """Destinations of the host's own routes or proxy entries."""
    return [entry["dst"].split("/")[0] for entry in json.loads(run(*command).stdout or "[]")]


def network_faults(on: set[str]) -> Iterator[str]:
    """What is missing or left over of the network."""
    tables = {
        "route": (["route", "show", "proto", "171"], ["route", "show", "table", "all", "proto", "171"]),
        "proxy": (["neigh", "show", "proxy", "dev", "eth0"],) * 2,
    }
    for what, (four, six) in tables.items():
        there = Counter(addresses("ip", "-j", "-4", *four)) + Counter(addresses("ip", "-j", "-6", *six))
        for name, last in NETWORKED.items():
            for address in (f"192.0.2.{last}", f"2001:db8:1::{last}"):
                if bool(there[address]) != (name in on):
                    yield f"leftover: {what} of {address}" if there[address] else f"unit: no {what} for {address}"
    if bool(run("nft", "list", "table", "inet", "kvmd").stdout) != bool(on & NETWORKED.keys()):
        yield "unit: the guests' filter is missing, or is left over"


@dataclass
class Tally:
    seed: int = 0
    injections: dict[str, int] = field(default_factory=dict)
    episodes: int = 0
    lost: list[str] = field(default_factory=list)  # guests
    lines: int = 0
    lines_lost: list[str] = field(default_factory=list)
    lines_doubled: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    units: list[str] = field(default_factory=list)  # in a wrong state
    adoptions: list[float] = field(default_factory=list)  # seconds from the daemon's exec to READY=1
    seconds: float = 0.0

    def add(self, where: str, faults: list[str]) -> None:
        for fault in faults:
            kind, _, text = fault.partition(": ")
            {"lost": self.lost, "leftover": self.leftovers}.get(kind, self.units).append(f"{where}: {text}")


# --- the runner -------------------------------------------------------------------------------------------------------


class Runner:
    def __init__(self, seed: int, count: int, deb: str) -> None:
        self.random = random.Random(seed)
        self.count = count
        self.deb = deb
        self.tally = Tally(seed)
        self.pids: dict[str, int] = {}
        self.asked: list[subprocess.Popen[str]] = []
        self.invocations: set[str] = set()
        self.guests: dict[str, dict[str, object]] = {}
        self.wrong = 0

    # state

    def look(self, network: bool) -> list[str]:
        """All that is not as it must be, yet."""
        if unfinished := [process.args for process in self.asked if process.poll() is None]:
            return [f"unit: does not return: {unfinished}"]
        if jobs := run("systemctl", "list-jobs", "--no-legend", "--plain").stdout.strip():
            return [f"unit: jobs are left: {jobs}"]
        units = [f"kvmd@{name}.service" for name in FILES] + [f"kvmd-{name}.scope" for name in FILES]
        shown = show("kvmd.service", *units)
        daemon = shown["kvmd.service"]
        if daemon["ActiveState"] != "active":
            return [f"unit: kvmd.service is {daemon['ActiveState']}"]
        self.guests = guests = managed()
        if guests.keys() != FILES.keys():
            return [f"unit: the daemon knows {sorted(guests)}"]
        if daemon["InvocationID"] not in self.invocations:
            self.invocations.add(daemon["InvocationID"])
            begin, end = (int(daemon[f"{key}TimestampMonotonic"]) for key in ("ExecMainStart", "ActiveEnter"))
            self.tally.adoptions.append((end - begin) / 1e6)
        found = processes()
        faults = [fault for name in FILES for fault in self.look_at(name, guests[name], shown, found[name])]
        on = {name for name in FILES if guests[name]["State"] == "running"}
        if int(daemon["NFileDescriptorStore"]) != 2 * len(on):
            faults.append(f"leftover: {daemon['NFileDescriptorStore']} descriptors for {len(on)} guests")
        if network:
            faults += network_faults(on)
        return faults

    def look_at(
        self, name: str, guest: dict[str, object], shown: dict[str, dict[str, str]], pids: list[int]
    ) -> Iterator[str]:
        unit, scope = (shown.get(key, {}) for key in (f"kvmd@{name}.service", f"kvmd-{name}.scope"))
        state, active, held = guest["State"], unit.get("ActiveState"), scope.get("ActiveState")
        runtime, tap = (RUNTIME / name).exists(), Path(f"/sys/class/net/kv-{name}").exists()
        if len(pids) > 1:
            yield f"unit: {name} has more than one QEMU: {pids}"
        if name in self.pids and pids != [self.pids[name]]:
            yield f"lost: {name}: PID {self.pids[name]} is now {pids}"
        if state == "running":
            if not (active == held == "active" and pids == [guest["PID"]] == [int(unit["MainPID"])] and runtime):
                yield f"unit: {name} runs: unit {active}, scope {held}, {pids=}, {guest['PID']=}, {unit['MainPID']=}"
            if tap != (name in NETWORKED):
                yield f"unit: {name} runs: tap {tap}"
            return
        if (state, active) not in (("stopped", "inactive"), ("failed", "failed")) or held not in ("inactive", None):
            yield f"unit: {name} is {state}: unit {active}, scope {held}"
        if pids or runtime or tap:
            yield f"leftover: {name} is {state}: {pids=} {runtime=} {tap=}"

    def rest(self, where: str, network: bool = False) -> bool:
        """Wait until everything is as it must be; what is not by then counts."""
        deadline = time.monotonic() + PATIENCE
        while faults := self.look(network):
            if time.monotonic() > deadline:
                self.tally.add(where, faults)
                self.wrong += 1
                print("WRONG", *faults, sep="\n  ", flush=True)
                break
            time.sleep(0.05)  # looking costs the daemon and systemd time that they need to come to rest
        for process in self.asked:
            process.kill()
            process.communicate()
        self.asked.clear()
        return not faults

    # episodes

    def begin(self) -> None:
        for name, text in FILES.items():
            (CONFIGURATION / f"{name}.toml").write_text(text)
        run(*call("Reload"))
        done = run("systemctl", "start", *(f"kvmd@{name}" for name in STEADY))
        if done.returncode or not self.rest("before", network=True):
            raise RuntimeError(f"the guests do not start: {done.stderr}")
        self.pids = {name: int(str(self.guests[name]["PID"])) for name in STEADY}

    def end(self) -> None:
        self.pids = {}
        self.ask("systemctl", "stop", *(f"kvmd@{name}" for name in FILES))
        self.rest("after", network=True)
        run("systemctl", "reset-failed", *(f"kvmd@{name}" for name in FILES))
        for name, guest in self.guests.items():
            if guest["State"] == "running":
                self.tally.units.append(f"{name} does not stop")
        for name in FILES:
            (CONFIGURATION / f"{name}.toml").unlink()
            Path(f"/var/lib/kvmd/images/{name}.qcow2").unlink(missing_ok=True)
        run(*call("Reload"))

    def episodes(self) -> None:
        begin = time.monotonic()
        self.begin()
        while sum(self.tally.injections.values()) < self.count and self.wrong < GIVE_UP:
            self.episode()
        self.end()
        self.tally.seconds = time.monotonic() - begin

    def episode(self) -> None:
        self.tally.episodes += 1
        name = self.random.choice(VICTIMS)
        on = self.guests[name]["State"] == "running"
        verbs = ["stop", "stop_call", "terminate", "restart", "kill_qemu", "rewrite"] if on else ["start"] * 5
        verb = self.random.choice([*verbs, "nothing"])
        faults = [self.choose_fault() for _ in range(self.random.randint(2, 4))]
        said = [f"{self.tally.episodes}: {verb} {name}"]
        if verb == "kill_qemu" and self.random.random() < 0.5:  # also while there is no daemon
            said.append(self.inject(faults.pop(), 0))
        VERBS[verb](self, name)
        for fault in faults:
            said.append(self.inject(fault, self.random.choice([0.02, 0.1, 0.4]) * self.random.random()))
        where = ", ".join(said)
        begin = time.monotonic()
        known = len(self.tally.adoptions)
        settled = self.rest(where, network="network" in where)
        adoptions = ", ".join(f"adopted in {seconds:.2f} s" for seconds in self.tally.adoptions[known:])
        print(f"{where}: {time.monotonic() - begin:.2f} s {adoptions}", flush=True)
        if settled:
            self.judge(where, verb, name)

    def choose_fault(self) -> tuple[str, Callable[[], object]]:
        fault: tuple[str, Callable[[], object]] = self.random.choice(FAULTS)(self)
        limit = self.count // 60 if fault[0] in SLOW else self.count
        return fault if self.tally.injections.get(fault[0], 0) < limit else self.signal_daemon()

    def inject(self, fault: tuple[str, Callable[[], object]], delay: float) -> str:
        time.sleep(delay)
        what, action = fault
        done = action()
        if isinstance(done, subprocess.CompletedProcess) and done.returncode:  # there was nothing to break
            return f"no {what}"
        self.count_injection(what)
        return f"{what} after {delay * 1000:.0f} ms"

    def count_injection(self, what: str) -> None:
        self.tally.injections[what] = self.tally.injections.get(what, 0) + 1

    def judge(self, where: str, verb: str, name: str) -> None:
        """What came out of it, and whether a start that was not finished can be repeated."""
        guest = self.guests[name]
        unit = show(f"kvmd@{name}.service")[f"kvmd@{name}.service"]
        came = (guest["State"], guest["Result"], unit["ActiveState"])
        if verb == "kill_qemu" and came != ("failed", "crashed", "failed"):
            self.tally.units.append(f"{where}: QEMU was killed: {came}")
        if verb in ("stop", "stop_call") and (came[0], came[2]) != ("stopped", "inactive"):
            self.tally.units.append(f"{where}: was to stop: {came}")
        if verb == "terminate" and came[0] != "running" and (came[0], came[2]) != ("stopped", "inactive"):
            self.tally.units.append(f"{where}: was to be switched off: {came}")
        if verb in ("start", "restart") and came[0] != "running":
            done = run(*call("StartGuest", "s", name))
            if done.returncode:
                self.tally.units.append(f"{where}: does not start again: {done.stderr}")
            self.rest(f"{where}, started again")

    # what is asked of a guest

    def ask(self, *argv: str) -> None:
        self.asked.append(launch(*argv))

    def start(self, name: str) -> None:
        ways = [call("StartGuest", "s", name), ("systemctl", "start", f"kvmd@{name}"), guest_call(name, "Start")]
        for way in self.random.sample(ways, self.random.choice([1, 1, 2])):  # two: from two sides at once
            self.ask(*way)

    def stop(self, name: str) -> None:
        self.ask("systemctl", "stop", f"kvmd@{name}")

    def stop_call(self, name: str) -> None:
        # The daemon may be killed before it has told systemd: a person whose call fails asks again.
        self.ask("sh", "-c", 'until "$@"; do sleep 0.1; done', "sh", *call("StopGuest", "s", name))

    def terminate(self, name: str) -> None:
        self.ask(*guest_call(name, "Terminate"))

    def restart(self, name: str) -> None:
        self.ask(*self.random.choice([("systemctl", "restart", f"kvmd@{name}"), call("RestartGuest", "s", name)]))

    def kill_qemu(self, name: str) -> None:
        os.kill(int(str(self.guests[name]["PID"])), signal.SIGKILL)
        self.count_injection("QEMU killed")

    def rewrite(self, name: str) -> None:
        path = CONFIGURATION / f"{name}.toml"
        path.write_text(FILES[name] + "# changed\n")
        self.ask(*call("Reload"))

    def nothing(self, name: str) -> None:
        pass

    # faults

    def signal_daemon(self) -> tuple[str, Callable[[], object]]:
        name = self.random.choice(["KILL"] * 5 + ["SEGV", "ABRT"])
        words = ("systemctl", "kill", f"--signal={name}", "--kill-whom=main", "kvmd")
        return f"daemon {name}", lambda: run(*words)

    def restart_daemon(self) -> tuple[str, Callable[[], object]]:
        return "daemon restarted", lambda: run("systemctl", "restart", "--no-block", "kvmd")

    def reexec(self) -> tuple[str, Callable[[], object]]:
        return "daemon-reexec", lambda: run("systemctl", "daemon-reexec")

    def reload(self) -> tuple[str, Callable[[], object]]:
        return "daemon-reload", lambda: run("systemctl", "daemon-reload")

    def restart_journald(self) -> tuple[str, Callable[[], object]]:
        """Not killed: the entry it has in its hands then is lost, whoever sent it."""
        return "journald restarted", lambda: unlimited("restart", "systemd-journald")

    def restart_bus(self) -> tuple[str, Callable[[], object]]:
        return "bus restarted", lambda: unlimited("restart", "dbus")

    def reinstall(self) -> tuple[str, Callable[[], object]]:
        return "reinstalled", lambda: run("dpkg", "--install", self.deb)

    def flush_filter(self) -> tuple[str, Callable[[], object]]:
        return "network: filter deleted", lambda: run("nft", "delete", "table", "inet", "kvmd")

    def remove_route(self) -> tuple[str, Callable[[], object]]:
        words = ("ip", "route", "flush", "proto", "171", "dev", f"kv-{self.random.choice(['steady1', 'steady2'])}")
        return "network: routes removed", lambda: run(*words)

    def remove_proxy(self) -> tuple[str, Callable[[], object]]:
        words = ("ip", "neigh", "del", "proxy", f"192.0.2.{NETWORKED['steady1']}", "dev", "eth0")
        return "network: proxy entry removed", lambda: run(*words)

    def set_tap_down(self) -> tuple[str, Callable[[], object]]:
        """Of a guest that starts, too: half configured."""
        words = ("ip", "link", "set", "down", "dev", f"kv-{self.random.choice(list(NETWORKED))}")
        return "network: tap set down", lambda: run(*words)

    def interrupt_monitor(self) -> tuple[str, Callable[[], object]]:
        def interrupt() -> None:
            with socket.socket(socket.AF_UNIX) as monitor, suppress(OSError):
                monitor.connect(f"{RUNTIME}/steady1/qmp.spare")
                monitor.send(b'{"execute": "qmp_capab')

        return "monitor client gone", interrupt


VERBS: dict[str, Callable[[Runner, str], None]] = {
    "start": Runner.start,
    "stop": Runner.stop,
    "stop_call": Runner.stop_call,
    "terminate": Runner.terminate,
    "restart": Runner.restart,
    "kill_qemu": Runner.kill_qemu,
    "rewrite": Runner.rewrite,
    "nothing": Runner.nothing,
}
FAULTS = [
    *[Runner.signal_daemon] * 8,
    *[Runner.restart_daemon] * 3,
    *[Runner.reexec] * 2,
    *[Runner.reload] * 2,
    *[Runner.restart_journald] * 3,
    Runner.restart_bus,
    Runner.reinstall,
    Runner.flush_filter,
    Runner.remove_route,
    Runner.remove_proxy,
    *[Runner.set_tap_down] * 2,
    Runner.interrupt_monitor,
]


SLOW = ("reinstalled", "network: proxy entry removed")  # dpkg; what makes no event is looked at every three seconds


# --- serial lines -----------------------------------------------------------------------------------------------------


def count_lines(tally: Tally) -> None:
    """Each run of each guest by position and by number: from the first on, in order, each exactly once."""
    fields = "MESSAGE,KVMD_GUEST,KVMD_INVOCATION_ID,KVMD_OFFSET,KVMD_LENGTH"
    run("journalctl", "--sync")
    command = ("journalctl", "-q", "--all", "-o", "json", f"--output-fields={fields}", "KVMD_STREAM=serial")
    runs: defaultdict[tuple[str, str], list[tuple[int, int, str]]] = defaultdict(list)
    for line in run(*command, timeout=120).stdout.splitlines():
        entry = json.loads(line)
        if entry["KVMD_GUEST"] in FILES:
            position = int(entry["KVMD_OFFSET"]), int(entry["KVMD_LENGTH"]), entry["MESSAGE"]
            runs[entry["KVMD_GUEST"], entry["KVMD_INVOCATION_ID"]].append(position)
    last_words = defaultdict(str)
    for (guest, _), entries in runs.items():
        expected = number = 0
        for offset, length, message in entries:
            tally.lines += 1
            if offset < expected:
                tally.lines_doubled.append(f"{guest}: {offset} after {expected}: {message[:12]}")
            elif offset > expected:
                tally.lines_lost.append(f"{guest}: {offset} after {expected}: {message[:12]}")
            expected = offset + length
            if match := re.match(r"(\d{8}) ", message):
                number += 1
                if int(match[1]) != number:
                    tally.lines_lost.append(f"{guest}: number {match[1]} is {number}")
                    number = int(match[1])
        last_words[guest] = entries[-1][2]
    tally.lines_lost += [f"{name}: ends {last_words[name]!r}" for name in STEADY if "button" not in last_words[name]]


# --- many objects, and a full socket ----------------------------------------------------------------------------------


class Listener:
    """A client of the system bus that hears every signal of kvmd, and counts it."""

    async def connect(self) -> None:
        self.heard: Counter[str] = Counter()
        self.news = asyncio.Event()
        self.bus = await MessageBus(bus_type=BusType.SYSTEM).connect()
        self.bus.add_message_handler(self._hear)
        bus = ("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus")
        await self.call(bus, "AddMatch", "s", "type='signal',sender='org.kvmd1'")

    def _hear(self, message: Message) -> None:
        if message.message_type is MessageType.SIGNAL:
            self.heard[message.member] += 1
            self.news.set()

    async def call(self, target: tuple[str, str, str], member: str, signature: str = "", *body: object) -> list[object]:
        destination, path, interface = target
        message = Message(destination, path, interface, member, signature=signature, body=list(body))
        reply = await asyncio.wait_for(self.bus.call(message), PATIENCE)
        assert reply is not None
        if reply.message_type is MessageType.ERROR:
            raise RuntimeError(f"{member}: {reply.body}")
        values: list[object] = reply.body
        return values

    async def until(self, member: str, count: int) -> None:
        try:
            async with asyncio.timeout(PATIENCE):
                while self.heard[member] < count:
                    self.news.clear()
                    await self.news.wait()
        except TimeoutError:
            raise TimeoutError(f"{self.heard[member]} of {count} {member}") from None


def deaf_client() -> socket.socket:
    """It subscribes to all signals, asks for all objects, three times, and never reads."""
    deaf = socket.socket(socket.AF_UNIX)
    deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    deaf.connect("/run/dbus/system_bus_socket")
    deaf.sendall(b"\0AUTH EXTERNAL 30\r\n")  # user 0
    deaf.recv(4096)
    deaf.sendall(b"BEGIN\r\n")
    bus = ("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus")
    wanted = [(bus, "Hello", []), (bus, "AddMatch", ["type='signal'"])]
    wanted += [(("org.kvmd1", "/org/kvmd1", "org.freedesktop.DBus.ObjectManager"), "GetManagedObjects", [])] * 3
    for serial, ((destination, path, interface), member, body) in enumerate(wanted, 1):
        signature = "s" * len(body)
        message = Message(destination, path, interface, member, signature=signature, body=body, serial=serial)
        deaf.sendall(message._marshall())
    return deaf


async def many_objects(count: int) -> dict[str, float]:
    """COUNT guest files, a client that never reads, and the bus frozen for a second while all of them appear."""
    listener = Listener()
    await listener.connect()
    pid = int(show("kvmd.service")["kvmd.service"]["MainPID"])
    bus = int(show("dbus.service")["dbus.service"]["MainPID"])
    before = resident(pid)
    figures: dict[str, float] = {}

    def write(text: str) -> None:
        for number in range(count):
            path = CONFIGURATION / f".object{number}"  # no guest file yet
            path.write_text(text)
            path.rename(CONFIGURATION / f"object{number}.toml")

    write(TOP)
    await listener.until("GuestNew", count)
    deaf = deaf_client()
    os.kill(bus, signal.SIGSTOP)  # now nobody reads from kvmd
    try:
        write(TOP + 'description = "changed"\n')
        await asyncio.sleep(1.5)
        figures["frozen MiB"] = resident(pid) - before
    finally:
        os.kill(bus, signal.SIGCONT)
    worst = 0.0
    for _ in range(20):
        begin = time.monotonic()
        done = await asyncio.to_thread(run, *call("ListGuests"))  # a client that has not all the signals to read
        worst = max(worst, time.monotonic() - begin)
        assert len(json.loads(done.stdout)["data"][0]) == count
        await asyncio.sleep(0.02)
    figures["ListGuests s"] = worst
    await listener.until("PropertiesChanged", count)
    begin = time.monotonic()
    (objects,) = await listener.call((*MANAGER[:2], "org.freedesktop.DBus.ObjectManager"), "GetManagedObjects")
    figures["GetManagedObjects s"] = time.monotonic() - begin
    assert len(objects) == count  # type: ignore[arg-type]
    for number in range(count):
        (CONFIGURATION / f"object{number}.toml").unlink()
    await listener.until("GuestRemoved", count)
    deaf.close()
    figures["MiB"] = resident(pid) - before
    return {**figures, **listener.heard, "same daemon": int(show("kvmd.service")["kvmd.service"]["MainPID"]) == pid}


def resident(pid: int) -> float:
    """MiB."""
    (line,) = (row for row in Path(f"/proc/{pid}/status").read_text().splitlines() if row.startswith("VmRSS:"))
    return int(line.split()[1]) / 1024


# --- cycles -----------------------------------------------------------------------------------------------------------


def cycles(count: int) -> dict[str, object]:
    """Guests with network and without, in turn; what the daemon holds after a fifth and at the end."""
    names = ("victim2", "victim3")
    for name in names:
        (CONFIGURATION / f"{name}.toml").write_text(FILES[name])
    run(*call("Reload"))
    pid = int(show("kvmd.service")["kvmd.service"]["MainPID"])
    held = []
    begin = time.monotonic()
    for number in range(1, count + 1):
        name = names[number % 2]
        for argv in (call("StartGuest", "s", name), guest_call(name, "Terminate")):
            done = run(*argv)
            if done.returncode:
                raise RuntimeError(f"cycle {number}: {argv}: {done.stderr}")
        if number in (count // 5, count):
            run("systemctl", "stop", *(f"kvmd@{name}" for name in names))
            held.append(holdings(pid))
    for name in names:
        (CONFIGURATION / f"{name}.toml").unlink()
        Path(f"/var/lib/kvmd/images/{name}.qcow2").unlink(missing_ok=True)
    run(*call("Reload"))
    same = int(show("kvmd.service")["kvmd.service"]["MainPID"]) == pid
    return {"warm": held[0], "end": held[1], "same daemon": same, "seconds": time.monotonic() - begin}


def holdings(pid: int) -> dict[str, object]:
    deadline = time.monotonic() + PATIENCE
    while show("kvmd.service")["kvmd.service"]["NFileDescriptorStore"] != "0" and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)  # close(2) of the last tap is the kernel's to finish
    return {
        "descriptors": len(list(Path(f"/proc/{pid}/fd").iterdir())),
        "kept by PID 1": int(show("kvmd.service")["kvmd.service"]["NFileDescriptorStore"]),
        "MiB": round(resident(pid), 2),
    }


def main(words: list[str]) -> object:
    match words:
        case ["break", seed, count, deb]:
            runner = Runner(int(seed), int(count), deb)
            runner.episodes()
            count_lines(runner.tally)
            return asdict(runner.tally)
        case ["objects", count]:
            return asyncio.run(many_objects(int(count)))
        case ["cycles", count]:
            return cycles(int(count))
    raise SystemExit(__doc__)


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])))
