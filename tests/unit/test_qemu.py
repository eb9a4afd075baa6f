"""QEMU's arguments: as expected word by word, and accepted by the QEMU that is installed."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from kvmd.guest import MODELS, Boot, Cdrom, Disk, Display, Endpoint, Guest, Nic, Serial, StartOptions
from kvmd.profile import PROFILES
from kvmd.qemu import argv as qemu
from kvmd.qemu import images
from kvmd.qemu.argv import Handles, Tap
from kvmd.qemu.drives import Layer, medium_nodes
from kvmd.qemu.firmware import Firmware
from kvmd.qemu.process import Descriptors

GUEST = Guest("web", Path("/etc/kvmd/web.toml"), UUID(int=1), memory=64 << 20)
HANDLES = Handles("tcg", 3, 4, Path("/run/kvmd/web/serial"))
DISK = Disk(Path("/var/lib/kvmd/images/web.qcow2"))
CDROM = Cdrom(Path("/var/lib/kvmd/images/install.iso"))
NIC = Nic("kv-web", "52:54:00:00:00:01")

needs_qemu = pytest.mark.skipif(not shutil.which("qemu-system-x86_64"), reason="qemu-system-x86_64 is not installed")


def values(argv: list[str], option: str) -> list[str]:
    return [value for name, value in itertools.pairwise(argv) if name == option]


def nodes(argv: list[str]) -> dict[str, dict[str, Any]]:
    return {node["node-name"]: node for node in map(json.loads, values(argv, "-blockdev"))}


def device(argv: list[str], id: str) -> str:
    [found] = [value for value in values(argv, "-device") if f"id={id}" in value.split(",")]
    return found


def test_smallest_guest() -> None:
    expected = """
        -no-user-config -nodefaults -name guest=web -uuid 00000000-0000-0000-0000-000000000001
        -machine q35 -accel tcg -cpu max -smp cpus=1 -m size=67108864B -rtc base=utc -boot strict=on
        -action panic=exit-failure -display none -msg timestamp=off
        -sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny
        -chardev socket,id=qmp,fd=3,server=on,wait=off -mon chardev=qmp,mode=control
        -chardev socket,id=qmp-spare,fd=4,server=on,wait=off -mon chardev=qmp-spare,mode=control
        -chardev pipe,id=serial0,path=/run/kvmd/web/serial -serial chardev:serial0
        -device VGA,id=video0 -vnc none,share=ignore -device pvpanic-pci -device virtio-rng-pci
    """
    assert qemu.argv(GUEST, HANDLES) == expected.split()


def test_backing_chain_is_spelled_out() -> None:
    argv = qemu.argv(replace(GUEST, disks=(DISK,)), replace(HANDLES, images=[[Layer(7, "qcow2"), Layer(8, "raw")]]))
    assert values(argv, "-add-fd") == ["set=1,fd=8", "set=2,fd=7"]
    assert list(nodes(argv)) == ["disk0-1-file", "disk0-1", "disk0-file", "disk0"]
    assert nodes(argv)["disk0"] == {
        "driver": "qcow2",
        "node-name": "disk0",
        "file": "disk0-file",
        "backing": "disk0-1",
        "read-only": False,
        "discard": "unmap",
    }
    assert nodes(argv)["disk0-1"]["read-only"]
    assert nodes(argv)["disk0-1-file"]["filename"] == "/dev/fdset/1"
    assert "backing" not in nodes(argv)["disk0-1"]


def test_no_backing_file_is_looked_for() -> None:
    argv = qemu.argv(replace(GUEST, disks=(DISK,)), replace(HANDLES, images=[[Layer(7, "qcow2")]]))
    assert nodes(argv)["disk0"]["backing"] is None


@pytest.mark.parametrize(
    ("path", "driver"), [("/dev/vg0/web", "host_device"), ("/dev/shm/web.img", "file"), ("/srv/web.img", "file")]
)
def test_protocol(path: str, driver: str) -> None:
    argv = qemu.argv(
        replace(GUEST, disks=(Disk(Path(path), format="raw"),)), replace(HANDLES, images=[[Layer(7, "raw")]])
    )
    assert nodes(argv)["disk0-file"]["driver"] == driver


def test_boot_order() -> None:
    guest = replace(GUEST, disks=(DISK, DISK), cdroms=(CDROM,), nics=(NIC,))
    assert qemu.boot_indexes(guest) == {"disk0": 1, "disk1": 2, "cdrom0": 3}
    assert qemu.boot_indexes(guest, "cdrom") == {"disk0": 1, "disk1": 2, "cdrom0": 0}
    assert qemu.after_boot_once(guest, "cdrom") == {"cdrom0": 3}
    assert qemu.after_boot_once(guest, "network") == {"nic0": -1}
    guest = replace(guest, boot=Boot(order=("network", "disk")))
    assert qemu.boot_indexes(guest) == {"nic0": 1, "disk0": 2, "disk1": 3}


def test_firmware_is_two_flash_chips() -> None:
    guest = replace(GUEST, firmware="uefi")
    argv = qemu.argv(guest, replace(HANDLES, firmware=Firmware(code=7, nvram=8)))
    assert values(argv, "-add-fd") == ["set=3000000,fd=7", "set=3000001,fd=8"]
    assert {name: node["read-only"] for name, node in nodes(argv).items()} == {
        "code-file": True,
        "code": True,
        "nvram-file": False,
        "nvram": False,
    }
    assert values(argv, "-machine")[1:] == ["pflash0=code,pflash1=nvram"]
    assert values(argv, "-global") == []
    argv = qemu.argv(replace(guest, secure_boot=True), replace(HANDLES, firmware=Firmware(code=7, nvram=8)))
    assert values(argv, "-machine")[1:] == ["pflash0=code,pflash1=nvram,smm=on"]
    assert values(argv, "-global") == ["driver=cfi.pflash01,property=secure,value=on"]


def test_tpm() -> None:
    argv = qemu.argv(GUEST, replace(HANDLES, tpm=9))
    assert "socket,id=tpm0,fd=9" in values(argv, "-chardev")
    assert values(argv, "-tpmdev") == ["emulator,id=tpm0,chardev=tpm0"]


def test_uefi_boots_from_the_network_with_random_numbers() -> None:
    """Which no other profile than those of virtio gives it."""
    guest = replace(GUEST, firmware="uefi", profile="windows", nics=(NIC,))
    handles = replace(HANDLES, taps=[Tap((9,))], firmware=Firmware(code=7, nvram=8))
    assert "virtio-rng-pci" not in values(qemu.argv(guest, handles), "-device")
    for argv in (
        qemu.argv(guest, replace(handles, boot_once="network")),
        qemu.argv(replace(guest, boot=Boot(order=("network",))), handles),
    ):
        assert "virtio-rng-pci" in values(argv, "-device")


def test_network_boot_needs_the_option_rom() -> None:
    guest = replace(GUEST, nics=(NIC,))
    handles = replace(HANDLES, taps=[Tap((9,))])
    assert device(qemu.argv(guest, handles), "nic0").endswith(",romfile=")
    argv = qemu.argv(replace(guest, boot=Boot(order=("network",))), handles)
    assert device(argv, "nic0") == "virtio-net-pci,netdev=net0,id=nic0,mac=52:54:00:00:00:01,bootindex=1"
    assert values(argv, "-netdev") == ["tap,id=net0,fd=9"]
    assert "romfile" not in device(qemu.argv(guest, replace(handles, boot_once="network")), "nic0")


def test_queues_vhost_and_mtu() -> None:
    guest = replace(GUEST, cpus=2, nics=(NIC,))
    assert [qemu.queues(replace(guest, cpus=cpus), NIC) for cpus in (1, 2, 64)] == [1, 2, qemu.MAX_QUEUES]
    assert qemu.queues(guest, replace(NIC, model="e1000")) == 1
    assert qemu.queues(replace(guest, machine="microvm"), NIC) == 1
    argv = qemu.argv(guest, replace(HANDLES, taps=[Tap((9, 10), (11, 12), 1400)]))
    assert values(argv, "-netdev") == ["tap,id=net0,fds=9:10,vhost=on,vhostfds=11:12"]
    assert ",mq=on,host_mtu=1400," in device(argv, "nic0")
    argv = qemu.argv(guest, replace(HANDLES, taps=[Tap((9,), (11,))]))
    assert values(argv, "-netdev") == ["tap,id=net0,fd=9,vhost=on,vhostfd=11"]
    argv = qemu.argv(replace(guest, nics=(replace(NIC, model="e1000"),)), replace(HANDLES, taps=[Tap((9,), (), 1400)]))
    assert device(argv, "nic0") == "e1000,netdev=net0,id=nic0,mac=52:54:00:00:00:01,romfile="


def test_vsock() -> None:
    argv = qemu.argv(GUEST, replace(HANDLES, vsock=qemu.Vsock(9, 42, 1234)))
    assert "vhost-vsock-pci,guest-cid=42,vhostfd=9" in values(argv, "-device")
    notify = "type=11,value=io.systemd.credential:vmm.notify_socket=vsock-stream:2:1234"
    assert values(argv, "-smbios") == [notify]


def test_direct_kernel_boot() -> None:
    guest = replace(
        GUEST, boot=Boot(kernel=Path("/boot/vmlinuz"), initrd=Path("/boot/initrd"), cmdline="console=ttyS0")
    )
    argv = qemu.argv(guest, replace(HANDLES, kernel=11, initrd=12))
    assert values(argv, "-kernel") == ["/proc/self/fd/11"]
    assert values(argv, "-initrd") == ["/proc/self/fd/12"]
    assert values(argv, "-append") == ["console=ttyS0"]
    assert "VGA,id=video0" not in argv
    assert "-vnc" not in argv
    seen = qemu.argv(replace(guest, display=Display(vnc=True)), replace(HANDLES, kernel=11, initrd=12))
    assert values(seen, "-vnc") == ["none,share=ignore"]
    assert "VGA,id=video0" in seen
    argv = qemu.argv(guest.started_with(StartOptions("disk")), replace(HANDLES, boot_once="disk"))
    assert not {"-kernel", "-initrd", "-append"} & set(argv)
    assert "VGA,id=video0" in argv


def test_the_screen_by_tcp() -> None:
    for address, vnc in (("127.0.0.1", "127.0.0.1:1"), ("::1", "[::1]:1")):
        display = Display(vnc=True, address=Endpoint(ip_address(address), 5901))
        assert values(qemu.argv(replace(GUEST, display=display), HANDLES), "-vnc") == [f"{vnc},share=ignore"]
    argv = qemu.argv(replace(GUEST, display=display), replace(HANDLES, vnc_password=13))
    assert values(argv, "-vnc") == ["[::1]:1,share=ignore,password-secret=vnc-password"]
    assert values(argv, "-object") == ["secret,id=vnc-password,file=/proc/self/fd/13"]


def test_cd_drives() -> None:
    """An empty one has a device only; what is in one can be taken out by number and name."""
    guest = replace(GUEST, cdroms=(Cdrom(), CDROM))
    argv = qemu.argv(guest, replace(HANDLES, images=([], [Layer(9, "raw")])))
    drives = [word for word in values(argv, "-device") if word.startswith("ide-cd")]
    assert drives == ["ide-cd,bus=ide.0,id=cdrom0,bootindex=1", "ide-cd,bus=ide.1,drive=cdrom1,id=cdrom1,bootindex=2"]
    assert values(argv, "-add-fd") == ["set=1000002,fd=9"]
    assert CDROM.path is not None
    assert [json.loads(word) for word in values(argv, "-blockdev")] == medium_nodes("cdrom1", 0, CDROM.path)
    lower, upper = medium_nodes("cdrom1", 1, Path("/dev/sr0"))
    assert (lower["driver"], lower["filename"]) == ("host_device", "/dev/fdset/1000003")
    assert (upper["node-name"], upper["file"]) == ("cdrom1-1", lower["node-name"])


def test_cpu_and_clock() -> None:
    assert values(qemu.argv(GUEST, replace(HANDLES, accelerator="kvm")), "-cpu") == ["host"]
    assert values(qemu.argv(replace(GUEST, cpu="qemu64,-vmx"), HANDLES), "-cpu") == ["qemu64,-vmx"]
    assert values(qemu.argv(replace(GUEST, profile="legacy"), HANDLES), "-rtc") == ["base=localtime"]
    assert "virtio-rng-pci" not in qemu.argv(replace(GUEST, profile="legacy"), HANDLES)


@pytest.mark.parametrize(
    ("guest", "machine"),
    [
        (GUEST, "q35"),
        (replace(GUEST, profile="bsd"), "q35,graphics=off"),
        (replace(GUEST, profile="bsd", firmware="uefi"), "q35"),
        (replace(GUEST, profile="bsd", serial=Serial(screen=False)), "q35"),
        (replace(GUEST, profile="legacy", machine="pc"), "pc,graphics=off"),
        (replace(GUEST, profile="legacy", machine="microvm"), "microvm"),
        (replace(GUEST, profile="windows"), "q35,hpet=off"),
        (GUEST.started_with(StartOptions("cdrom")), "q35,graphics=off"),
        (GUEST.started_with(StartOptions("network")), "q35"),
    ],
)
def test_screen_as_text(guest: Guest, machine: str) -> None:
    assert values(qemu.argv(guest, HANDLES), "-machine") == [machine]


def test_no_screen_without_a_boot_loader() -> None:
    guest = replace(GUEST, profile="bsd", boot=Boot(kernel=Path("/boot/netbsd")))
    assert values(qemu.argv(guest, replace(HANDLES, kernel=11)), "-machine") == ["q35"]


def test_windows() -> None:
    guest = replace(GUEST, profile="windows")
    argv = qemu.argv(guest, replace(HANDLES, accelerator="kvm"))
    [cpu] = values(argv, "-cpu")
    assert cpu.startswith("host,hv_relaxed,")
    assert values(qemu.argv(guest, HANDLES), "-cpu") == ["max"]
    own = qemu.argv(replace(guest, cpu="host,hv_passthrough"), replace(HANDLES, accelerator="kvm"))
    assert values(own, "-cpu") == ["host,hv_passthrough"]
    assert values(argv, "-rtc") == ["base=localtime"]
    assert values(argv, "-global") == ["ICH9-LPC.disable_s3=1"]
    assert values(argv, "-device") == ["VGA,id=video0", "qemu-xhci,id=usb0", "usb-tablet,bus=usb0.0"]
    argv = qemu.argv(replace(guest, machine="pc"), HANDLES)
    assert values(argv, "-global") == ["PIIX4_PM.disable_s3=1"]
    assert values(argv, "-device") == ["VGA,id=video0", "piix3-usb-uhci,id=usb0", "usb-tablet,bus=usb0.0"]


def test_own_arguments_come_last() -> None:
    assert qemu.argv(replace(GUEST, qemu_args=("-device", "usb-ehci")), HANDLES)[-2:] == ["-device", "usb-ehci"]


class Running:
    """A QEMU of the plan, with descriptors as the daemon hands them over."""

    def __init__(
        self, guest: Guest, directory: Path, once: Any = None, kernel: bytes = b"", pause: bool = True
    ) -> None:
        self._stack = ExitStack()
        self._directory = directory
        self._inherited: list[int] = []
        handles = Handles(
            accelerator="tcg",
            qmp_fd=self._listen("qmp"),
            spare_qmp_fd=self._listen("qmp.spare"),
            serial=directory / "serial",
            images=[self._open(disk) for disk in guest.disks]
            + [[Layer(self._inherit(os.open(str(cdrom.path), os.O_RDONLY)), "raw")] for cdrom in guest.cdroms],
            taps=[Tap((self._tap(),)) for _ in guest.nics],
            kernel=self._memory(kernel) if kernel else None,
            boot_once=once,
        )
        for end in ("in", "out"):
            os.mkfifo(directory / f"serial.{end}")
        self._serial = os.open(directory / "serial.out", os.O_RDWR | os.O_NONBLOCK)
        self._stack.callback(os.close, self._serial)
        argv = qemu.argv(guest, handles)
        if not self._taps_work():
            argv = [re.sub(r"^tap,(id=\w+),.*", r"user,\1,restrict=on", word) for word in argv]
        # the bench runs tests as root, QEMU never is: what root opened must do
        unprivileged: dict[str, Any] = {"user": 65534, "group": 65534, "extra_groups": []} if os.getuid() == 0 else {}
        for path in (directory, directory / "serial.in", directory / "serial.out"):
            path.chmod(0o777)
        self.process = subprocess.Popen(
            ["qemu-system-x86_64", *argv, *(["-S"] if pause else [])],
            pass_fds=self._inherited,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            **unprivileged,
        )
        self._stack.callback(self.process.wait)
        self._stack.callback(self.process.kill)
        for fd in self._inherited:
            os.close(fd)
        client = self._stack.enter_context(socket.socket(socket.AF_UNIX))
        client.settimeout(30)
        client.connect(str(directory / "qmp"))
        self._qmp = self._stack.enter_context(client.makefile("rw"))
        try:
            assert "QMP" in json.loads(self._qmp.readline())
        except (OSError, ValueError):
            assert self.process.stderr
            pytest.fail(f"QEMU refused: {self.process.stderr.read()}")
        self.ask("qmp_capabilities")

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def ask(self, command: str, **arguments: object) -> Any:
        self._qmp.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._qmp.flush()
        while "event" in (reply := json.loads(self._qmp.readline())):
            pass
        assert "error" not in reply, reply
        return reply["return"]

    def quit(self) -> str:
        """End it; what it had to say on stderr."""
        self.ask("quit")
        assert self.process.stderr
        said = self.process.stderr.read()
        assert self.process.wait(10) == 0
        return said

    def wait_for(self, char: bytes) -> None:
        deadline = time.monotonic() + 30
        seen = b""
        while char not in seen:
            ready, _, _ = select.select([self._serial], [], [], deadline - time.monotonic())
            assert ready, f"no {char!r} on the serial port, only {seen!r}"
            seen += os.read(self._serial, 4096)

    def _inherit(self, fd: int) -> int:
        self._inherited.append(fd)
        return fd

    def _listen(self, name: str) -> int:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self._directory / name))
        listener.listen(1)
        return self._inherit(listener.detach())

    def _open(self, disk: Disk) -> list[Layer]:
        opened = Descriptors()
        layers = images.open_disk(disk, opened)
        self._inherited += opened.numbers
        return layers

    def _memory(self, content: bytes) -> int:
        fd = os.memfd_create("kernel")
        os.write(fd, content)
        return self._inherit(fd)

    def _tap(self) -> int:
        fd = os.open("/dev/net/tun" if self._taps_work() else "/dev/null", os.O_RDWR)
        if self._taps_work():  # TUNSETIFF: IFF_TAP, IFF_NO_PI, IFF_VNET_HDR
            fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH14x", b"", 0x0002 | 0x1000 | 0x4000))
        return self._inherit(fd)

    @staticmethod
    def _taps_work() -> bool:
        return os.getuid() == 0 and Path("/dev/net/tun").exists()


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="kvmd-") as path:
        yield Path(path)


def make_disk(directory: Path, name: str, **more: Any) -> Disk:
    disk = Disk(directory / name, **more)
    backing = ["-b", str(disk.base), "-F", "raw"] if disk.base else []
    subprocess.run(["qemu-img", "create", "-q", "-f", disk.format, *backing, disk.path, "8M"], check=True)
    disk.path.chmod(0o600)
    return disk


BOARDS = {
    "q35": ["virtio", "sata", "scsi", "nvme"],
    "pc": ["virtio", "ide", "sata", "scsi", "nvme"],
    "microvm": ["virtio", "scsi"],
}


@needs_qemu
@pytest.mark.parametrize("profile", sorted(PROFILES))
@pytest.mark.parametrize("board", BOARDS)
def test_qemu_takes_every_bus(directory: Path, board: Any, profile: Any) -> None:
    """Two disks of every bus, the second with a backing image, a read-only one, and a CD."""
    (directory / "base.img").write_bytes(bytes(8 << 20))
    disks = []
    for bus in BOARDS[board]:
        disks.append(make_disk(directory, f"{bus}.img", bus=bus, format="raw"))
        disks.append(make_disk(directory, f"{bus}.qcow2", bus=bus, base=directory / "base.img", base_format="raw"))
        if bus not in ("sata", "ide"):
            disks.append(make_disk(directory, f"{bus}.ro.qcow2", bus=bus, readonly=True))
    cdroms = (Cdrom(directory / "base.img"), Cdrom(directory / "base.img"))
    guest = replace(GUEST, machine=board, profile=profile, disks=tuple(disks), cdroms=cdroms)
    with Running(guest, directory) as running:
        inserted = {
            re.sub(r".*peripheral/|/virtio.*", "", disk["qdev"]): disk["inserted"]["ro"]
            for disk in running.ask("query-block")
        }
        assert inserted == {
            **{f"disk{number}": disk.readonly for number, disk in enumerate(disks)},
            "cdrom0": True,
            "cdrom1": True,
        }
        assert running.quit() == ""


@needs_qemu
@pytest.mark.parametrize("board", ["q35", "pc"])
def test_qemu_takes_every_nic(directory: Path, board: str) -> None:
    nics = tuple(Nic(f"t{number}", f"52:54:00:00:00:{number:02x}", model=model) for number, model in enumerate(MODELS))
    with Running(replace(GUEST, machine=board, nics=nics), directory) as running:
        assert running.quit() == ""


@needs_qemu
@pytest.mark.parametrize("board", BOARDS)
def test_qemu_takes_network_boot(directory: Path, board: str) -> None:
    guest = replace(GUEST, machine=board, nics=(NIC, replace(NIC, mac="52:54:00:00:00:02")))
    with Running(replace(guest, boot=Boot(order=("network",))), directory) as running:
        assert running.quit() == ""


@needs_qemu
@pytest.mark.parametrize("format", ["qcow2", "raw", "qcow", "qed", "vdi", "vhdx", "vmdk", "vpc"])
def test_qemu_takes_every_format(directory: Path, format: str) -> None:
    guest = replace(GUEST, disks=(make_disk(directory, f"disk.{format}", format=format),))
    with Running(guest, directory) as running:
        assert running.quit() == ""


# Programs for real mode that say one letter on the first serial port and halt.


def program(letter: bytes) -> bytes:
    return (
        b"\xba\xf8\x03\xb0" + letter + b"\xee\xfa\xf4\xeb\xfd"
    )  # mov dx,3f8h; mov al,letter; out dx,al; cli; hlt; jmp


def boot_disk(letter: bytes) -> bytes:
    return program(letter).ljust(510, b"\0") + b"\x55\xaa" + bytes(1 << 20)


def boot_cd(letter: bytes) -> bytes:
    """El Torito, no emulation."""
    sectors = {
        16: b"\x01CD001\x01",
        17: b"\x00CD001\x01EL TORITO SPECIFICATION".ljust(0x47, b"\0") + struct.pack("<I", 19),
        18: b"\xffCD001\x01",
        19: b"\x01".ljust(28, b"\0") + b"\xaa\x55\x55\xaa" + struct.pack("<BBHBBHI", 0x88, 0, 0, 0, 0, 4, 20),
        20: program(letter),
        63: b"",
    }
    return b"".join(sectors.get(number, b"").ljust(2048, b"\0") for number in range(64))


def kernel(letter: bytes) -> bytes:
    """A bzImage whose setup code says the letter (Documentation/arch/x86/boot.rst)."""
    setup = bytearray(1024)
    setup[0x1F1] = 1
    setup[0x1FE:0x20A] = b"\x55\xaa\xeb\x66HdrS" + struct.pack("<HH", 0x020C, 0)[:4]
    setup[0x211] = 1
    setup[0x22C:0x230] = struct.pack("<I", 0x37FFFFFF)
    setup[0x268 : 0x268 + len(program(letter))] = program(letter)
    return bytes(setup) + bytes(4096)


@needs_qemu
@pytest.mark.parametrize("board", ["q35", "pc"])
def test_boots_the_cd_once_and_the_disk_after_a_reset(directory: Path, board: str) -> None:
    (directory / "disk.img").write_bytes(boot_disk(b"D"))
    (directory / "cd.iso").write_bytes(boot_cd(b"C"))
    guest = replace(
        GUEST,
        machine=board,
        disks=(Disk(directory / "disk.img", format="raw"),),
        cdroms=(Cdrom(directory / "cd.iso"),),
    )
    with Running(guest, directory, once="cdrom", pause=False) as running:
        for id, index in qemu.after_boot_once(guest, "cdrom").items():
            running.ask("qom-set", path=f"/machine/peripheral/{id}", property="bootindex", value=index)
        running.wait_for(b"C")
        running.ask("system_reset")
        running.wait_for(b"D")


@needs_qemu
def test_boots_the_first_disk_that_boots(directory: Path) -> None:
    (directory / "empty.iso").write_bytes(bytes(1 << 20))
    (directory / "disk.img").write_bytes(boot_disk(b"D"))
    guest = replace(GUEST, boot=Boot(order=("cdrom", "disk")), cdroms=(Cdrom(directory / "empty.iso"),))
    guest = replace(guest, disks=(Disk(directory / "disk.img", format="raw", bus="scsi"),))
    with Running(guest, directory, pause=False) as running:
        running.wait_for(b"D")


@needs_qemu
@pytest.mark.parametrize("board", BOARDS)
def test_boots_a_kernel_that_only_root_can_read(directory: Path, board: str) -> None:
    guest = replace(GUEST, machine=board, boot=Boot(kernel=Path("/boot/vmlinuz"), cmdline="console=ttyS0"))
    with Running(guest, directory, kernel=kernel(b"K"), pause=False) as running:
        running.wait_for(b"K")


@needs_qemu
def test_both_monitors_and_sigterm(directory: Path) -> None:
    with Running(GUEST, directory) as running, socket.socket(socket.AF_UNIX) as spare:
        spare.settimeout(10)
        spare.connect(str(directory / "qmp.spare"))
        assert b"QMP" in spare.recv(4096)
        assert running.ask("query-status")["status"] == "prelaunch"
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(10) == 0
