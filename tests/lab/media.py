"""What people put into a drive: an installer on a CD that boots by BIOS and by UEFI, and systems that are not Linux.

The installer's CD has the guest's kernel and initrd and, as a file, the system that it installs: a disk image with one
FAT partition that boots both ways, too. From the CD the guest runs with kvmd.install=1, from the disk as "installed".
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from . import guests
from .roots import cloud, systems
from .store import built, command, key

SYSTEM = 40 << 20  # bytes of the disk that is installed
START = 2048  # its partition, in sectors
LINUX = "console=ttyS0 quiet cryptomgr.notests init_on_alloc=0 mitigations=off"
INSTALLER, INSTALLED = f"{LINUX} kvmd.name=installer kvmd.install=1", f"{LINUX} kvmd.name=installed kvmd.dhcp=1"

SYSLINUX = """serial 0 115200
default linux
label linux
  kernel /vmlinuz
  initrd /initrd.img
  append {}
"""
GRUB = """serial
terminal_output serial
linux /vmlinuz {}
initrd /initrd.img
boot
"""


def installer(release: str = "bookworm") -> Path:
    """The CD."""
    sources = key(guests.kernel(release).name, guests.initrd(release).name, systems().name, Path(__file__).read_bytes())
    return built(f"installer-{release}", sources, lambda path: _installer(release, path))


def _installer(release: str, path: Path) -> None:
    with tempfile.TemporaryDirectory() as directory:
        work, tree = Path(directory), Path(directory, "cd")
        boot = {"vmlinuz": guests.kernel(release), "initrd.img": guests.initrd(release)}
        _isolinux(tree, INSTALLER, boot)
        _system(work / "system.img", work, boot)
        shutil.copyfile(work / "system.img", tree / "system.img")
        for name in (".disk/info", "boot/grub/x86_64-efi/grub.cfg"):  # where this GRUB looks on a CD
            (tree / name).parent.mkdir(parents=True)
            (tree / name).write_text(GRUB.format(INSTALLER))
        fat(tree / "efi.img", 8 << 20, {"EFI/BOOT/BOOTX64.EFI": _grub()})
        iso(path, tree, "isolinux/isolinux.bin", "efi.img")


def debian_installer() -> Path:
    """A CD of Debian's own installer, which asks on the serial port."""
    sources = key(systems().name, Path(__file__).read_bytes())
    return built("debian-installer", sources, _debian_installer)


def _debian_installer(path: Path) -> None:
    source = systems() / "usr/lib/debian-installer/images/12/amd64/text/debian-installer/amd64"
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory)
        _isolinux(tree, f"{LINUX} ---", {"vmlinuz": source / "linux", "initrd.img": source / "initrd.gz"})
        iso(path, tree, "isolinux/isolinux.bin")


def _isolinux(tree: Path, cmdline: str, boot: Mapping[str, Path]) -> None:
    """What boots a kernel from a CD by BIOS."""
    (tree / "isolinux").mkdir(parents=True)
    for name, source in boot.items():
        shutil.copyfile(source, tree / name)
    shutil.copyfile(systems() / "usr/lib/ISOLINUX/isolinux.bin", tree / "isolinux/isolinux.bin")
    modules = systems() / "usr/lib/syslinux/modules/bios"
    shutil.copyfile(modules / "ldlinux.c32", tree / "isolinux/ldlinux.c32")
    (tree / "isolinux/isolinux.cfg").write_text(SYSLINUX.format(cmdline))


def cloud_image() -> Path:
    """A qcow2 image with Debian and cloud-init on its one partition; initrd and kernel are the VM's."""
    tree = cloud()
    return built("cloud-image", key(tree.name, Path(__file__).read_bytes()), lambda path: _cloud_image(tree, path))


def _cloud_image(tree: Path, path: Path) -> None:
    size = 768 << 20
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix="cloud-image-") as raw:
        raw.write(_partitioned(0x83, size))
        raw.truncate(size)
        raw.flush()
        options = f"lazy_itable_init=1,lazy_journal_init=1,offset={START * 512}"
        command("mkfs.ext4", "-q", "-F", "-E", options, "-d", tree, raw.name, f"{(size >> 10) - START // 2}k")
        command("qemu-img", "convert", "-q", "-f", "raw", "-O", "qcow2", raw.name, path)


def _partitioned(kind: int, size: int) -> bytes:
    """All before the one partition of a disk of so many bytes."""
    sectors = size // 512 - START
    entry = bytes([0x80, 0, 0, 0, kind, 0, 0, 0]) + START.to_bytes(4, "little") + sectors.to_bytes(4, "little")
    code = Path("/usr/lib/SYSLINUX/mbr.bin").read_bytes()
    return (code.ljust(446, b"\0") + entry.ljust(64, b"\0") + b"\x55\xaa").ljust(START * 512, b"\0")


def _system(image: Path, work: Path, boot: Mapping[str, Path]) -> None:
    (work / "installed.cfg").write_text(GRUB.format(INSTALLED))
    (work / "syslinux.cfg").write_text(SYSLINUX.format(INSTALLED))
    files = {
        "EFI/BOOT/BOOTX64.EFI": _grub(),
        "EFI/debian/grub.cfg": work / "installed.cfg",
        "syslinux.cfg": work / "syslinux.cfg",
        **boot,
    }
    partition = work / "partition"
    fat(partition, SYSTEM - START * 512, files)
    command("syslinux", "--install", partition)
    with image.open("wb") as file:
        file.write(_partitioned(0xEF, SYSTEM))
        file.write(partition.read_bytes())


def _grub() -> Path:
    """Unsigned; it looks for /EFI/debian/grub.cfg where it came from."""
    return systems() / "usr/lib/grub/x86_64-efi/monolithic/grubx64.efi"


def fat(image: Path, size: int, files: Mapping[str, Path]) -> None:
    """A FAT file system of so many bytes with these files, by their paths in it."""
    command("mformat", "-C", "-i", image, "-T", str(size // 512), "-h", "16", "-s", "63", "::")
    made: set[str] = set()
    for name, source in files.items():
        for parent in reversed(Path(name).parents[:-1]):
            if str(parent) not in made:
                command("mmd", "-i", image, f"::{parent}")
                made.add(str(parent))
        command("mcopy", "-i", image, source, f"::{name}")


def iso(path: Path, tree: Path, bios: str = "", efi: str = "") -> None:
    """A CD of a tree; ``bios``: what in it is isolinux, ``efi``: what is an EFI system partition."""
    # fmt: off
    boots = [
        *(["-b", bios, "-c", "boot.cat", "-no-emul-boot", "-boot-load-size", "4", "-boot-info-table"] if bios else []),
        *(["-eltorito-alt-boot"] if bios and efi else []),
        *(["-e", efi, "-no-emul-boot"] if efi else []),
    ]
    # fmt: on
    command("xorriso", "-as", "mkisofs", "-quiet", "-V", "KVMD", "-J", "-r", "-o", path, *boots, tree)
