"""kvmd's main job, on a disposable Debian host with a LAN around it. Nothing of this machine is changed.

The host is a container with a systemd of its own; its LAN is made of network namespaces inside it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from difflib import unified_diff
from pathlib import Path

from lab import Host, LabError, Neighbour, deb, roots, runs

GUEST = """\
description = "demo guest"
memory = "128M"

[boot]
kernel = "/var/lib/kvmd/images/vmlinuz"
initrd = "/var/lib/kvmd/images/initrd.img"
cmdline = "console=ttyS0 quiet kvmd.name=demo {network} kvmd.ping=192.0.2.21,2001:db8:1::21"

[[network]]
address = ["192.0.2.42", "2001:db8:1::42"]
"""
NETWORK = "kvmd.addr=192.0.2.42/24 kvmd.gw=192.0.2.1 kvmd.addr6=2001:db8:1::42/64 kvmd.gw6=2001:db8:1::1"
SERIAL = ("KVMD_GUEST=demo", "KVMD_STREAM=serial")
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
    options = parser.parse_args()
    if options.enter or options.stop:
        return with_kept(options.stop)
    try:
        with Host(options.release, build(), name="demo") as host:
            demonstrate(host)
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


def demonstrate(host: Host) -> None:
    version = host.run("systemctl", "--version").stdout.splitlines()[0]
    done(f"a host: Debian {host.release}, {version}, {host.run('kvmd', '--version', check=False).stdout.strip()}")
    check("kvmd.service runs", host.show("kvmd.service")["ActiveState"] == "active", host)
    alice = host.lan.neighbour("alice", "192.0.2.20", "2001:db8:1::20")
    bob = host.lan.neighbour("bob", "192.0.2.21", "2001:db8:1::21")
    done("its LAN: a router, alice and bob; the host is 192.0.2.10 and 2001:db8:1::10 on eth0")
    before = host.state()

    host.write("/etc/kvmd/demo.toml", GUEST.format(network=NETWORK))
    show("cat", "/etc/kvmd/demo.toml", host=host)
    show("kvmd", "--check", "/etc/kvmd/demo.toml", host=host)
    started = time.monotonic()
    show("systemctl", "start", "kvmd@demo", host=host)
    done(f"the guest was started in {time.monotonic() - started:.1f} s")
    host.wait_journal(*SERIAL, message="^guest: ready demo", timeout=60)
    done(f"and came up, {time.monotonic() - started:.1f} s after the start")

    reach(alice, "192.0.2.42", "2001:db8:1::42")
    for family in ("-4", "-6"):
        proxies = show("ip", family, "neigh", "show", "proxy", host=host)
        address = "192.0.2.42" if family == "-4" else "2001:db8:1::42"
        check(f"the host answers for {address} on eth0", f"{address} dev eth0" in proxies, host)
    for address in bob.addresses:
        host.wait_journal(*SERIAL, message=f"^guest: ping {address} ok", timeout=30)
        done(f"the guest reached bob at {address}, whom the host never heard of")

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
