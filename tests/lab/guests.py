"""Guests to run on a host: Debian's kernel with an initrd of our own, ready in two seconds; a ROM that only prints.

The initrd (its /init is the file beside this one) understands on the kernel command line

    kvmd.name=NAME                 prints "guest: ready NAME" on ttyS0 when the network is up, DAD included
    kvmd.addr=192.0.2.42/24 kvmd.gw=192.0.2.1 kvmd.addr6=2001:db8:1::42/64 kvmd.gw6=2001:db8:1::1
    kvmd.dhcp=1 kvmd.dhcp6=1       asks for addresses instead, and prints what it is told: "guest: DHCP bound …"
    kvmd.addr.1=…                  the same for the second interface
    kvmd.disk=1                    counts boots and stops in the first sector of the first disk, and prints them
    kvmd.ping=ADDRESS,…            then pings, and prints "guest: ping ADDRESS ok" or "failed"
    kvmd.deaf=1                    ignores the power button
    kvmd.agent=1                   runs the QEMU guest agent, in an initrd that has it
    kvmd.share=TAG                 mounts that virtiofs at /share
    kvmd.install=1                 asks, writes system.img of the CD to the first disk, and reboots

and on ttyS0, a line each: echo X, ping ADDRESS, flood N, poweroff, reboot, panic, sh COMMAND.

Other DHCP clients than busybox' come in an initrd that is appended: dhclient, and systemd-networkd.

QEMU's guest agent comes in one that is appended, too.

Another initrd has systemd in it, as PID 1, and one service. It prints "guest: starting", waits for a line "go", and
prints "guest: serving"; then the system is up.
"""

from __future__ import annotations

import lzma
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .roots import overlay, root, systems
from .store import CACHE, built, key

File = tuple[str, int, bytes]  # path, mode, content

INIT = Path(__file__).with_name("init")
# What takes an emulated processor long, and shows nothing here: self-tests of ciphers, memory zeroed twice, retpolines.
CMDLINE = "console=ttyS0 quiet cryptomgr.notests init_on_alloc=0 mitigations=off"
# fmt: off
MODULES = [
    "button", "evdev", "virtio_pci", "virtio_net", "virtio_blk", "virtio_scsi", "sd_mod", "sr_mod",
    "ata_piix", "ahci", "nvme", "e1000", "e1000e", "8139cp", "pvpanic-pci", "ext4", "cdrom", "isofs",
    "virtiofs", "virtio_console",
]
APPLETS = [
    "sh", "mount", "umount", "stty", "cat", "cut", "grep", "insmod", "ip", "udhcpc", "udhcpc6", "head", "tr", "dd",
    "printf", "echo", "poweroff", "reboot", "sed", "usleep", "ping", "ping6", "awk", "sleep", "ls", "sync", "arping",
    "nc", "wget", "hexdump", "dmesg", "mknod", "mkdir", "uname", "cp", "rm", "switch_root", "eject",
]
# fmt: on
# The script of udhcpc and udhcpc6.
DHCP = """#!/bin/sh
case $1 in bound | renew) ;; *) exit 0 ;; esac
[ -z "$ip" ] || ip addr add "$ip/$mask" dev "$interface" 2>/dev/null
[ -z "$ipv6" ] || ip addr add "$ipv6/128" dev "$interface" 2>/dev/null
[ -z "$router" ] || ip route replace default via "$router" dev "$interface"
[ -z "$mtu" ] || ip link set "$interface" mtu "$mtu"
echo "guest: DHCP $1 $ip${ip:+/$mask}$ipv6 router=$router mtu=$mtu dns=$dns" >/dev/ttyS0
"""

CLIENTS = ["/usr/lib/systemd/systemd-networkd", "/usr/sbin/dhclient"]
# fmt: off
CLIENT_APPLETS = ["hostname", "mktemp", "mv", "chmod", "run-parts", "touch", "kill", "expr", "test", "[", "ln", "env"]
CLIENT_SCRIPTS = [
    "sbin/dhclient-script", "etc/dhcp/dhclient.conf", "etc/dhcp/dhclient-exit-hooks.d/rfc3442-classless-routes",
]
# fmt: on
CLIENT_FILES = {
    "etc/passwd": "root:x:0:0::/:/bin/sh\nsystemd-network:x:998:998::/:/bin/sh\n",
    "etc/group": "root:x:0:\nsystemd-network:x:998:\n",
    "etc/machine-id": "0123456789abcdef0123456789abcdef\n",
    "etc/systemd/network/lan.network": "[Match]\nName=eth0\n[Network]\nDHCP=yes\nIPv6AcceptRA=yes\n",
}

SYSTEMD = ["/usr/lib/systemd/systemd", "/usr/lib/systemd/systemd-executor"]
SYSTEMD_MODULES = ["virtio_pci", "vmw_vsock_virtio_transport"]
SYSTEMD_INIT = """#!/bin/sh
mount -t devtmpfs dev /dev
for list in /modules/*; do
    while read -r file; do insmod "/lib/modules/$file.ko" 2>/dev/null; done <"$list"
done
exec /usr/lib/systemd/systemd
"""
SYSTEMD_SERVE = """echo "guest: starting"
while read -r word && [ "$word" != go ]; do :; done
echo "guest: serving"
"""
SYSTEMD_UNITS = {
    "default.target": "[Unit]\nDefaultDependencies=no\nRequires=serve.service\nAfter=serve.service\n",
    "serve.service": "[Unit]\nDefaultDependencies=no\n[Service]\nType=oneshot\nExecStart=/bin/sh /serve\n"
    "StandardInput=tty\nStandardOutput=tty\nTTYPath=/dev/ttyS0\n",
}

UNPACKERS = {b"\x02\x21\x4c\x18": ["lz4"], b"\x28\xb5\x2f\xfd": ["zstd"], b"\xfd7zXZ\0": ["xz"]}  # by magic number

TEMPLATE, RESET = 0x100, 0xFFF0  # where in the ROM the line and the reset vector are


def kernel(release: str = "bookworm") -> Path:
    """As Debian packs it. To unpack itself takes an emulated processor half a second, and after a reset five."""
    return root(release) / "boot/vmlinuz"


def unpacked_kernel(release: str = "bookworm") -> Path:
    """The same, for QEMU to start at its 64-bit entry (PVH)."""
    packed = kernel(release)
    sources = key(root(release).name, Path(__file__).read_bytes())
    return built(f"vmlinux-{release}", sources, lambda path: _unpack(packed.read_bytes(), path))


def _unpack(image: bytes, path: Path) -> None:
    """See Documentation/arch/x86/boot.rst; four bytes after the payload are its length when unpacked."""
    (offset, length), setup = struct.unpack_from("<II", image, 0x248), (image[0x1F1] + 1) * 512
    payload = image[setup + offset :][: length - 4]
    unpack = next(words for magic, words in UNPACKERS.items() if payload.startswith(magic))
    with path.open("wb") as output:
        subprocess.run([*unpack, "-d", "-c"], input=payload, stdout=output, check=True)


def initrd(release: str = "bookworm", tools: str | None = None) -> Path:
    """With the busybox of the release ``tools``; Debian 12's has no udhcpc6."""
    kernel, box = root(release), root(tools or release)
    sources = key(kernel.name, box.name, Path(__file__).read_bytes(), INIT.read_bytes())
    return built(f"initrd-{release}", sources, lambda path: write_initrd(path, guest_files(kernel, box)))


def clients_initrd(release: str = "bookworm") -> Path:
    """The guest's initrd with those of the release's other DHCP clients."""
    tree, base = root(release), initrd(release)
    sources = key(tree.name, base.name, Path(__file__).read_bytes())

    def write(path: Path) -> None:
        path.write_bytes(base.read_bytes() + b"".join(cpio(client_files(tree))))

    return built(f"clients-initrd-{release}", sources, write)


AGENT = "/usr/sbin/qemu-ga"
SHUTDOWN = "#!/bin/sh\necho 'guest: the agent powers off' >/dev/ttyS0\nstty -F /dev/ttyS0 -echo\npoweroff -f\n"


def agent_initrd(release: str = "bookworm") -> Path:
    """The guest's initrd with QEMU's guest agent of bookworm."""
    tree, base = root("bookworm"), initrd(release)
    sources = key(tree.name, systems().name, base.name, Path(__file__).read_bytes())

    def write(path: Path) -> None:
        with tempfile.TemporaryDirectory(dir=CACHE, prefix="agent-") as name:
            directory = Path(name)
            with overlay(directory / "upper", [tree, systems()], directory / "tree") as merged:
                path.write_bytes(base.read_bytes() + b"".join(cpio(agent_files(merged))))

    return built(f"agent-initrd-{release}", sources, write)


def agent_files(tree: Path) -> Iterator[File]:
    for directory in ("usr", "usr/lib", "usr/sbin", "sbin", "lib64", "etc", "etc/qemu", "run", "var"):
        yield directory, 0o040755, b""
    yield "var/run", 0o120777, b"/run"
    yield "sbin/shutdown", 0o100755, SHUTDOWN.encode()
    yield from programs(tree, [AGENT])


def client_files(tree: Path) -> Iterator[File]:
    for directory in (
        "etc",
        "etc/systemd",
        "etc/systemd/network",
        "etc/dhcp",
        "run",
        "run/systemd",
        "var",
        "var/lib",
        "var/lib/dhcp",
    ):
        yield directory, 0o040755, b""
    for directory in ("usr", "usr/lib", "usr/lib/systemd", "usr/sbin", "sbin", "lib64"):
        yield directory, 0o040755, b""
    yield "var/run", 0o120777, b"/run"
    for applet in CLIENT_APPLETS:
        yield f"bin/{applet}", 0o120777, b"busybox"
    for name, text in CLIENT_FILES.items():
        yield name, 0o100644, text.encode()
    for name in CLIENT_SCRIPTS:
        yield from parents(name)
        yield name, 0o100755, (tree / name).read_bytes()
    yield from programs(tree, CLIENTS)


def parents(name: str) -> Iterator[File]:
    if "/" in (directory := name.rpartition("/")[0]):
        yield directory, 0o040755, b""


def programs(tree: Path, paths: list[str]) -> Iterator[File]:
    """With the libraries that they need."""
    libraries = set()
    for program in paths:
        yield program[1:], 0o100755, (tree / program[1:]).read_bytes()
        listing = subprocess.check_output(["chroot", tree, "/lib64/ld-linux-x86-64.so.2", "--list", program], text=True)
        libraries |= {word for word in listing.split() if word.startswith("/")}
    for library in sorted(libraries):
        directory = "lib64" if "/ld-linux" in library else "usr/lib"
        yield f"{directory}/{Path(library).name}", 0o100755, (tree / library[1:]).read_bytes()


def systemd_initrd(release: str = "bookworm", systemd: str = "trixie") -> Path:
    """With the systemd of the release ``systemd``; Debian 12's cannot say READY=1 to a host."""
    kernel, tree = root(release), root(systemd)
    sources = key(kernel.name, tree.name, Path(__file__).read_bytes())
    return built(f"systemd-initrd-{release}", sources, lambda path: write_initrd(path, systemd_files(kernel, tree)))


def systemd_files(kernel: Path, tree: Path) -> Iterator[File]:
    yield from busybox(tree)
    for directory in ("etc", "etc/systemd", "etc/systemd/system", "usr", "usr/lib", "usr/lib/systemd", "lib64"):
        yield directory, 0o040755, b""
    yield "init", 0o100755, SYSTEMD_INIT.encode()
    yield "serve", 0o100644, SYSTEMD_SERVE.encode()
    for name, unit in SYSTEMD_UNITS.items():
        yield f"etc/systemd/system/{name}", 0o100644, unit.encode()
    yield from programs(tree, SYSTEMD)
    yield from modules(kernel, SYSTEMD_MODULES)


def write_initrd(path: Path, files: Iterator[File]) -> None:
    path.write_bytes(b"".join(cpio(files)))


def guest_files(tree: Path, box: Path) -> Iterator[File]:
    """Path, mode and content of all there is in the guest: kernel modules of one Debian tree, busybox of another."""
    yield from busybox(box)
    yield "init", 0o100755, INIT.read_bytes()
    yield "bin/dhcp", 0o100755, DHCP.encode()
    yield from modules(tree, MODULES)


def busybox(tree: Path) -> Iterator[File]:
    for directory in ("bin", "dev", "proc", "sys", "tmp", "lib", "lib/modules", "root"):
        yield directory, 0o040755, b""
    yield "dev/console", 0o020600, b""
    yield "bin/busybox", 0o100755, (tree / "bin/busybox").read_bytes()
    for applet in APPLETS:
        yield f"bin/{applet}", 0o120777, b"busybox"


def modules(tree: Path, names: list[str]) -> Iterator[File]:
    """The kernel's modules, unpacked, and in /modules for each name the files to load, in order."""
    base = next((tree / "lib/modules").iterdir())
    needs = {
        _module(path): [*reversed(rest.split()), path]
        for path, rest in (line.split(":") for line in (base / "modules.dep").read_text().splitlines())
    }
    wanted = {name: needs[name] for name in (word.replace("-", "_") for word in names) if name in needs}
    for path in sorted({path for paths in wanted.values() for path in paths}):
        data = (base / path).read_bytes()
        yield (
            f"lib/modules/{_module(path)}.ko",
            0o100644,
            _unsigned(lzma.decompress(data) if path.endswith(".xz") else data),
        )
    yield "modules", 0o040755, b""
    for name, paths in wanted.items():
        yield f"modules/{name}", 0o100644, "".join(f"{_module(path)}\n" for path in paths).encode()


def _unsigned(module: bytes) -> bytes:
    """Checking a signature takes an emulated processor longer than all else about a module."""
    magic = b"~Module signature appended~\n"
    if not module.endswith(magic):
        return module
    size = int.from_bytes(module[-len(magic) - 4 : -len(magic)], "big")
    return module[: -len(magic) - 12 - size]


def _module(path: str) -> str:
    return re.sub(r"\.ko.*", "", path.rpartition("/")[2]).replace("-", "_")


def cpio(files: Iterator[File]) -> Iterator[bytes]:
    """An archive in the kernel's initramfs format (newc); the one device in it is /dev/console."""
    for inode, (name, mode, data) in enumerate([*files, ("TRAILER!!!", 0, b"")], 1):
        device = (5, 1) if mode & 0o170000 == 0o020000 else (0, 0)
        fields = [inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name) + 1, 0]
        header = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        yield header + b"\0" * (-len(header) % 4) + data + b"\0" * (-len(data) % 4)


def rom(lines: int) -> bytes:
    """A BIOS (-bios) that prints LINES numbered lines of 64 bytes on COM1 as fast as the port takes them, and halts."""
    line = b"%08d " % 0 + (b"the quick brown fox jumps over the lazy dog " * 2)[:54] + b"\n"
    code = bytearray()
    labels: dict[str, int] = {}

    def put(*parts: bytes | str) -> None:
        for part in parts:
            code.extend(part if isinstance(part, bytes) else bytes.fromhex(part))

    def back(opcode: str, label: str) -> None:
        put(opcode, ((labels[label] - len(code) - 2) & 0xFF).to_bytes())

    # fmt: off
    put("fa fc b8 00f0 8ed8 31c0 8ec0")           # cli; cld; ds = 0xf000, this ROM; es = 0
    put("be", TEMPLATE.to_bytes(2, "little"))     # mov si, TEMPLATE
    put("bf 0005 b9 4000 f3a4 8ed8")              # the line to 0000:0500; ds = 0
    put("66bb", lines.to_bytes(4, "little"))      # mov ebx, LINES
    labels["line"] = len(code)
    put("bf 0705")                                # mov di, 0x507, the last digit
    labels["digit"] = len(code)
    put("fe05 803d39 7606 c60530 4f")             # inc [di]; if above '9': make it '0', go to the digit before
    back("eb", "digit")
    put("be 0005 b9 4000")                        # mov si, 0x500; mov cx, 64
    labels["byte"] = len(code)
    put("ba fd03 ec a820 74fb")                   # until the line status register says empty
    put("ac ba f803 ee")                          # lodsb; out 0x3f8, al
    back("e2", "byte")                            # loop
    put("664b")                                   # dec ebx
    back("75", "line")
    put("fa f4 ebfc")                             # halt
    # fmt: on
    image = bytes(code).ljust(TEMPLATE, b"\xf4") + line
    return image.ljust(RESET, b"\xf4") + bytes.fromhex("ea 0000 00f0").ljust(16, b"\xf4")
