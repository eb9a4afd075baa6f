"""Disk images: created where the file asks for it, opened by root, handed to QEMU as descriptors.

No image is believed. What its header names below it is opened only if the guest file names it, too, or if it lies in
/var/lib/kvmd/images; no format is guessed. All of it blocks as long as the storage takes: it is for a thread.
"""

from __future__ import annotations

import os
import re
import stat
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from kvmd.errors import StartFailed
from kvmd.guest import FORMATS, IMAGES, Disk
from kvmd.qemu import headers
from kvmd.qemu.drives import Layer
from kvmd.qemu.files import new_file, open_file
from kvmd.qemu.headers import BadHeader, Header
from kvmd.qemu.process import ENVIRONMENT, Descriptors, User
from kvmd.qemu.used import Used

LONGEST_CHAIN = 64  # images
MEMORY, SECONDS = 1 << 30, 30  # of qemu-img: bytes, and processor time
PATIENCE = 60.0  # seconds for it, storage included

_PROTOCOL = re.compile(r"[^/]*:")  # path_has_protocol() of QEMU's block.c


def open_disk(disk: Disk, descriptors: Descriptors) -> list[Layer]:
    """The image and, below it, those that back it. What a guest writes is not for everybody to read from now on.

    Raises ``StartFailed``.
    """
    return _open_chain(disk, disk.path, disk.format, descriptors)


def doubts(disk: Disk, layers: list[Layer]) -> Iterator[str]:
    """What is odd about a disk that can be used all the same: sentences."""
    top = layers[0]
    data = _beginning(top.fd)
    if disk.format == "raw" and (found := headers.format_of(data)):
        hint = f'if it is one: format = "{found}"'
        yield f"the disk image {disk.path} is used as raw, but begins as {found} does ({hint})"
    size = os.lseek(top.fd, 0, os.SEEK_END) if disk.format == "raw" else headers.parse(disk.format, data).size
    if disk.size and size and disk.size > size:
        hint = f"qemu-img resize -f {disk.format} {disk.path} {disk.size} while the guest is off"
        yield f"the disk image {disk.path} has {size} bytes, not {disk.size}: one that exists does not grow ({hint})"


def _open_chain(disk: Disk, path: Path, format: str, descriptors: Descriptors) -> list[Layer]:
    """From ``path`` on, which is the disk's image or its base."""
    layers: list[Layer] = []
    seen: set[tuple[int, int]] = set()
    while True:
        above = path == disk.path
        what, write = ("disk image", not disk.readonly) if above else ("backing image", False)
        fd = descriptors.take(open_file(path, what, write=write))
        status = os.fstat(fd)
        if write and stat.S_ISREG(status.st_mode) and status.st_mode & stat.S_IRWXO:
            with suppress(OSError):  # another's file, which they may show to whom they like
                os.fchmod(fd, stat.S_IMODE(status.st_mode) & ~stat.S_IRWXO)
        identity = (status.st_dev, status.st_ino)
        if identity in seen or len(seen) >= LONGEST_CHAIN:
            reason = "goes round" if identity in seen else f"has more than {LONGEST_CHAIN} images"
            raise StartFailed(f"cannot use the disk image {disk.path}: its backing chain {reason}, at {path}")
        seen.add(identity)
        header = _header(disk, path, format, fd)
        beside = [_beside(path, name) for name in header.extents]
        extents = tuple(descriptors.take(open_file(extent, "extent", write=write)) for extent in beside)
        layers.append(Layer(fd, format, extents))
        if not header.backing:
            return layers
        path, format = _below(disk, path, header)


def _beginning(fd: int) -> bytes:
    return os.pread(fd, headers.LENGTH, 0)


def _header(disk: Disk, path: Path, format: str, fd: int) -> Header:
    """Raises ``StartFailed`` where it is not of this format."""
    try:
        data = _beginning(fd)
    except OSError as error:
        raise StartFailed(f"cannot read the image {path}: {error.strerror}") from error
    found = headers.format_of(data)
    try:
        if format == "raw" and found and path != disk.path:  # by whom it was written: perhaps by a guest
            raise BadHeader(f"begins as {found} does, but counts as raw")
        return headers.parse(format, data)
    except BadHeader as error:
        key = {disk.path: "format", disk.base: "base_format"}.get(path)
        hint = f' (if it is one: {key} = "{found or "raw"}")' if key and found != format else ""
        raise StartFailed(f"cannot use the image {path}: it {error}{hint}") from error


def _below(disk: Disk, path: Path, header: Header) -> tuple[Path, str]:
    """Path and format of what the header of ``path`` names. Raises ``StartFailed`` if it may not be opened."""
    name = header.backing
    refusal = f"cannot use the disk image {disk.path}: the header of {path} names {name!a} below it"
    if _PROTOCOL.match(name):
        raise StartFailed(f"{refusal}, which is no file")
    below = Path(os.path.normpath(path.parent / name))
    is_base = disk.base is not None and os.path.realpath(below) == os.path.realpath(disk.base)
    if not (is_base or below in disk.backing or below.is_relative_to(IMAGES)):
        raise StartFailed(f"{refusal} (if the guest may read that file: backing = [{str(below)!a}] under [[disk]])")
    format = header.backing_format or (disk.base_format if is_base else "")
    if format not in FORMATS:
        hint = f"qemu-img rebase -u -b {name!a} -F FORMAT {path}"
        raise StartFailed(f"{refusal}, but no format for it, and none is guessed ({hint})")
    return below, format


def _beside(path: Path, name: str) -> Path:
    """An extent: a file in the image's own directory. Raises ``StartFailed``."""
    if "/" in name or _PROTOCOL.match(name) or name in (".", ".."):
        raise StartFailed(f"cannot use the image {path}: its extent {name!a} is no file beside it")
    return path.with_name(name)


def create(disk: Disk, user: User, used: Used) -> None:
    """Create the image where it is missing and the file gives ``size`` or ``base``; never touch one that is there.

    ``user`` is whom qemu-img runs as. Raises ``StartFailed``; nothing half made is left.
    """
    if os.path.lexists(disk.path):
        return
    used.refuse_new(disk)
    if disk.size is None and disk.base is None:
        raise StartFailed(f"there is no disk image {disk.path} (put it there, or give the disk a size to create it)")
    backing: list[str] = []
    size = disk.size
    try:
        if disk.base is not None:
            base_size = _base_size(disk)
            if size is not None and size < base_size:
                raise StartFailed(f"its size, {size}, is less than that of its base {disk.base}, {base_size} bytes")
            backing = ["-u", "-b", str(disk.base), "-F", disk.base_format]
            size = size or base_size
        with new_file(disk.path) as (fd, keep):
            os.fchown(fd, user.uid, user.gid)
            _qemu_img(user, fd, "create", "-q", "-f", disk.format, *backing, f"/proc/self/fd/{fd}", str(size))
            os.fchown(fd, 0, 0)
            keep()
    except OSError as error:
        raise StartFailed(f"cannot create the disk image {disk.path}: {error.strerror}") from error
    except StartFailed as error:
        raise StartFailed(f"cannot create the disk image {disk.path}: {error}") from error


def _base_size(disk: Disk) -> int:
    """In bytes. Raises ``StartFailed``, also where the base, or what lies below it, cannot be used."""
    assert disk.base is not None
    with Descriptors() as descriptors:
        top = _open_chain(disk, disk.base, disk.base_format, descriptors)[0]
        if disk.base_format == "raw":
            return os.lseek(top.fd, 0, os.SEEK_END)
        size = headers.parse(disk.base_format, _beginning(top.fd)).size
    size = size or disk.size
    if size is None:
        raise StartFailed(f"the size of its base {disk.base} is not known (give the disk a size)")
    return size


def _qemu_img(user: User, fd: int, *arguments: str) -> None:
    """As this user, with ``fd`` and within limits. Raises ``StartFailed`` with its reason."""
    try:
        done = subprocess.run(
            ["prlimit", f"--as={MEMORY}", f"--cpu={SECONDS}", "--", "qemu-img", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=(fd,),
            user=user.uid,
            group=user.gid,
            extra_groups=(),
            cwd="/",
            env=ENVIRONMENT,
            timeout=PATIENCE,
        )
    except subprocess.TimeoutExpired as error:
        raise StartFailed(f"qemu-img did not end within {PATIENCE:g} s (does the storage answer?)") from error
    if done.returncode == 127:
        raise StartFailed("there is no qemu-img (install qemu-utils)")
    if done.returncode < 0:
        limits = f"it may use {MEMORY >> 30} GiB of memory and {SECONDS} s"
        raise StartFailed(f"qemu-img was killed by signal {-done.returncode} ({limits})")
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
        raise StartFailed(reason[-1].removeprefix("qemu-img: "))
