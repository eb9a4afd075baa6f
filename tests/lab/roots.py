"""Debian trees: of each release a root that hosts are made of, a layer on it per kvmd package, and a workshop."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from .store import CACHE, LabError, built, command, key

RELEASES = {"12": "bookworm", "13": "trixie"}
REPOSITORY = Path(__file__).resolve().parents[2]

# What the kvmd package depends on, then what tests use inside a host.
# fmt: off
PACKAGES = [
    "systemd", "systemd-sysv", "dbus", "udev", "kmod",
    "python3", "python3-dbus-next", "python3-pyroute2", "python3-systemd", "python3-tomli",
    "qemu-system-x86", "qemu-utils", "nftables", "polkitd",
    "iproute2", "procps", "iputils-ping", "arping", "ndisc6", "tcpdump",
    "radvd", "dnsmasq-base", "systemd-container", "libnss-systemd", "busybox-static",
    "isc-dhcp-client", "ovmf", "swtpm", "python3-pycdlib", "tmux",
]
# Of one release: the other's QEMU brings virtiofsd along.
OF_RELEASE = {"bookworm": [], "trixie": ["virtiofsd"]}
# Systems and boot loaders as they are, of bookworm.
SYSTEMS = [
    "memtest86+", "grub-rescue-pc", "ipxe", "grub-efi-amd64-bin", "grub-efi-amd64-signed", "shim-signed",
    "isolinux", "syslinux-common", "debian-installer-12-netboot-amd64", "qemu-guest-agent",
]
# fmt: on

# What some hosts have beside, on roots of their own, and what keeps it from starting before somebody says so: others
# that see to a host's network; libvirt, to compare with.
# fmt: off
EXTRAS: dict[str, tuple[list[str], str]] = {
    "": ([], ""),
    "others": (
        ["firewalld", "iptables", "network-manager"],
        'systemctl --root="$1" --quiet disable firewalld NetworkManager NetworkManager-wait-online wpa_supplicant',
    ),
    "libvirt": (
        ["libvirt-daemon-system", "libvirt-clients", "iptables"],
        'systemctl --root="$1" --quiet disable libvirtd.service libvirtd.socket libvirtd-ro.socket '
        "libvirtd-admin.socket virtlogd.socket virtlogd-admin.socket virtlockd.socket virtlockd-admin.socket "
        "libvirt-guests.service\n"
        'rm -f "$1"/etc/libvirt/qemu/networks/autostart/*',
    ),
}
# fmt: on

# Runs on the machine with the new tree as $1. The kernel is unpacked only: its modules and image are wanted, not an
# initrd. No unit of the distribution disturbs tests; hosts get their own machine id, name and resolver.
CUSTOMIZE = r"""
set -e
root=$1
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
package=$(APT_CONFIG=$MMDEBSTRAP_APT_CONFIG apt-cache depends linux-image-cloud-amd64 |
          sed -n 's/.*Depends: \(linux-image-[0-9][^ ]*\).*/\1/p' | head -n 1)
mkdir "$root/tmp/kernel"
(cd "$root/tmp/kernel" && APT_CONFIG=$MMDEBSTRAP_APT_CONFIG apt-get -qq download "$package")
dpkg-deb --fsys-tarfile "$root"/tmp/kernel/*.deb | tar -x -C "$root" --keep-directory-symlink --exclude='./usr/share'
rm -r "$root/tmp/kernel" "$root"/boot/System.map-*
mv "$root"/boot/vmlinuz-* "$root/boot/vmlinuz"
chroot "$root" depmod "$(basename "$root"/lib/modules/*)"
for unit in radvd.service apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer \
            e2scrub_reap.service fstrim.timer systemd-timesyncd.service; do
    ln -sf /dev/null "$root/etc/systemd/system/$unit"
done
echo uninitialized > "$root/etc/machine-id"
rm -f "$root/etc/hostname" "$root/etc/resolv.conf" "$root"/var/lib/dbus/machine-id
chroot "$root" passwd -d root
rm "$root/etc/dpkg/dpkg.cfg.d/99mmdebstrap"
touch "$root/etc/.updated" "$root/var/.updated"
"""


@cache
def own_release() -> str:
    """The release of this machine where the lab knows it, else Debian 12."""
    release = platform.freedesktop_os_release()
    return RELEASES.get(release.get("VERSION_ID", ""), "bookworm") if release.get("ID") == "debian" else "bookworm"


@cache
def mirror() -> str | None:
    """Where this machine gets Debian from; None, which is mmdebstrap's own choice, when its apt does not say."""
    apt = Path("/etc/apt")
    for path in [apt / "sources.list", *sorted((apt / "sources.list.d").glob("*.*"))]:
        for uri in _archives(path) if path.is_file() else ():
            return uri
    return None


def _archives(path: Path) -> Iterator[str]:
    lines = [line.split("#")[0].split() for line in path.read_text().splitlines()]
    if path.suffix == ".sources":
        words = [word for line in lines if line and line[0].lower() == "uris:" for word in line[1:]]
    else:
        words = [word for line in lines if line and line[0] == "deb" for word in line[1:]]
    for word in words:
        if word.startswith(("http://", "https://")) and word.rstrip("/").endswith("/debian"):
            yield word.rstrip("/")


def root(release: str, extra: str = "") -> Path:
    """A minimal Debian with all that a kvmd host needs but kvmd, and with one of ``EXTRAS``."""
    additions, quiet = EXTRAS[extra]
    packages, script = [*PACKAGES, *OF_RELEASE[release], *additions], CUSTOMIZE + quiet
    kind = f"root-{release}-{extra}" if extra else f"root-{release}"
    return built(kind, key(release, *packages, script), lambda path: _bootstrap(release, packages, script, path))


# An image as people take it from the net: a system of its own, which is told by cloud-init who it is.
CLOUD = ["systemd", "systemd-sysv", "dbus", "udev", "kmod", "iproute2", "ifupdown", "cloud-init", "cloud-guest-utils"]
CLOUD_CUSTOMIZE = (
    CUSTOMIZE
    + r"""
rm -f "$root"/boot/initrd* "$root"/etc/network/interfaces.d/*
echo 'datasource_list: [ NoCloud, None ]' > "$root/etc/cloud/cloud.cfg.d/90_dpkg.cfg"
"""
)


def cloud() -> Path:
    """The tree of such an image."""
    hash_ = key(*CLOUD, CLOUD_CUSTOMIZE)
    return built("cloud-root", hash_, lambda path: _bootstrap("bookworm", CLOUD, CLOUD_CUSTOMIZE, path))


UNPACK = r"""
set -e
mkdir "$1/tmp/packages"
cd "$1/tmp/packages"
APT_CONFIG=$MMDEBSTRAP_APT_CONFIG apt-get -qq download %s
for package in *.deb; do dpkg-deb -x "$package" "$1"; done
rm -r "$1/tmp/packages" "$1"/usr/lib/debian-installer/images/*/amd64/gtk
"""


def systems() -> Path:
    """What ``SYSTEMS`` have in them, side by side in one tree; nothing of it is installed."""
    script = UNPACK % " ".join(SYSTEMS)
    return built("systems", key(script), lambda path: _bootstrap("bookworm", [], script, path, variant="custom"))


def _bootstrap(release: str, packages: list[str], script: str, path: Path, variant: str = "minbase") -> None:
    uri = mirror()
    hook = CACHE / f"{path.name}.sh"
    hook.write_text(script)
    # fmt: off
    command(
        "mmdebstrap", "--mode=root", f"--variant={variant}", "--format=directory",
        *([f"--include={','.join(packages)}"] if packages else []),
        "--dpkgopt=path-exclude=/usr/share/man/*",
        "--dpkgopt=path-exclude=/usr/share/locale/*",
        "--dpkgopt=path-exclude=/usr/share/doc/*",
        f'--customize-hook=sh "{hook}" "$1"',
        release, path, *([f"deb {uri} {release} main"] if uri else []),
        log=CACHE / f"{path.name.rsplit('-', 1)[0]}.log",
    )
    # fmt: on
    hook.unlink()


def layer(release: str, deb: Path, extra: str = "") -> Path:
    """What `apt-get install ./DEB` adds to the root, with no network: an overlay directory."""
    base, package = root(release, extra), deb.read_bytes()
    return built(f"layer-{release}", key(base.name, package), lambda path: _install(base, release, deb, path))


def _install(base: Path, release: str, deb: Path, path: Path) -> None:
    with overlay(path, [base], CACHE / f"{path.name}.mnt") as merged:
        shutil.copy(deb, merged / "root" / deb.name)
        # fmt: off
        command(
            "unshare", "--net", "--pid", "--fork", f"--mount-proc={merged}/proc",
            "chroot", merged,
            "apt-get", "install", "-y", "--no-install-recommends", f"/root/{deb.name}",
            log=CACHE / f"layer-{release}.log",
            DEBIAN_FRONTEND="noninteractive",
            PATH="/usr/sbin:/usr/bin:/sbin:/bin",
        )
        # fmt: on
        for mark in ("etc/.updated", "var/.updated"):
            (merged / mark).touch()
        (merged / "root" / deb.name).unlink()


def workshop(release: str) -> Path:
    """A Debian in which packages are built and looked at."""
    packages = ["debhelper", "dh-python", "lintian"]
    kind = f"workshop-{release}"
    return built(kind, key(release, *packages), lambda path: _bootstrap(release, packages, "", path))


def work(release: str, directory: Path, script: str) -> str:
    """What a shell script prints in the workshop: as nobody, who owns the directory and is in it, with no network."""
    # fmt: off
    done = subprocess.run(
        [
            "systemd-nspawn", "--quiet", "--pipe", "--register=no", "--keep-unit", "--private-network", "--read-only",
            "--resolv-conf=off", "--timezone=off", "-D", workshop(release),
            f"--bind={directory}:/mnt", "--chdir=/mnt", "--setenv=HOME=/tmp",
            "setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "sh", "-euc", script,
        ],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
    )
    # fmt: on
    if done.returncode:
        raise LabError(f"{script!r} in Debian {release} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


@contextmanager
def overlay(upper: Path, lower: list[Path], mountpoint: Path) -> Iterator[Path]:
    """The layers as one tree, for a while."""
    mount_overlay(upper, lower, mountpoint)
    try:
        yield mountpoint
    finally:
        command("umount", mountpoint)
        shutil.rmtree(work_directory(upper), ignore_errors=True)
        mountpoint.rmdir()


def mount_overlay(upper: Path, lower: list[Path], mountpoint: Path) -> None:
    work = work_directory(upper)
    for directory in (upper, work, mountpoint):
        directory.mkdir(parents=True, exist_ok=True)
    layers = ":".join(map(str, lower))
    command(
        "mount", "-t", "overlay", "kvmd-lab", mountpoint, "-o", f"lowerdir={layers},upperdir={upper},workdir={work}"
    )


def work_directory(upper: Path) -> Path:
    return upper.with_name(f"{upper.name}.work")


@cache
def deb() -> Path:
    """The package under test: $KVMD_DEB, else built now from the working tree (the same tree gives the same bytes)."""
    if given := os.environ.get("KVMD_DEB"):
        return Path(given)
    done = subprocess.run(
        [REPOSITORY / "packaging" / "build-deb"], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode:
        raise LabError(f"packaging/build-deb ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return Path(done.stdout.split()[-1])
