"""UEFI firmware, opened by root: Debian's code, and the guest's own variables in /var/lib/kvmd/NAME.

Variables made for one code are of no use to the other: with Secure Boot the guest has a second file. They stay when
the guest's file goes, as they may hold keys.
"""

from __future__ import annotations

import os
from pathlib import Path

from kvmd.errors import StartFailed
from kvmd.guest import Guest
from kvmd.qemu.files import new_file, open_file
from kvmd.qemu.firmware import Firmware
from kvmd.qemu.process import Descriptors
from kvmd.qemu.used import STATE, Used

# Of Debian's package ovmf, by secure_boot: the code, what its variables begin as, and the guest's file. The 4M builds
# are in every release; their variables have the same size and layout from one to the next.
OVMF = Path("/usr/share/OVMF")
FILES = {
    False: ("OVMF_CODE_4M.fd", "OVMF_VARS_4M.fd", "nvram.fd"),
    True: ("OVMF_CODE_4M.secboot.fd", "OVMF_VARS_4M.ms.fd", "nvram-secure.fd"),
}


def open_firmware(guest: Guest, descriptors: Descriptors, used: Used) -> tuple[Firmware, str]:
    """With fresh variables where there are none. What a person should know, or "". Raises ``StartFailed``."""
    *parts, name = FILES[guest.secure_boot]
    code, template = (OVMF / part for part in parts)
    for path in (code, template):
        if not path.exists():
            raise StartFailed(f"there is no UEFI firmware {path} (install ovmf)")
    nvram, lost = STATE / guest.name / name, ""
    fresh = open_file(template, "UEFI firmware")
    try:
        if not os.path.lexists(nvram):
            _make(nvram, fresh)
            if used.before(nvram):
                lost = f"its UEFI variables {nvram} have gone, boot entries and keys among them: it has fresh ones now"
        fd = descriptors.take(open_file(nvram, "NVRAM", write=True))
        size, right = os.fstat(fd).st_size, os.fstat(fresh).st_size
    finally:
        os.close(fresh)
    if size != right:
        hint = "put it back from a backup, or remove it: the guest gets a fresh one"
        raise StartFailed(f"the NVRAM {nvram} is damaged: it has {size} bytes, not {right} ({hint})")
    used.note_state(nvram)
    return Firmware(descriptors.take(open_file(code, "UEFI firmware")), fd), lost


def _make(nvram: Path, template: int) -> None:
    """Whole, or not at all. Raises ``StartFailed``."""
    try:
        with new_file(nvram) as (fd, place):
            size, copied = os.fstat(template).st_size, 0
            while copied < size and (count := os.sendfile(fd, template, copied, size - copied)):
                copied += count
            os.fsync(fd)
            place()
    except OSError as error:
        raise StartFailed(f"cannot make the NVRAM {nvram}: {error.strerror}") from error
    except StartFailed as error:
        raise StartFailed(f"cannot make the NVRAM {nvram}: {error}") from error
