"""UEFI firmware and TPM as QEMU's arguments."""

from __future__ import annotations

import json
from dataclasses import dataclass

from kvmd.guest import Guest

# Of the sets of descriptors (-add-fd): far from those of drives, which are counted from 1.
CODE_SET, NVRAM_SET = 3_000_000, 3_000_001


@dataclass(frozen=True, slots=True)
class Firmware:
    """UEFI: the descriptors of its code, read-only, and of the guest's own variables, open for writing."""

    code: int
    nvram: int


def firmware_args(guest: Guest, firmware: Firmware) -> list[str]:
    """Two flash chips. What QEMU is told of the machine elsewhere is kept: several ``-machine`` add up."""
    args: list[str] = []
    chips = (("code", CODE_SET, firmware.code, True), ("nvram", NVRAM_SET, firmware.nvram, False))
    for name, number, fd, readonly in chips:
        file = {"driver": "file", "node-name": f"{name}-file", "filename": f"/dev/fdset/{number}"}
        raw = {"driver": "raw", "node-name": name, "file": f"{name}-file"}
        args += ["-add-fd", f"set={number},fd={fd}"]
        args += [word for node in (file, raw) for word in ("-blockdev", json.dumps(node | {"read-only": readonly}))]
    machine = "pflash0=code,pflash1=nvram"
    if guest.secure_boot:  # only system management mode may write to the variables
        args += ["-global", "driver=cfi.pflash01,property=secure,value=on"]
        machine += ",smm=on"
    return [*args, "-machine", machine]


def tpm_args(fd: int) -> list[str]:
    """``fd``: a stream to swtpm's control channel."""
    return [
        "-chardev", f"socket,id=tpm0,fd={fd}",
        "-tpmdev", "emulator,id=tpm0,chardev=tpm0",
        "-device", "tpm-crb,tpmdev=tpm0",
    ]  # fmt: skip
