"""A LAN in a bottle: network namespaces for the host, its neighbour on the wire, and guests. Needs root.

The test itself runs inside the host's namespace: ``/proc/sys/net``, taps and sockets are that namespace's.
A guest is the far end of a veth whose near end is named as the guest's tap: whoever makes a tap, kvmd sets it up.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import difflib
import itertools
import os
import re
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

import lab
import pytest

from kvmd.guest import Nic
from kvmd.network.lan import Lan
from kvmd.network.model.nicstatus import NicStatus

CLONE_NEWNET = 0x40000000
ROUTER4, ROUTER6 = "192.0.2.1", "2001:db8:1::1"
HOST4, HOST6 = "192.0.2.10", "2001:db8:1::10"
TRAFFIC = r"elements = {[^}]* expires [^}]*}|packets \d+ bytes \d+"  # what it leaves in a list of nft
_numbers = itertools.count()


def run(*argv: str, namespace: str | None = None, check: bool = True) -> str:
    """Output of a command run here, or in ``namespace``."""
    where = ["nsenter", f"--net=/run/netns/{namespace}"] if namespace else []
    done = subprocess.run([*where, *argv], text=True, capture_output=True)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(argv)} in {namespace or 'host'}: {done.stdout}{done.stderr}")
    return done.stdout


def _ping(namespace: str | None, target: str) -> bool:
    return " 1 received" in run("ping", "-n", "-q", "-c", "1", "-W", "2", target, namespace=namespace, check=False)


async def host_reaches(*targets: str) -> bool:
    return all(await asyncio.gather(*(asyncio.to_thread(_ping, None, target) for target in targets)))


def script(lines: str, namespace: str | None = None) -> None:
    for line in lines.strip().splitlines():
        run(*line.split(), namespace=namespace)


@dataclass
class Space:
    """A network namespace other than the host's."""

    name: str

    def run(self, *argv: str, check: bool = True) -> str:
        return run(*argv, namespace=self.name, check=check)

    def script(self, lines: str) -> None:
        script(lines, self.name)

    async def reaches(self, *targets: str) -> bool:
        """One echo request to each; every one answered, within 2 s. Waits until it can speak itself."""
        await asyncio.to_thread(settle, self.name)
        return all(await asyncio.gather(*(asyncio.to_thread(_ping, self.name, target) for target in targets)))


@dataclass
class Bottle:
    """``lan``: the neighbour, which is the router too; its ``wire`` is the host's ``up0``."""

    prefix: str
    lan: Space
    spaces: list[str] = field(default_factory=list)
    reports: list[tuple[str, str, int]] = field(default_factory=list)
    changes: list[NicStatus] = field(default_factory=list)

    def space(self, name: str) -> Space:
        full = f"{self.prefix}-{name}"
        run("ip", "netns", "add", full)
        self.spaces.append(full)
        script("ip link set lo up", full)
        return Space(full)

    def wire(self, uplink: str = "up0", far: str = "wire") -> None:
        script(f"ip link add {uplink} type veth peer name {far} netns {self.lan.name}")
        self.address(uplink, far)

    def address(self, uplink: str = "up0", far: str = "wire") -> None:
        """What is there already becomes the host's uplink and the neighbour's end of it."""
        script(f"""
            ip link set {uplink} up
            ip addr add {HOST4}/24 dev {uplink}
            ip addr add {HOST6}/64 dev {uplink} nodad
            ip route add default via {ROUTER4}
            ip -6 route add default via {ROUTER6}
        """)
        self.lan.script(f"""
            ip link set {far} up
            ip addr add {ROUTER4}/24 dev {far}
            ip addr add {ROUTER6}/64 dev {far} nodad
        """)

    def guest(self, number: int, plug: bool = True) -> tuple[Space, Nic]:
        """A guest with 192.0.2.(50+n), 2001:db8:1::(50+n), a real prefix length and the LAN's gateway."""
        space = self.space(f"g{number}")
        four, six = f"192.0.2.{50 + number}", f"2001:db8:1::{50 + number}"
        nic = Nic(f"tap{number}", f"52:54:00:00:00:{number:02x}", None, (ip_address(four), ip_address(six)))
        if plug:
            self.plug(space, nic)
        return space, nic

    def plug(self, space: Space, nic: Nic, dad: str = "nodad") -> None:
        run(
            "ip",
            "link",
            "add",
            "eth0",
            "netns",
            space.name,
            "address",
            nic.mac,
            "type",
            "veth",
            "peer",
            "name",
            nic.tap,
        )
        if dad == "nodad":
            space.script("sysctl -q net.ipv6.conf.eth0.accept_dad=0")  # nor for its link-local address
        space.script("ip link set eth0 up")
        for address in nic.addresses:
            if address.version == 4:
                space.script(f"ip addr add {address}/24 dev eth0\nip route add default via {ROUTER4}")
            else:
                space.script(f"ip addr add {address}/64 dev eth0 {dad}\nip -6 route add default via {ROUTER6}")

    def unplug(self, nic: Nic) -> None:
        run("ip", "link", "del", nic.tap)

    @contextlib.asynccontextmanager
    async def lan_room(self, tmp_path: Path) -> AsyncIterator[Lan]:
        journal = tmp_path / "kvmd" / "sysctl.json"
        async with Lan(lambda *told: self.reports.append(told), self.changes.append, journal) as lan:
            await lan.begin()
            yield lan


def ruleset() -> str:
    return re.sub(TRAFFIC, "", run("nft", "list", "ruleset"))


def snapshot() -> list[str]:
    """Everything of the host's network that a person or a program could compare."""
    lines: list[str] = []
    for argv in (
        "ip -d addr show",
        "ip -4 route show table all",
        "ip -6 route show table all",
        "ip -4 rule",
        "ip -6 rule",
        "ip neigh show proxy",
        "ip -6 neigh show proxy",
        "ip neigh show nud permanent",
        "ip maddr",
        "nft list ruleset",
        "sysctl -a -r ^net\\.",
    ):
        text = re.sub(f"{TRAFFIC}|expires .*sec", "", run(*argv.split()))
        lines += [f"{argv}: {line}" for line in text.splitlines()]
    return [line for line in lines if not re.search("valid_lft|nf_conntrack_count|random", line)]


def _enter(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(fd, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
    finally:
        os.close(fd)


@pytest.fixture
def bottle() -> Iterator[Bottle]:
    if os.geteuid():
        pytest.skip("needs root: network namespaces")
    prefix = f"kvt{os.getpid()}-{next(_numbers)}"
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    for name in ("host", "lan"):
        run("ip", "netns", "add", f"{prefix}-{name}")
    bottle = Bottle(prefix, Space(f"{prefix}-lan"), [f"{prefix}-lan", f"{prefix}-host"])
    _enter(f"/run/netns/{prefix}-host")
    try:
        script("ip link set lo up\nsysctl -q net.ipv6.conf.default.accept_dad=0")
        bottle.lan.script("ip link set lo up\nsysctl -q net.ipv6.conf.default.accept_dad=0")
        bottle.wire()
        script("sysctl -q net.ipv6.conf.default.accept_dad=1")  # this uplink has been there for long
        settle()
        yield bottle
    finally:
        ctypes.CDLL(None).setns(home, CLONE_NEWNET)
        os.close(home)
        for name in bottle.spaces:
            run("ip", "netns", "del", name, check=False)


@contextlib.contextmanager
def advertising(space: Space, interface: str, prefix: str, scratch: Path) -> Iterator[None]:
    """A router there: radvd, every 3 s. It is the lab's, whose package does not start it on this machine."""
    tree = lab.roots.root(lab.roots.own_release())
    libraries = f"{tree}/lib/x86_64-linux-gnu:{tree}/usr/lib/x86_64-linux-gnu"
    radvd = [f"{tree}/lib64/ld-linux-x86-64.so.2", "--library-path", libraries, f"{tree}/usr/sbin/radvd"]
    config = scratch / f"{space.name}.conf"
    config.write_text(f"""
        interface {interface} {{
            AdvSendAdvert on; MinRtrAdvInterval 3; MaxRtrAdvInterval 4; AdvDefaultLifetime 60;
            prefix {prefix} {{ AdvOnLink on; AdvAutonomous on; }};
        }};
    """)
    space.script("sysctl -q net.ipv6.conf.all.forwarding=1")
    argv = [*radvd, "-n", "-m", "stderr", "-C", str(config), "-p", str(config.with_suffix(".pid"))]
    daemon = subprocess.Popen(["nsenter", f"--net=/run/netns/{space.name}", *argv], stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        daemon.terminate()
        daemon.wait()


async def eventually(condition: Callable[[], object], seconds: float = 5) -> None:
    """For what the kernel does in its own time and tells nobody."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "still not so"
        await asyncio.sleep(0.01)


def settle(namespace: str | None = None, seconds: float = 5) -> None:
    """Until all interfaces have a carrier and a link-local address, and none is tentative any more: 1 to 2 s."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        text = run("ip", "addr", namespace=namespace)
        if "fe80" in text and not re.search("NO-CARRIER|tentative(?! dadfailed)", text):
            return
        time.sleep(0.05)


def difference(before: list[str], after: list[str]) -> list[str]:
    """In words a person can read; empty if a host is the same, line by line."""
    return [
        line
        for line in difflib.unified_diff(before, after, lineterm="", n=0)
        if not line.startswith(("---", "+++", "@@"))
    ]


@pytest.fixture
async def lan(bottle: Bottle, tmp_path: Path) -> AsyncIterator[Lan]:
    async with bottle.lan_room(tmp_path) as room:
        yield room
