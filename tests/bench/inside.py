"""The part of the benchmarks that runs inside the host: one client with one D-Bus connection, and what it compares to.

inside.py rounds N PID: measure, the daemon has this PID; the last line printed is JSON, {series: [milliseconds, …]}
inside.py start N PID: start N guests side by side and leave them running; inside.py stop N PID: end them
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from ipaddress import ip_address
from pathlib import Path

from dbus_next.aio.message_bus import MessageBus
from dbus_next.constants import BusType, MessageType
from dbus_next.message import Message
from systemd import journal

ROM = "/var/lib/kvmd/rom"
SCRATCH = Path("/run/bench")  # a tmpfs
CONFIGURATION = Path("/etc/kvmd")
PATIENCE = 30.0  # seconds until something that does not happen is an error
PAUSE = 0.1  # between measurements: what the last one left to do gets done
UPLINK = "eth0"

MANAGER = ("org.kvmd1", "/org/kvmd1", "org.kvmd1.Manager")
SYSTEMD = ("org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager")

GUEST = f'memory = "32M"\n[qemu]\nargs = ["-bios", "{ROM}"]\n'
NETWORK = '[[network]]\naddress = ["192.0.2.{n}", "2001:db8:1::{n}"]\n'
BARE = f"qemu-system-x86_64 -no-user-config -nodefaults -display none -machine q35,accel=tcg -m 32 -bios {ROM}".split()

# What kvmd does for the first guest of an uplink, in the same order, as a person would write it down.
SCRIPT = """
sysctl -q -w net.ipv6.conf.eth0.accept_ra=2 net.ipv6.conf.all.forwarding=1 net.ipv6.conf.all.proxy_ndp=1
sysctl -q -w net.ipv4.neigh.eth0.proxy_delay=0 net.ipv4.conf.eth0.forwarding=1 net.ipv6.neigh.eth0.proxy_delay=0
sysctl -q -w net.ipv4.conf.$tap.accept_redirects=0 net.ipv4.conf.$tap.send_redirects=0 net.ipv4.conf.$tap.rp_filter=1
sysctl -q -w net.ipv6.conf.$tap.accept_ra=0 net.ipv6.conf.$tap.accept_redirects=0 net.ipv6.conf.$tap.autoconf=0
sysctl -q -w net.ipv6.conf.$tap.accept_dad=0 net.ipv6.conf.$tap.addr_gen_mode=0
ip link set $tap address fe:6b:76:6d:64:00 mtu 1500 up
ip neigh replace $four lladdr $mac nud permanent dev $tap protocol 171
ip neigh replace $six lladdr $mac nud permanent dev $tap protocol 171
ip route add $four/32 dev $tap metric 1024 proto 171
ip route add $four/32 dev $tap src 192.0.2.10 proto 171
ip route add $six/128 dev $tap src 2001:db8:1::10 metric 1024 proto 171
sysctl -q -w net.ipv4.neigh.$tap.proxy_delay=0 net.ipv6.neigh.$tap.proxy_delay=0
sysctl -q -w net.ipv4.conf.$tap.forwarding=1 net.ipv4.conf.$tap.proxy_arp=1
nft -f - <<END
table inet bench {
  chain guest {
    ether saddr != $mac drop
    udp sport { 67, 547 } drop
    icmpv6 type { nd-router-advert, nd-redirect } drop
    ip saddr $four accept
    ip6 saddr $six accept
    ip saddr 0.0.0.0 ip daddr 255.255.255.255 udp sport 68 udp dport 67 accept
    ip6 saddr :: icmpv6 type { nd-neighbor-solicit, mld-listener-report, mld2-listener-report } accept
    ip6 saddr fe80::/10 accept
    drop
  }
  chain prerouting { type filter hook prerouting priority raw - 10; iifname $tap goto guest; }
}
END
ip neigh add proxy 2001:db8:1::10 dev $tap protocol 171
ip neigh add proxy fe80::1 dev $tap router protocol 171
ip neigh add proxy $four dev eth0 protocol 171
ip neigh add proxy $six dev eth0 protocol 171
"""
UNDO = """
nft delete table inet bench
ip neigh del proxy $four dev eth0
ip neigh del proxy $six dev eth0
sysctl -q -w net.ipv6.conf.all.forwarding=0 net.ipv6.conf.all.proxy_ndp=0 net.ipv6.conf.eth0.accept_ra=1
sysctl -q -w net.ipv4.neigh.eth0.proxy_delay=80 net.ipv4.conf.eth0.forwarding=0 net.ipv6.neigh.eth0.proxy_delay=80
"""

_libc = ctypes.CDLL(None, use_errno=True)


class Series:
    """What has been measured, in milliseconds, by name."""

    def __init__(self) -> None:
        self.values: defaultdict[str, list[float]] = defaultdict(list)

    def add(self, name: str, nanoseconds: float) -> None:
        self.values[name].append(round(nanoseconds / 1e6, 3))


def wait_until(condition: Callable[[], object], what: str, interval: float = 0.01) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {PATIENCE:g} s: {what}")
        time.sleep(interval)


# --- kvmd -------------------------------------------------------------------------------------------------------------


class Client:
    """One connection to the system bus, as a program would keep it."""

    async def connect(self) -> None:
        self.bus = await MessageBus(bus_type=BusType.SYSTEM).connect()

    async def call(self, target: tuple[str, str, str], member: str, signature: str = "", *body: object) -> list[object]:
        destination, path, interface = target
        message = Message(destination, path, interface, member, signature=signature, body=list(body))
        reply = await asyncio.wait_for(self.bus.call(message), PATIENCE)
        assert reply is not None
        if reply.message_type is MessageType.ERROR:
            raise RuntimeError(f"{member}{body}: {reply.error_name}: {reply.body}")
        values: list[object] = reply.body
        return values

    async def start(self, name: str) -> tuple[str, str, str]:
        (path,) = await self.call(MANAGER, "StartGuest", "s", name)
        return "org.kvmd1", str(path), "org.kvmd1.Guest"

    async def quiet(self, name: str) -> None:
        """Returns once systemd has noticed as well that the guest is off."""
        deadline = time.monotonic() + PATIENCE
        for unit in (f"kvmd@{name}.service", f"kvmd-{name}.scope"):
            while await self._state(unit) not in ("inactive", "failed"):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{unit} does not end")
                await asyncio.sleep(0.01)
        await asyncio.sleep(PAUSE)

    async def _state(self, unit: str) -> str:
        units: list[list[str]]
        (units,) = await self.call(SYSTEMD, "ListUnitsByNames", "as", [unit])  # type: ignore[assignment]
        return units[0][3]


def write_guest(name: str, number: int | None = None, extra: str = "") -> None:
    network = NETWORK.format(n=number) if number is not None else ""
    (CONFIGURATION / f"{name}.toml").write_text(GUEST + network + extra)


def first_line(name: str, since: float) -> float:
    """When the journal got the guest's first serial line, in nanoseconds since the epoch."""
    with journal.Reader(journal.LOCAL_ONLY) as reader:
        reader.add_match(f"KVMD_GUEST={name}", "KVMD_STREAM=serial", "KVMD_OFFSET=0")
        reader.seek_realtime(since / 1e9)
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            while entry := reader.get_next():
                stamp: float = entry["__REALTIME_TIMESTAMP"].timestamp() * 1e9
                if stamp > since:
                    return stamp
            reader.wait(1.0)
    raise TimeoutError(f"no serial line of {name} in the journal")


async def measure_guest(client: Client, series: Series, name: str, label: str) -> None:
    """StartGuest → the first line in the journal; Terminate → returned."""
    begin = time.time_ns()
    guest = await client.start(name)
    returned = time.time_ns()
    series.add(f"start: kvmd{label}", first_line(name, begin) - begin)
    series.add(f"started: kvmd{label}", returned - begin)
    await asyncio.sleep(PAUSE)
    begin = time.perf_counter_ns()
    await client.call(guest, "Terminate")
    series.add(f"stop: kvmd{label}", time.perf_counter_ns() - begin)
    await client.quiet(name)


# --- the bare command -------------------------------------------------------------------------------------------------


class Bare:
    """QEMU as a person starts it. The kernel tells by inotify(7) when its serial file gets the first byte."""

    def __init__(self, *options: str, prefix: tuple[str, ...] = (), fds: tuple[int, ...] = ()) -> None:
        self.serial, self.pidfile, self.monitor = (SCRATCH / name for name in ("serial", "pid", "qmp"))
        for path in (self.serial, self.pidfile, self.monitor):
            path.unlink(missing_ok=True)
        self.serial.touch()
        self.argv = [*prefix, *BARE, "-serial", f"file:{self.serial}", "-pidfile", str(self.pidfile), "-daemonize"]
        self.argv += [option.format(monitor=self.monitor) for option in options]
        self.fds = fds

    def start(self) -> int:
        """Nanoseconds until the first byte."""
        with watch(self.serial) as inotify:
            begin = time.perf_counter_ns()
            child = subprocess.Popen(self.argv, pass_fds=self.fds)
            while not self.serial.stat().st_size:  # truncated first, which is an event, too
                if not inotify.poll(PATIENCE * 1000):
                    raise TimeoutError("bare QEMU prints nothing")
                os.read(self.inotify_fd(inotify), 4096)
            end = time.perf_counter_ns()
        if child.wait(PATIENCE):
            raise RuntimeError(f"{self.argv} ended with {child.returncode}")
        return end - begin

    @staticmethod
    def inotify_fd(inotify: select.poll) -> int:
        return inotify.poll(0)[0][0]

    def open_pidfd(self) -> int:
        return os.pidfd_open(int(self.pidfile.read_text()))

    def kill(self) -> None:
        fd = self.open_pidfd()
        signal.pidfd_send_signal(fd, signal.SIGKILL)
        wait_for_end(fd)
        os.close(fd)

    def quit(self) -> int:
        """Nanoseconds from the monitor's command until the process is gone."""
        fd = self.open_pidfd()
        with socket.socket(socket.AF_UNIX) as monitor:
            monitor.settimeout(PATIENCE)
            monitor.connect(str(self.monitor))
            lines = monitor.makefile()
            lines.readline()
            monitor.sendall(b'{"execute":"qmp_capabilities"}\n')
            lines.readline()
            time.sleep(PAUSE)
            begin = time.perf_counter_ns()
            monitor.sendall(b'{"execute":"quit"}\n')
            wait_for_end(fd)
            end = time.perf_counter_ns()
        os.close(fd)
        return end - begin


def wait_for_end(pidfd: int) -> None:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    if not poll.poll(PATIENCE * 1000):
        raise TimeoutError("QEMU does not end")


@contextmanager
def watch(path: Path) -> Iterator[select.poll]:
    fd = _libc.inotify_init1(os.O_CLOEXEC)
    if fd < 0 or _libc.inotify_add_watch(fd, bytes(path), 0x2) < 0:  # IN_MODIFY
        raise OSError(ctypes.get_errno(), "inotify")
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    try:
        yield poll
    finally:
        os.close(fd)


def measure_bare(series: Series, label: str, *prefix: str) -> None:
    bare = Bare(prefix=prefix)
    series.add(f"start: {label}", bare.start())
    time.sleep(PAUSE)
    bare.kill()
    time.sleep(PAUSE)


def measure_quit(series: Series, label: str, tap: str = "") -> None:
    options = ["-qmp", "unix:{monitor},server=on,wait=off"]
    fds: tuple[int, ...] = ()
    if tap:
        fds = (make_tap(tap),)
        options += ["-netdev", f"tap,id=n,fd={fds[0]}", "-device", "virtio-net-pci,netdev=n,romfile="]
    bare = Bare(*options, fds=fds)
    bare.start()
    for fd in fds:
        os.close(fd)
    series.add(f"stop: {label}", bare.quit())
    time.sleep(PAUSE)


# --- the network ------------------------------------------------------------------------------------------------------


def make_tap(name: str) -> int:
    """As `ip tuntap add` does, but gone when the descriptor is closed."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", name.encode(), 0x5002))  # TUNSETIFF: TAP, NO_PI, VNET_HDR
    return fd


class Proxies:
    """The kernel's proxy neighbour entries, asked for with RTM_GETNEIGH: they make no events."""

    def __init__(self, uplink: str) -> None:
        self.index = socket.if_nametoindex(uplink)
        self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self.socket.bind((0, 0))
        # nlmsghdr: length, RTM_GETNEIGH, REQUEST|DUMP, sequence, port; ndmsg: any family, NTF_PROXY
        self.request = struct.pack("=IHHII", 28, 30, 0x301, 1, 0) + struct.pack("=BxxxiHBB", 0, 0, 0, 8, 0)

    def present(self) -> set[str]:
        """Addresses the uplink answers for."""
        self.socket.send(self.request)
        found: set[str] = set()
        while True:
            data = self.socket.recv(1 << 16)
            while data:
                length, kind = struct.unpack_from("=IH", data)
                if kind == 3:  # NLMSG_DONE
                    return found
                if kind == 28 and struct.unpack_from("=i", data, 20)[0] == self.index:  # RTM_NEWNEIGH
                    found |= self._destination(data[28:length])
                data = data[(length + 3) & ~3 :]

    @staticmethod
    def _destination(attributes: bytes) -> set[str]:
        while attributes:
            length, kind = struct.unpack_from("=HH", attributes)
            if kind == 1:  # NDA_DST
                return {str(ip_address(attributes[4:length]))}
            attributes = attributes[(length + 3) & ~3 :]
        return set()

    def wait(self, addresses: set[str], present: bool) -> None:
        def so() -> bool:
            return addresses <= self.present() if present else not addresses & self.present()

        wait_until(so, f"proxy entries for {addresses} {'there' if present else 'gone'}", 0.0005)


def addresses_of(number: int) -> set[str]:
    return {f"192.0.2.{number}", f"2001:db8:1::{number:x}"}


def measure_network(series: Series, proxies: Proxies, daemon: int) -> None:
    """A tap appears, made by somebody else → the uplink's proxy entries, the last of all there is to do, are there."""
    declared, own = addresses_of(60), addresses_of(61)
    begin = time.perf_counter_ns()
    fd = make_tap("benchlink")
    proxies.wait(declared, present=True)
    series.add("network: kvmd", time.perf_counter_ns() - begin)
    time.sleep(PAUSE)
    os.close(fd)
    proxies.wait(declared, present=False)
    time.sleep(PAUSE)
    os.kill(daemon, signal.SIGSTOP)  # the script has the machine to itself
    four, six = sorted(own)
    environment = {**os.environ, "tap": "benchscript", "four": four, "six": six, "mac": "52:54:00:00:00:61"}
    try:
        begin = time.perf_counter_ns()
        fd = make_tap("benchscript")
        child = subprocess.Popen(["sh", "-ec", SCRIPT], env=environment)
        proxies.wait(own, present=True)
        series.add("network: script", time.perf_counter_ns() - begin)
        if child.wait(PATIENCE):
            raise RuntimeError("the script has failed")
        os.close(fd)
        subprocess.run(["sh", "-c", UNDO], env=environment, check=True, timeout=PATIENCE)
    finally:
        os.kill(daemon, signal.SIGCONT)
    time.sleep(PAUSE)


# --- all of it --------------------------------------------------------------------------------------------------------


async def rounds(count: int, daemon: int) -> dict[str, list[float]]:
    SCRATCH.mkdir(exist_ok=True)
    write_guest("bench", 50)
    write_guest("plain")
    link = 'address = ["192.0.2.60", "2001:db8:1::3c"]\ntap = "benchlink"\n'
    write_guest("link", None, f"[[network]]\n{link}")
    series, proxies, client = Series(), Proxies(UPLINK), Client()
    await client.connect()
    await client.call(MANAGER, "Reload")
    for number in range(count + 1):
        measured = series if number else Series()  # the first round warms the caches
        measure_bare(measured, "bare")
        await measure_guest(client, measured, "bench", "")
        measure_bare(measured, "systemd-run", "systemd-run", "--scope", "--quiet", "--collect", "--")
        await measure_guest(client, measured, "plain", ", no network")
        measure_quit(measured, "bare")
        measure_quit(measured, "bare with a tap", "benchtap")
        measure_network(measured, proxies, daemon)
    for name in ("bench", "plain", "link"):
        (CONFIGURATION / f"{name}.toml").unlink()
    await client.call(MANAGER, "Reload")
    return series.values


async def start(count: int) -> None:
    for number in range(count):
        write_guest(f"g{number}", 100 + number)
    client = Client()
    await client.connect()
    await client.call(MANAGER, "Reload")
    await asyncio.gather(*(client.start(f"g{number}") for number in range(count)))


async def stop(count: int) -> None:
    client = Client()
    await client.connect()
    for number in range(count):
        path = f"/org/kvmd1/guest/g{number}"
        with suppress(RuntimeError):  # off already
            await client.call(("org.kvmd1", path, "org.kvmd1.Guest"), "Terminate")
        (CONFIGURATION / f"g{number}.toml").unlink()
    await client.call(MANAGER, "Reload")


def main(verb: str, count: int, daemon: int) -> None:
    match verb:
        case "rounds":
            print(json.dumps(asyncio.run(rounds(count, daemon))))
        case "start":
            asyncio.run(start(count))
        case "stop":
            asyncio.run(stop(count))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
