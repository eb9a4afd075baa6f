"""kvmctl doctor on a host that is well, and on one that is not; and import, from another tool's words to a guest."""

from __future__ import annotations

import json
import time

import lab
import pytest

from .guests import Guests
from .test_kvmctl import ctl

WALL = """table inet wall {
    chain pass { type filter hook forward priority 0; policy drop; }
}
"""


def doctor(host: lab.Machine, status: int = 0) -> list[str]:
    return ctl(host, "doctor", status=status).stdout.splitlines()


def said(lines: list[str], start: str) -> str:
    return "\n".join(line for line in lines if line.startswith(start))


@pytest.mark.complaints("wall", "broken.toml")
def test_a_host_by_its_doctor(guests: Guests) -> None:
    host: lab.Host = guests.host
    began = time.monotonic()
    well = doctor(host)
    took = time.monotonic() - began
    assert took < 5, f"{took:.2f} s, of which getting into the host is some 0.05"
    assert well[-1].startswith("nothing stops guests; ")
    assert "✓ kvmd " in said(well, "✓ kvmd")
    assert "the system bus answers" in said(well, "✓ bus")
    assert "none" in said(well, "✓ leftovers")
    assert "/etc/subuid has 65536 numbers from 1879048192" in said(well, "✓ users")
    assert "guests are on the LAN of eth0" in said(well, "✓ uplink IPv4")
    assert "emulated (TCG)" in said(well, "! accelerator")
    findings = json.loads(ctl(host, "doctor", "--json").stdout)
    assert [sorted(finding) for finding in findings] == [["check", "hint", "state", "text"]] * len(findings)
    assert {finding["state"] for finding in findings} == {"ok", "warning"}
    plain = host.run("env", "LC_ALL=C", "kvmctl", "doctor").stdout
    assert plain.isascii()
    assert "\n+ kvmd " in plain
    nobody = host.run("setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "kvmctl", "doctor").stdout
    assert "nobody may " in nobody

    # a guest, behind somebody's wall, whose file has changed; and a tap of nobody's
    guests.linux("ill", last=61)
    guests.start("ill")
    host.run("nft", WALL)
    guests.write("broken", "memory = 'much'\n")
    guests.linux("ill", last=61, top='description = "changed"')
    host.run("ip", "tuntap", "add", "kv-gone", "mode", "tap")
    ill = doctor(host, status=1)
    host.run("ip", "link", "delete", "kv-gone")
    host.run("nft", "delete table inet wall")
    assert "! leftovers" in said(ill, "! leftovers")
    assert "the tap kv-gone belongs to no running guest (ip link delete kv-gone)" in said(ill, "! leftovers")
    assert "its file has changed since its start (kvmctl restart ill)" in said(ill, "! guest ill")
    assert "chain pass of table inet wall" in said(ill, "! guest ill")
    assert "broken.toml:1: memory: " in said(ill, "✗ files")
    assert ill[-1].startswith("1 thing stops guests; ")

    # without the daemon: it is not started by asking
    host.run("systemctl", "stop", "kvmd")
    off = doctor(host, status=1)
    assert "kvmd does not run (systemctl status kvmd says why; systemctl start kvmd)" in said(off, "✗ kvmd")
    assert host.run("systemctl", "is-active", "kvmd", check=False).stdout == "inactive\n"
    host.run("systemctl", "start", "kvmd")
    host.run("rm", "/etc/kvmd/broken.toml")
    guests.names.discard("broken")
    guests.clear()


def test_a_guest_from_a_command_line(guests: Guests) -> None:
    """Imported, checked by the daemon itself, and started; what is there is not overwritten."""
    host: lab.Host = guests.host
    images = "/var/lib/kvmd/images"
    append = f"{lab.guests.CMDLINE} kvmd.name=moved"
    line = f"qemu-system-x86_64 -m 128 -kernel vmlinux -initrd initrd.img -append '{append}' -snapshot -name moved"
    host.write("/tmp/moved.sh", f"#!/bin/sh\ncd {images}\nexec {line}\n")
    done = ctl(host, "import", "/tmp/moved.sh")
    assert done.stdout == "/etc/kvmd/moved.toml\n"
    assert "moved.sh: -snapshot: kvmd writes to the image" in done.stderr
    guests.names.add("moved")
    guests.call("Reload")
    guests.start("moved")
    again = ctl(host, "import", "/tmp/moved.sh", "--command", status=1)
    assert "/etc/kvmd/moved.toml is there already" in again.stderr
    shown = ctl(host, "import", "/tmp/moved.sh", "--print", "--name", "other")
    assert 'kernel = "/var/lib/kvmd/images/vmlinux"' in shown.stdout
    assert "other" not in host.run("ls", "/etc/kvmd").stdout
    told = json.loads(ctl(host, "import", "/tmp/moved.sh", "--name", "other", "--json", "--print").stdout)
    assert sorted(told) == ["missed", "name", "problems", "text"]
    assert told["problems"] == []
    host.run("rm", "/tmp/moved.sh")
    guests.clear()
