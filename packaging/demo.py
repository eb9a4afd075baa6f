"""kvmd's main job, on a disposable Debian host with a LAN around it. Nothing of this machine is changed.

The host is a container with a systemd of its own; its LAN is made of network namespaces inside it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from difflib import unified_diff
from pathlib import Path

from lab import Host, LabError, Neighbour, deb, lan, roots, runs

GUEST = """\
description = "demo guest"
memory = "128M"

[boot]
kernel = "/var/lib/kvmd/images/vmlinuz"
initrd = "/var/lib/kvmd/images/initrd.img"
cmdline = "console=ttyS0 quiet kvmd.name=demo {network} kvmd.ping={aims}"

[[network]]
address = ["{four}", "{six}"]
"""
NETWORK = "kvmd.addr=192.0.2.42/24 kvmd.gw=192.0.2.1 kvmd.addr6=2001:db8:1::42/64 kvmd.gw6=2001:db8:1::1"
RENTED_NETWORK = "kvmd.dhcp=1 kvmd.addr6=2001:db8:5:6::42/64 kvmd.gw6=fe80::1"
SERIAL = ("_UID=0", "KVMD_GUEST=demo", "KVMD_STREAM=serial")
BUS = ("busctl", "--timeout=60", "--json=short")
MANAGER = ("org.kvmd1", "/org/kvmd1", "org.kvmd1.Manager")


def main() -> int:
    parser = argparse.ArgumentParser(prog="packaging/demo", description=__doc__)
    parser.add_argument(
        "--release", choices=roots.RELEASES.values(), default=roots.own_release(), help="Debian of the host"
    )
    parser.add_argument("--keep", action="store_true", help="leave the host and its guest running")
    parser.add_argument("--enter", action="store_true", help="a shell in the host that was kept")
    parser.add_argument("--stop", action="store_true", help="end the host that was kept")
    parser.add_argument(
        "--rented", action="store_true", help="a host with a /32, and a provider's gateway and switch instead of a LAN"
    )
    options = parser.parse_args()
    if options.enter or options.stop:
        return with_kept(options.stop)
    try:
        with Host(options.release, build(), name="demo") as host:
            demonstrate(host, rented(host) if options.rented else in_a_lan(host))
            afterwards(host, options.keep)
    except LabError as error:
        print(f"✗ {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def build() -> Path:
    package = deb()
    done(f"built {package.name}")
    return package


@dataclass(frozen=True)
class Scene:
    """Where the guest is to live: its addresses and its file, who is to reach it, whom it is to reach."""

    four: str
    six: str
    file: str
    visitor: Neighbour
    aims: tuple[str, ...]
    aim: str


def in_a_lan(host: Host) -> Scene:
    alice = host.lan.neighbour("alice", "192.0.2.20", "2001:db8:1::20")
    bob = host.lan.neighbour("bob", "192.0.2.21", "2001:db8:1::21")
    done("its LAN: a router, alice and bob; the host is 192.0.2.10 and 2001:db8:1::10 on eth0")
    four, six = "192.0.2.42", "2001:db8:1::42"
    file = GUEST.format(network=NETWORK, four=four, six=six, aims=",".join(bob.addresses))
    return Scene(four, six, file, alice, bob.addresses, "bob")


def rented(host: Host) -> Scene:
    """The provider gives the host a /32 and a gateway on the link, and one more address: that is the guest's."""
    router = host.make_lan(rented=True).router
    done("its provider: a gateway, and a switch that takes frames of the host's MAC only, to the gateway only")
    for family in ("-4", "-6"):
        show("ip", family, "addr", "show", "dev", "eth0", "scope", "global", host=host)
        show("ip", family, "route", "show", "default", host=host)
    host.write("/etc/resolv.conf", "nameserver 192.0.2.1\n")
    four, six = "198.51.100.20", "2001:db8:5:6::42"
    aims = lan.RENTED_INTERNET
    file = GUEST.format(network=RENTED_NETWORK, four=four, six=six, aims=",".join(aims)) + "configure = true\n"
    return Scene(four, six, file, router, aims, "the world behind the gateway")


def demonstrate(host: Host, scene: Scene) -> None:
    version = host.run("systemctl", "--version").stdout.splitlines()[0]
    done(f"a host: Debian {host.release}, {version}, {host.run('kvmd', '--version', check=False).stdout.strip()}")
    check("kvmd.service runs", host.show("kvmd.service")["ActiveState"] == "active", host)
    before = host.state()

    host.write("/etc/kvmd/demo.toml", scene.file)
    show("cat", "/etc/kvmd/demo.toml", host=host)
    show("kvmd", "--check", "/etc/kvmd/demo.toml", host=host)
    started = time.monotonic()
    show("systemctl", "start", "kvmd@demo", host=host)
    done(f"the guest was started in {time.monotonic() - started:.1f} s")
    host.wait_journal(*SERIAL, message="^guest: ready demo", timeout=60)
    done(f"and came up, {time.monotonic() - started:.1f} s after the start")

    reach(scene.visitor, scene.four, scene.six)
    for family, address in (("-4", scene.four), ("-6", scene.six)):
        proxies = show("ip", family, "neigh", "show", "proxy", host=host)
        check(f"the host answers for {address} on eth0", f"{address} dev eth0" in proxies, host)
    for address in scene.aims:
        host.wait_journal(*SERIAL, message=f"^guest: ping {address} ok", timeout=30)
        done(f"the guest reached {scene.aim} at {address}, whom the host never heard of")

    lines = show("journalctl", "-u", "kvmd@demo", "-o", "cat", "--no-pager", host=host)
    check("the journal has the guest's serial lines", "guest: ready demo" in lines, host)
    guests = json.loads(show(*BUS, "call", *MANAGER, "ListGuests", host=host))["data"][0]
    path = next((path for name, state, path in guests if (name, state) == ("demo", "running")), "")
    check("D-Bus lists the guest as running", path, host)
    state = show(*BUS, "get-property", "org.kvmd1", path, "org.kvmd1.Guest", "State", host=host)
    check("and the guest's own object says the same", json.loads(state)["data"] == "running", host)

    started = time.monotonic()
    show("systemctl", "stop", "kvmd@demo", host=host)
    host.wait_journal(*SERIAL, message="^guest: powering off", timeout=10)
    done(f"the guest shut itself down, in {time.monotonic() - started:.1f} s")
    check("kvmd@demo is inactive", host.show("kvmd@demo")["ActiveState"] == "inactive", host)
    difference = "\n".join(unified_diff(before, host.state(), "before", "after", lineterm="", n=0))
    check(f"the host's network is as before, all {len(before)} lines of it", not difference, host, difference)


def reach(neighbour: Neighbour, *addresses: str) -> None:
    for address in addresses:
        answer = neighbour.ping(address).stdout.splitlines()[1]
        done(f"{neighbour.name} reaches the guest: {answer}")


def afterwards(host: Host, keep: bool) -> None:
    done("all of it was seen")
    if keep:
        host.run("systemctl", "start", "kvmd@demo")
        host.keep()
        print("The host is kept, and its guest runs. Enter it: packaging/demo --enter; end it: packaging/demo --stop")
    elif sys.stdin.isatty() and sys.stdout.isatty():
        if input("A shell in the host? [Y/n] ").strip().lower() in ("", "y", "yes"):
            shell(host)


def shell(host: Host) -> None:
    print(
        "`systemctl start kvmd@demo` starts the guest; `ip netns exec alice ping 192.0.2.42` is from alice; leave: exit"
    )
    subprocess.run(host.enter(["env", "TERM=linux", "bash", "-l"]), check=False)


def with_kept(stop: bool) -> int:
    hosts = [Host.attach(run) for run in runs.runs() if run.kept and run.directory.name.startswith("demo-")]
    if not hosts:
        print("no host was kept (packaging/demo --keep)", file=sys.stderr)
        return 1
    for host in hosts if stop else ():
        host.stop()
    if not stop:
        shell(hosts[-1])
    return 0


def done(what: str) -> None:
    print(f"✓ {what}", flush=True)


def check(what: str, ok: object, host: Host, detail: str = "") -> None:
    if not ok:
        raise LabError(f"not seen: {what} ({host.directory})\n{detail}")
    done(what)


def show(*argv: str, host: Host) -> str:
    """Run a command in the host as a person would, and show both."""
    print(f"  # {' '.join(argv)}", flush=True)
    output = host.run(*argv, timeout=120).stdout
    for line in output.splitlines():
        print(f"    {line}", flush=True)
    return output


if __name__ == "__main__":
    sys.exit(main())
