"""Versions, the kernel's devices, programs and what does not work without them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from kvmd.ctl.health.facts import Facts
from kvmd.ctl.health.finding import Finding, failed, ok, warning

VIEWERS = ("remote-viewer", "vncviewer", "gvncviewer")

# What is missing without each, and the package it is in.
TOOLS: Mapping[str, tuple[str, str]] = {
    "qemu-img": ("no disk image is made or examined", "qemu-utils"),
    "ip": ("this command sees no routes, and nobody else does easily", "iproute2"),
    "dnsmasq": ("no guest is told its network: configure = true", "dnsmasq-base"),
    "swtpm": ("no guest has a TPM: [tpm]", "swtpm"),
    "ovmf": ('no guest has UEFI: firmware = "uefi"', "ovmf"),
    "virtiofsd": ("no guest sees a directory of the host: [[share]]", "virtiofsd, in Debian 12 qemu-system-common"),
    "pycdlib": ("no guest gets a seed for cloud-init: [cloud_init]", "python3-pycdlib"),
    "viewer": ("kvmctl view has nothing to show screens with; kvmctl screenshot works", "virt-viewer"),
}
DEVICES: Mapping[str, tuple[str, str]] = {
    "/dev/vhost-net": ("under KVM, guests' networks are slower", "modprobe vhost_net"),
    "/dev/vhost-vsock": ("no guest can say that it is ready: vsock.ready", "modprobe vhost_vsock"),
}


def judge(facts: Facts) -> Iterator[Finding]:
    yield ok("kernel", f"Linux {facts.kernel}")
    yield _at_least("systemd", facts.systemd, (252,))
    yield _at_least("qemu", facts.qemu, (7, 2), "apt install qemu-system-x86")
    if "/dev/net/tun" in facts.devices:
        yield ok("tun", "/dev/net/tun is there: guests can have network interfaces")
    else:
        yield failed("tun", "there is no /dev/net/tun: no guest with a network starts", "modprobe tun")
    for path, (without, todo) in DEVICES.items():
        if path in facts.devices:
            yield ok(path.removeprefix("/dev/"), f"{path} is there")
        else:
            yield warning(path.removeprefix("/dev/"), f"there is no {path}: {without}", todo)
    for tool, (without, package) in TOOLS.items():
        if tool in facts.tools:
            yield ok(tool, f"{'a viewer' if tool == 'viewer' else tool} is installed")
        else:
            what = f"no viewer ({', '.join(VIEWERS)})" if tool == "viewer" else f"no {tool}"
            yield warning(tool, f"{what} is installed: {without}", f"package {package}")


def _at_least(name: str, version: str, least: tuple[int, ...], missing: str = "") -> Finding:
    wanted = ".".join(map(str, least))
    shown = {"qemu": "QEMU"}.get(name, name)
    numbers = tuple(int(each) for each in re.findall(r"[0-9]+", version)[: len(least)])
    if not numbers:
        return failed(name, f"there is no {shown} that answers", missing or f"kvmd wants {wanted} or newer")
    if numbers < least:
        return failed(name, f"{shown} {version} is older than {wanted}", f"kvmd wants {wanted} or newer")
    return ok(name, f"{shown} {version}")
