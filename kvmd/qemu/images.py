"""Disk images: created where the file asks for it, opened as root, handed to QEMU as descriptors."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

from kvmd.errors import StartFailed
from kvmd.guest import Disk


async def _qemu_img(*arguments: str) -> bytes:
    try:
        process = await asyncio.create_subprocess_exec(
            "qemu-img",
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except FileNotFoundError as error:
        raise StartFailed("there is no qemu-img (install qemu-utils)") from error
    output, errors = await process.communicate()
    if process.returncode:
        reason = errors.decode(errors="replace").strip().splitlines() or ["no reason given"]
        raise StartFailed(reason[-1].removeprefix("qemu-img: "))
    return output


async def create(disk: Disk) -> None:
    """Create the image where it is missing and the file gives ``size`` or ``base``; never touch one that is there.

    Raises ``StartFailed``; nothing half made is left.
    """
    if disk.path.exists():
        return
    if disk.size is None and disk.base is None:
        raise StartFailed(f"there is no disk image {disk.path} (put it there, or give the disk a size to create it)")
    backing: list[str] = []
    if disk.base is not None:
        base = json.loads(await _qemu_img("info", "--output=json", str(disk.base)))
        backing = ["-b", str(disk.base), "-F", base["format"]]
    size = [] if disk.size is None else [str(disk.size)]
    new = disk.path.with_name(f".{disk.path.name}.new")
    try:
        disk.path.parent.mkdir(parents=True, exist_ok=True)
        await _qemu_img("create", "-q", "-f", disk.format, *backing, str(new), *size)
        new.chmod(0o600)
        new.rename(disk.path)
    except OSError as error:
        raise StartFailed(f"cannot create the disk image {disk.path}: {error.strerror}") from error
    except StartFailed as error:
        raise StartFailed(f"cannot create the disk image {disk.path}: {error}") from error
    finally:
        new.unlink(missing_ok=True)


def open_file(path: Path, what: str, *, write: bool = False) -> int:
    """A descriptor of the file. Raises ``StartFailed``."""
    try:
        return os.open(path, (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC)
    except OSError as error:
        raise StartFailed(f"cannot open the {what} {path}: {error.strerror}") from error


def open_readable(path: Path, what: str) -> int:
    """A descriptor that QEMU's user can open again through /proc/self/fd: of the file, or of a copy in memory."""
    fd = open_file(path, what)
    status = os.fstat(fd)
    if status.st_mode & 0o004:
        return fd
    copy = os.memfd_create(path.name, os.MFD_CLOEXEC)
    os.fchmod(copy, 0o444)
    while os.sendfile(copy, fd, None, status.st_size):
        pass
    os.close(fd)
    return copy


async def chain(disk: Disk) -> list[tuple[Path, str]]:
    """The image and, below it, those that back it: path and format of each."""
    if disk.format == "raw":
        return [(disk.path, "raw")]
    try:
        output = await _qemu_img("info", "-U", "--backing-chain", "--output=json", "-f", disk.format, str(disk.path))
    except StartFailed as error:
        raise StartFailed(f"cannot use the disk image {disk.path}: {error}") from error
    images: list[dict[str, Any]] = json.loads(output)
    return [(Path(image["filename"]), image["format"]) for image in images]
