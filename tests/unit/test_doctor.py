"""doctor: made-up facts, and what is said of them."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from kvmd.ctl.doctor import judge, page
from kvmd.ctl.health.facts import Bus, Device, Facts, Guest, Link, Space
from kvmd.ctl.health.finding import Finding, failed, ok, warning
from kvmd.ctl.health.gather import gather
from kvmd.ctl.health.software import TOOLS

GIB = 1 << 30
WEB = Guest("web", "running", True, "", False, ({"tap": "kv-web", "state": "up", "detail": ""},))
KVM = Device(0o660, "kvm", True)
PLAIN = Device(0o666, "root", True)
RANGE = "65536 numbers from 1879048192"
HEALTHY = Facts(
    cpuinfo="processor : 0\nflags : fpu vmx sse\n",
    modules=frozenset({"kvm", "kvm_intel"}),
    nested="Y",
    devices={"/dev/kvm": KVM, **dict.fromkeys(("/dev/net/tun", "/dev/vhost-net", "/dev/vhost-vsock"), PLAIN)},
    kernel="6.12.1",
    systemd="257",
    qemu="10.0.2",
    kvmctl="1.0",
    tools=frozenset(TOOLS),
    bus=Bus(
        names=frozenset({"org.freedesktop.PolicyKit1", "org.freedesktop.machine1"}),
        version="1.0",
        accelerator="kvm",
        guests=(WEB,),
    ),
    uplinks={4: Link("eth0", True), 6: Link("eth0", True)},
    forwarding={4: True, 6: False},
    taps=("kv-web",),
    tagged=("route 192.0.2.42 dev kv-web",),
    spaces={"/run": Space("/run", 5 * GIB, 10 * GIB)},
    ranges={"/etc/subuid": RANGE},
)
NO_KVM = {path: device for path, device in HEALTHY.devices.items() if path != "/dev/kvm"}


def found(facts: Facts, *states: str) -> list[Finding]:
    return [finding for finding in judge(facts) if finding.state in (states or ("warning", "failed"))]


def bus(**changes: Any) -> Facts:
    return replace(HEALTHY, bus=replace(HEALTHY.bus, **changes))


def test_a_healthy_host() -> None:
    assert found(HEALTHY) == []
    assert all(finding.text.isprintable() for finding in judge(HEALTHY))


@pytest.mark.parametrize(
    ("facts", "state", "check", "words"),
    [
        (replace(HEALTHY, cpuinfo="flags : fpu"), "warning", "cpu", "neither vmx (Intel) nor svm (AMD)"),
        (replace(HEALTHY, cpuinfo="", virtualised="kvm"), "warning", "cpu", "nested virtualisation"),
        (replace(HEALTHY, cpuinfo="flags : svm"), "warning", "module", "kvm_amd is not loaded (modprobe kvm_amd"),
        (replace(HEALTHY, modules=frozenset()), "warning", "module", "kvm_intel is not loaded"),
        (replace(HEALTHY, devices=NO_KVM), "warning", "kvm", "no /dev/kvm: guests are emulated, much slower (modprobe"),
        (
            replace(HEALTHY, devices=NO_KVM, firmware_complaint="kvm: disabled by bios"),
            *("warning", "firmware", "switched off in the firmware: kvm: disabled by bios (enable VT-x or SVM"),
        ),
        (replace(HEALTHY, devices=NO_KVM, firmware_complaint=None), "warning", "firmware", "cannot read (ask as root)"),
        (
            replace(HEALTHY, devices={**HEALTHY.devices, "/dev/kvm": Device(0o600, "root", False)}),
            *("warning", "kvm", "not open to its group, root (mode 0600)"),
        ),
        (replace(HEALTHY, devices={"/dev/kvm": KVM}), "failed", "tun", "no guest with a network starts (modprobe tun)"),
        (replace(HEALTHY, devices={"/dev/kvm": KVM}), "warning", "vhost-net", "modprobe vhost_net"),
        (replace(HEALTHY, devices={"/dev/kvm": KVM}), "warning", "vhost-vsock", "vsock.ready"),
        (replace(HEALTHY, systemd="247"), "failed", "systemd", "247 is older than 252"),
        (replace(HEALTHY, qemu="7.1.9"), "failed", "qemu", "QEMU 7.1.9 is older than 7.2"),
        (replace(HEALTHY, qemu=""), "failed", "qemu", "no QEMU that answers (apt install qemu-system-x86)"),
        (replace(HEALTHY, tools=frozenset()), "warning", "swtpm", "no guest has a TPM: [tpm] (package swtpm)"),
        (replace(HEALTHY, tools=frozenset()), "warning", "viewer", "kvmctl view"),
        (replace(HEALTHY, bus=Bus(problem="no bus")), "failed", "bus", "no bus"),
        (
            replace(HEALTHY, bus=Bus(silent="kvmd does not run")),
            "failed",
            "kvmd",
            "kvmd does not run (systemctl status kvmd",
        ),
        (bus(version="0.9"), "warning", "kvmd", "kvmd 0.9 runs, and kvmctl is 1.0 (systemctl restart kvmd"),
        (bus(accelerator="tcg"), "warning", "accelerator", "emulated (TCG)"),
        (bus(problems=("/etc/kvmd/a.toml:1: x: unknown key",)), "failed", "files", "a.toml:1: x: unknown key"),
        (bus(names=frozenset({"org.freedesktop.PolicyKit1"})), "warning", "machined", "systemd-container"),
        (replace(bus(names=frozenset()), user="anna"), "warning", "rights", "only root may steer guests"),
        (replace(HEALTHY, user="anna", may="no"), "warning", "rights", "anna may not steer guests"),
        (
            bus(guests=(replace(WEB, changed=True),)),
            "warning",
            "guest web",
            "changed since its start (kvmctl restart web)",
        ),
        (
            bus(guests=(replace(WEB, state="failed", reason="crashed"),)),
            *("warning", "guest web", "it has failed: crashed (kvmctl log web)"),
        ),
        (
            bus(guests=(replace(WEB, networks=({"tap": "kv-web", "state": "blocked", "detail": "Docker drops it"},)),)),
            *("warning", "guest web", "Docker drops it"),
        ),
        (replace(HEALTHY, uplinks={4: None}), "warning", "uplink IPv4", "no default route"),
        (replace(HEALTHY, uplinks={6: Link("wg0", False)}), "warning", "uplink IPv6", "by wg0, a tunnel without ARP"),
        (replace(HEALTHY, uplinks=None), "warning", "uplink", "package iproute2"),
        (replace(HEALTHY, taps=("kv-web", "kv-old")), "warning", "leftovers", "kv-old belongs to no running guest"),
        (bus(guests=()), "warning", "leftovers", "no guest runs, but there is: route 192.0.2.42 dev kv-web"),
        (
            replace(HEALTHY, spaces={"/run": Space("/", 4, 100)}),
            "warning",
            "space",
            "4B of 100B are free in /run (seen at /), 4 %",
        ),
        (replace(HEALTHY, ranges={"/etc/subuid": ""}), "failed", "users", "no range of kvmd-qemu"),
        (replace(HEALTHY, year=1970), "warning", "clock", "says 1970"),
        (replace(HEALTHY, synchronised=False), "warning", "clock", "not synchronised"),
    ],
)
def test_what_is_wrong(facts: Facts, state: str, check: str, words: str) -> None:
    said = [f"{finding.text} ({finding.hint})" for finding in found(facts, state) if finding.check == check]
    assert any(words in line for line in said), said


@pytest.mark.parametrize(
    ("facts", "check", "words"),
    [
        (replace(HEALTHY, cpuinfo="flags : svm", modules=frozenset({"kvm_amd"})), "cpu", "the CPU has svm, AMD-V"),
        (replace(HEALTHY, nested="0"), "nested", "guests cannot have KVM of their own"),
        (replace(HEALTHY, virtualised="vmware"), "nested", "a virtual machine itself (vmware)"),
        (
            replace(HEALTHY, virtualised="lxc", container=True, modules=frozenset()),
            "module",
            "host's of this container",
        ),
        (replace(HEALTHY, journal_kept=False), "journal", "is forgotten when the host boots"),
        (replace(HEALTHY, synchronised=None), "clock", "cannot be seen"),
        (replace(HEALTHY, user="anna", may="asks"), "rights", "anna may steer guests, after a password"),
        (bus(names=frozenset()), "rights", "nobody else, as there is no polkit"),
        (replace(HEALTHY, forwarding={4: None, 6: True}), "forwarding", "IPv6 on;"),
        (replace(HEALTHY, forwarding={}), "forwarding", "it cannot be seen"),
        (replace(HEALTHY, bus=Bus(silent="kvmd does not run")), "leftovers", "whose they are only kvmd knows"),
        (replace(bus(guests=()), taps=(), tagged=()), "leftovers", "none"),
    ],
)
def test_what_is_as_it_may_be(facts: Facts, check: str, words: str) -> None:
    assert any(words in finding.text for finding in found(facts, "ok") if finding.check == check)


def test_the_page() -> None:
    findings = [ok("kvm", "good"), warning("clock", "wrong – a bit", "set it"), failed("tun", "gone\x1b[2J")]
    assert page(findings, encoding="utf-8", colour=False) == [
        "✓ kvm    good",
        "! clock  wrong – a bit (set it)",
        "✗ tun    gone?[2J",
        "",
        "1 thing stops guests; 1 warning",
    ]
    assert page(findings, encoding="ascii", colour=False)[:3] == [
        "+ kvm    good",
        "! clock  wrong ? a bit (set it)",
        "X tun    gone?[2J",
    ]
    assert page(findings, encoding="utf-8", colour=True)[0] == "\033[32m✓\033[0m kvm    good"
    assert page([], encoding="utf-8", colour=False) == ["", "nothing stops guests; 0 warnings"]


def test_gathering_changes_nothing_and_ends_anywhere() -> None:
    """Also on a host without systemd, bus and root."""
    facts = asyncio.run(gather())
    assert facts.kernel
    assert facts.bus.problem or facts.bus.names
    assert judge(facts)
