"""KVM: the CPU, its firmware, the modules, the device; and whether this host is a guest itself."""

from __future__ import annotations

from collections.abc import Iterator

from kvmd.ctl.health.facts import Facts
from kvmd.ctl.health.finding import Finding, ok, warning

SLOW = "guests are emulated, much slower"
MAKERS = {"vmx": ("VT-x of Intel", "kvm_intel"), "svm": ("AMD-V", "kvm_amd")}


def judge(facts: Facts) -> Iterator[Finding]:
    flag = _flag(facts.cpuinfo)
    inside = facts.virtualised not in ("none", "") and not facts.container
    device = facts.devices.get("/dev/kvm")
    if not flag:
        todo = (
            "let its host give it nested virtualisation" if inside else "if it should: look into its firmware's setup"
        )
        yield warning("cpu", f"the CPU shows neither vmx (Intel) nor svm (AMD): {SLOW}", todo)
    else:
        yield ok("cpu", f"the CPU has {flag}, {MAKERS[flag][0]}")
    if facts.firmware_complaint:
        todo = "enable VT-x or SVM in its setup, and switch the host off once"
        yield warning("firmware", f"virtualisation is switched off in the firmware: {facts.firmware_complaint}", todo)
    elif facts.firmware_complaint is None and not device:
        text = "whether the firmware switches virtualisation off is in the kernel's log, which this user cannot read"
        yield warning("firmware", text, "ask as root")
    if flag:
        yield from _module(facts, MAKERS[flag][1])
    if device is None:
        yield warning("kvm", f"there is no /dev/kvm: {SLOW}", _load(flag))
    elif device.mode & 0o060 != 0o060:
        text = f"/dev/kvm is not open to its group, {device.group} (mode {device.mode:04o}): {SLOW}"
        yield warning("kvm", text, "udev makes it 0660, group kvm: chgrp kvm /dev/kvm; chmod 660 /dev/kvm")
    else:
        yield ok("kvm", f"/dev/kvm is open to its group, {device.group}")
    yield from _nested(facts, inside)


def _flag(cpuinfo: str) -> str:
    flags = next((line.split() for line in cpuinfo.splitlines() if line.startswith("flags")), [])
    return next((flag for flag in MAKERS if flag in flags), "")


def _load(flag: str) -> str:
    return f"modprobe {MAKERS[flag][1]}; journalctl -k says why it does not load" if flag else ""


def _module(facts: Facts, module: str) -> Iterator[Finding]:
    if module in facts.modules:
        yield ok("module", f"the kernel module {module} is loaded")
    elif facts.container:
        yield ok("module", f"the kernel module {module} is the host's of this container")
    else:
        yield warning(
            "module", f"the kernel module {module} is not loaded", f"modprobe {module}; it comes with the kernel"
        )


def _nested(facts: Facts, inside: bool) -> Iterator[Finding]:
    if inside:
        yield ok("nested", f"this host is a virtual machine itself ({facts.virtualised})")
    elif facts.container:
        yield ok("nested", f"this host is a container ({facts.virtualised}): devices and modules are its host's")
    if facts.nested:
        can = facts.nested in ("Y", "1")
        yield ok(
            "nested", f"guests {'can' if can else 'cannot'} have KVM of their own (parameter nested: {facts.nested})"
        )
