"""UEFI firmware, with variables of the guest's own, and Secure Boot: the EFI shell, and Debian's loaders."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

import lab
import pytest

from .guests import Guests, mostly

UEFI = 'firmware = "uefi"\nmemory = "128M"\n'
SHELL = r"Shell>"
NVRAM = "/var/lib/kvmd/efi/nvram.fd"
LOADER = "EFI/BOOT/BOOTX64.EFI"


@pytest.fixture(scope="module", params=mostly("bookworm"))
def guests(request: pytest.FixtureRequest, deb: Path) -> Iterator[Guests]:
    with lab.Host(request.param, deb, name=f"firmware-{request.param}") as host:
        host.make_lan()
        yield Guests(host)


def type_efi(guests: Guests, name: str, line: str, answer: str) -> lab.Entry:
    """The EFI shell wants Return, not a line feed."""
    since = guests.host.cursor()
    guests.host.run("sh", "-c", f"printf '%s\\r' {shlex.quote(line)} > /run/kvmd/{name}/serial.in")
    return guests.wait(name, answer, since)


def start_shell(guests: Guests, name: str) -> None:
    since = guests.host.cursor()
    guests.start(name, ready=False)
    guests.wait(name, "Press ESC in", since, timeout=90)
    type_efi(guests, name, "", SHELL)


def medium(guests: Guests, tmp_path: Path, name: str, files: dict[str, Path | str]) -> None:
    """A FAT file system, as on a stick."""
    sources: dict[str, Path] = {}
    for number, (path, content) in enumerate(files.items()):
        sources[path] = content if isinstance(content, Path) else tmp_path / f"{name}.{number}"
        if isinstance(content, str):
            sources[path].write_text(content)
    image = tmp_path / f"{name}.img"
    lab.media.fat(image, 8 << 20, sources)
    guests.host.copy_in(image, f"/var/lib/kvmd/images/{name}.img")


def test_variables_stay_and_their_loss_is_told(guests: Guests) -> None:
    host = guests.host
    guests.write("efi", UEFI)
    start_shell(guests, "efi")
    assert host.run("stat", "-c", "%U %a", NVRAM).stdout == "root 600\n"
    type_efi(guests, "efi", "ver", "UEFI Interactive Shell")
    type_efi(guests, "efi", "set colour green", SHELL)
    host.run("systemctl", "restart", "kvmd")
    guests.guest_off("efi")

    template = "/usr/share/OVMF/OVMF_VARS_4M.fd"
    host.run("cp", template, "/root/vars.fd")
    host.run("sh", "-c", f"tr '\\0' '\\1' </root/vars.fd >{template}")  # as an upgrade of ovmf brings another one
    start_shell(guests, "efi")
    type_efi(guests, "efi", "set colour", "colour = green")
    guests.guest_off("efi")
    host.run("mv", "/root/vars.fd", template)

    host.run("rm", NVRAM)
    since = host.cursor()
    guests.start("efi", ready=False)
    warning = host.wait_journal("KVMD_GUEST=efi", message="its UEFI variables .* have gone", since=since)
    assert warning["MESSAGE"].startswith(f"Guest efi may have trouble: its UEFI variables {NVRAM} have gone")
    guests.guest_off("efi")
    host.run("truncate", "-s", "-1", NVRAM)
    refused = guests.call("StartGuest", "s", "efi", check=False)
    assert f"the NVRAM {NVRAM} is damaged: it has 540671 bytes, not 540672" in refused.stderr

    host.run("rm", "/etc/kvmd/efi.toml")
    guests.call("Reload")
    assert host.run("ls", "/var/lib/kvmd/efi").stdout.split() == ["nvram.fd"]
    host.run("rm", "-r", "/var/lib/kvmd/efi")


def test_no_firmware_no_guest(guests: Guests) -> None:
    host = guests.host
    guests.write("efi", UEFI)
    host.run("mv", "/usr/share/OVMF", "/usr/share/OVMF.gone")
    refused = guests.call("StartGuest", "s", "efi", check=False)
    host.run("mv", "/usr/share/OVMF.gone", "/usr/share/OVMF")
    assert "there is no UEFI firmware /usr/share/OVMF/OVMF_CODE_4M.fd (install ovmf)" in refused.stderr
    guests.clear()


def test_secure_boot(guests: Guests, tmp_path: Path) -> None:
    """At once: an unsigned loader, with Secure Boot and without it on an older board, and Debian's signed ones."""
    systems = lab.roots.systems()
    grub, shim = systems / "usr/lib/grub", systems / "usr/lib/shim/shimx64.efi.signed"
    medium(guests, tmp_path, "unsigned", {LOADER: grub / "x86_64-efi/monolithic/grubx64.efi"})
    signed: dict[str, Path | str] = {
        LOADER: shim,
        "EFI/BOOT/grubx64.efi": grub / "x86_64-efi-signed/grubx64.efi.signed",
    }
    medium(guests, tmp_path, "signed", {**signed, "EFI/debian/grub.cfg": 'echo "signed: hello"\n'})
    disk = '[[disk]]\npath = "{}.img"\nformat = "raw"\n'
    secure = f"{UEFI}secure_boot = true\n"
    guests.write("refused", secure + disk.format("unsigned") + "readonly = true\n")
    guests.write("open", f'{UEFI}machine = "pc"\n' + disk.format("unsigned") + "readonly = true\n")
    guests.write("secure", secure + disk.format("signed"))
    guests.start("refused", "open", "secure", ready=False)
    guests.wait("refused", "Access Denied", timeout=90)
    guests.wait("secure", "signed: hello", timeout=90)
    guests.wait("open", "grub>", timeout=90)
    assert guests.host.run("ls", "/var/lib/kvmd/secure").stdout.split() == ["disks", "nvram-secure.fd"]
    guests.clear()
    guests.host.run("sh", "-c", "cd /var/lib/kvmd && rm -r images/*signed.img refused open secure")
