"""A whole machine, emulated: a kernel of its own, /dev/kvm for nested guests, cgroup controllers, a real reboot."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from . import guests, roots
from .host import install_guest
from .machine import Failed, Machine
from .runs import Run
from .store import CACHE, LabError, built, command, key

HERE = Path(__file__).resolve().parent
PORTS = 8  # commands that can run at a time
SIZE = "6G"
SPARE = "0000:00:1c.0"  # an NVMe disk that nothing needs, behind an IOMMU
BOOT_TIMEOUT = 100.0
STOP_TIMEOUT = 180.0

INIT = r"""#!/bin/busybox sh
export PATH=/bin
mount -t proc proc /proc
mount -t devtmpfs dev /dev
for module in virtio_pci virtio_blk ext4; do
    [ -e "/modules/$module" ] || continue
    while read -r file; do insmod "/lib/modules/$file.ko" 2>/dev/null; done <"/modules/$module"
done
root=/dev/vda
for word in $(cat /proc/cmdline); do
    case $word in root=*) root=${word#root=} ;; esac
done
until [ -b "$root" ]; do usleep 10000; done
mount -t ext4 "$root" /root
umount /proc
exec switch_root /root /sbin/init
"""
SERVICE = """[Unit]
Description=Commands from the lab
DefaultDependencies=no
[Service]
ExecStart=/usr/bin/python3 -I /usr/lib/kvmd-lab/agent.py
"""
# A port's name comes after the port, with a "change"; ports come in order: with the last one's name all are there.
RULE = f"""
ACTION!="remove", SUBSYSTEM=="virtio-ports", ATTR{{name}}=="lab.{PORTS - 1}", \\
    TAG+="systemd", ENV{{SYSTEMD_WANTS}}="kvmd-lab.service"
"""


def initrd(release: str) -> Path:
    tree = roots.root(release)

    def files() -> Iterator[guests.File]:
        yield from guests.busybox(tree)
        yield "init", 0o100755, INIT.encode()
        yield from guests.modules(tree, ["virtio_pci", "virtio_blk", "ext4"])

    hash_ = key(tree.name, INIT, Path(guests.__file__).read_bytes())
    return built(f"vm-initrd-{release}", hash_, lambda path: guests.write_initrd(path, files()))


def image(release: str, deb: Path | None) -> Path:
    """The VM's first disk, to be copied on write."""
    root, layer = roots.root(release), roots.layer(release, deb) if deb else None
    agent = (HERE / "agent.py").read_bytes()
    parts = key(str(layer or root), guests.initrd(release).name, agent, SERVICE, RULE, SIZE)
    lower = [layer, root] if layer else [root]
    return built(f"vm-{release}", parts, lambda path: _make_image(release, lower, path))


def _make_image(release: str, lower: list[Path], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="vm-tree-") as name:
        directory = Path(name)
        with roots.overlay(directory / "upper", lower, directory / "root") as tree:
            for name, content in (
                ("usr/lib/kvmd-lab/agent.py", (HERE / "agent.py").read_text()),
                ("etc/systemd/system/kvmd-lab.service", SERVICE),
                ("etc/udev/rules.d/90-kvmd-lab.rules", RULE),
                ("etc/machine-id", f"{uuid.uuid4().hex}\n"),
                ("etc/hostname", "vm\n"),
            ):
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                (tree / name).write_text(content)
            install_guest(release, tree)
            for mark in ("etc/.updated", "var/.updated"):
                (tree / mark).touch()
            command("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1,lazy_journal_init=1", "-d", tree, path, SIZE)


class VM(Machine):
    """A virtual machine. Its disk survives reboot(), and is thrown away with the VM."""

    slowness = 3

    def __init__(
        self,
        release: str = "bookworm",
        deb: Path | None = None,
        *,
        name: str = "vm",
        cpu: str = "EPYC,svm=on,npt=on",
        memory: int = 2048,
        smp: int = 1,
        spare: bool = False,
    ) -> None:
        """``smp``: with two emulated CPUs, one in some ten nested KVM guests hangs on an MMIO exit (QEMU 7.2).

        ``spare``: there is an IOMMU, and a disk behind it.
        """
        super().__init__(name)
        self.release = release
        self.deb = deb
        self.cpu = cpu
        self.memory = memory
        self.smp = smp
        self.spare = spare
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        base = image(self.release, self.deb)
        self._run = Run.new(self.name)
        disk = self.directory / "disk.qcow2"
        command("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base, disk)
        if self.spare:
            command("qemu-img", "create", "-q", "-f", "raw", self.directory / "spare.raw", "1M")
        self.boot()

    def boot(self) -> None:
        """Switch the machine on, and wait until systemd has started all it wanted to."""
        console = self._running.console
        # fmt: off
        argv: list[str | Path] = [
            "qemu-system-x86_64", "-machine", "q35", "-accel", "tcg,thread=multi",
            "-cpu", self.cpu, "-smp", str(self.smp), "-m", str(self.memory),
            "-nodefaults", "-no-reboot", "-display", "none",
            "-kernel", guests.unpacked_kernel(self.release), "-initrd", initrd(self.release),
            "-append", f"{guests.CMDLINE} root=/dev/vda rw panic=-1{' iommu=pt' if self.spare else ''}",
            "-drive", f"file={self.directory / 'disk.qcow2'},format=qcow2,if=virtio,cache=unsafe",
            "-chardev", f"file,id=console,path={console},append=on", "-serial", "chardev:console",
            "-device", "virtio-rng-pci",
            "-device", "virtio-serial-pci,id=agent",
        ]
        if self.spare:
            argv += [
                "-device", "intel-iommu",
                "-drive", f"file={self.directory / 'spare.raw'},format=raw,if=none,id=spare",
                "-device", f"nvme,serial=spare,drive=spare,addr={SPARE[8:]}",
            ]
        with ExitStack() as stack:
            listeners = [stack.enter_context(self._listener(port)) for port in range(PORTS)]
            for port, listener in enumerate(listeners):
                argv += ["-chardev", f"socket,id=lab{port},fd={listener.fileno()},server=on,wait=off"]
                argv += ["-device", f"virtserialport,bus=agent.0,chardev=lab{port},name=lab.{port}"]
            fds = [listener.fileno() for listener in listeners]
            self._process = self._running.popen(self.directory / "qemu.log", *argv, pass_fds=fds)
        # fmt: on
        self._lan = None
        try:
            self.run("systemctl", "is-system-running", "--wait", check=False, timeout=BOOT_TIMEOUT)
            # systemd does not wait for all modules, kvm's among them.
            self.run("udevadm", "settle", timeout=BOOT_TIMEOUT)
        except Failed as error:
            raise LabError(f"{self.name} did not boot ({self.directory}): {error}\n{self.console()[-3000:]}") from None

    def _listener(self, port: int) -> socket.socket:
        """Listens before QEMU does: a command can be sent at any time, and waits for the agent."""
        path = self.directory / f"agent.{port}.sock"
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen()
        return listener

    def enter(self, argv: Sequence[str]) -> list[str]:
        return [sys.executable, "-I", str(HERE / "client.py"), str(self.directory), *argv]

    def reboot(self) -> None:
        """`systemctl reboot`, until it is up again."""
        assert self._process
        self.run("systemctl", "reboot", check=False)
        try:
            self._process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            raise LabError(f"{self.name}: no end {STOP_TIMEOUT} s after a reboot:\n{self.console()[-3000:]}") from None
        self.boot()

    def stop(self) -> None:
        super().stop()
        if self._process:
            self._process.wait()
            self._process = None
