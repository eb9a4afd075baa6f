"""The bus, the daemon, who may steer it, and what its guests say."""

from __future__ import annotations

from collections.abc import Iterator

from kvmd.ctl.health.facts import Facts, Guest
from kvmd.ctl.health.finding import Finding, failed, ok, warning

POLKIT, MACHINED = "org.freedesktop.PolicyKit1", "org.freedesktop.machine1"


def judge(facts: Facts) -> Iterator[Finding]:
    bus = facts.bus
    if bus.problem:
        yield failed("bus", bus.problem)
        yield failed("kvmd", "kvmd cannot be asked without the bus", "systemctl status kvmd says more")
        return
    yield ok("bus", "the system bus answers")
    yield from _rights(facts)
    if MACHINED in bus.names:
        yield ok("machined", "guests are in machinectl list")
    else:
        yield warning("machined", "guests are not in machinectl list", "package systemd-container")
    if not bus.daemon:
        yield failed("kvmd", bus.silent, "systemctl status kvmd says why; systemctl start kvmd")
        return
    if bus.version == facts.kvmctl:
        yield ok("kvmd", f"kvmd {bus.version} answers")
    else:
        text = f"kvmd {bus.version} runs, and kvmctl is {facts.kvmctl}"
        yield warning("kvmd", text, "systemctl restart kvmd; no guest notices")
    if bus.accelerator == "kvm":
        yield ok("accelerator", "guests run under KVM")
    else:
        yield warning("accelerator", "guests are emulated (TCG), much slower than under KVM", "see cpu, module and kvm")
    for problem in bus.problems:
        yield failed("files", problem, "kvmctl edit; that guest does not start, others do")
    if not bus.problems:
        yield ok("files", f"all files of guests can be used ({len(bus.guests)})")
    for guest in bus.guests:
        yield from _guest(guest)


def _rights(facts: Facts) -> Iterator[Finding]:
    polkit = POLKIT in facts.bus.names
    if facts.user == "root":
        others = "whom polkit lets" if polkit else "nobody else, as there is no polkit (package polkitd)"
        yield ok("rights", f"root may steer guests, and {others}")
    elif not polkit:
        yield warning("rights", "only root may steer guests, as there is no polkit", "sudo, or package polkitd")
    elif facts.may == "no":
        yield warning("rights", f"{facts.user} may not steer guests, as polkit has it", "sudo, or a rule: man kvmd")
    else:
        asked = ", after a password" if facts.may == "asks" else ""
        yield ok("rights", f"{facts.user} may steer guests{asked}")


def _guest(guest: Guest) -> Iterator[Finding]:
    check = f"guest {guest.name}"
    if guest.state == "failed":
        yield warning(check, f"it has failed{f': {guest.reason}' if guest.reason else ''}", f"kvmctl log {guest.name}")
    elif guest.reason:
        yield warning(check, f"it is {guest.state}: {guest.reason}", f"kvmctl status {guest.name}")
    if guest.changed:
        yield warning(check, "its file has changed since its start", f"kvmctl restart {guest.name}")
    for network in guest.networks:
        if detail := str(network.get("detail", "")):
            yield warning(check, detail, f"network {network.get('state')}; man kvmd, Network")
