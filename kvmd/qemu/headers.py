"""What an image's header says: what lies below it, what lies beside it, how large its disk is. Pure.

Only what names other files is read, so that they are opened by whom the administrator named, and by nobody else.
Sources: QEMU's docs/interop/qcow2.txt and qed_spec.txt, block/qcow.c and vmdk.c; VMware's Virtual Disk Format 5.0.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

LENGTH = 64 << 10  # bytes of a file's beginning that are looked at: all names lie there
SECTOR = 512
MOST_EXTENTS = 64
LONGEST_NAME = 1023  # qcow2.txt: of a backing file

QCOW2_DATA_FILE = 1 << 2  # incompatible feature
QCOW2_END, QCOW2_BACKING_FORMAT = 0, 0xE2792ACA  # header extensions
QED_BACKING_FILE, QED_BACKING_RAW = 1 << 0, 1 << 2

DESCRIPTOR = b"# Disk DescriptorFile"
_EXTENT = re.compile(rb'RW\s+[+-]?0*[1-9]\d*\s+(?:FLAT|SPARSE|VMFS|VMFSSPARSE|SESPARSE)\s*"([^"\r\n]{1,511})"')
_PARENT = re.compile(rb'parentFileNameHint\s*=\s*"([^"\r\n]*)"')


UNMARKED = ("raw", "vpc")  # a VPC image of fixed size has its mark at the end
_MARKS = (
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"QED\0", "qed"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (64, b"\x7f\x10\xda\xbe", "vdi"),
)


class BadHeader(ValueError):
    """What is wrong with it, to follow the image's name: "is no qcow2"."""


@dataclass(frozen=True)
class Header:
    """``backing_format``: "" where the header leaves QEMU to guess. ``size`` of the disk in bytes, if it is known."""

    backing: str = ""
    backing_format: str = ""
    extents: tuple[str, ...] = ()
    size: int | None = None


def format_of(data: bytes) -> str:
    """The format that the beginning of a file bears the mark of, or "": raw."""
    if data.startswith(b"QFI\xfb"):
        return "qcow" if data[4:8] == bytes((0, 0, 0, 1)) else "qcow2"
    if data.lstrip(b"\t\n\v\f\r ").startswith(DESCRIPTOR):
        return "vmdk"
    return next((format for at, mark, format in _MARKS if data[at:].startswith(mark)), "")


def parse(format: str, data: bytes) -> Header:
    """The header of an image of this format from the file's beginning. Raises ``BadHeader``."""
    if format not in UNMARKED and format_of(data) != format:
        raise BadHeader(f"is no {format}")
    try:
        return _PARSERS[format](data) if format in _PARSERS else Header()
    except (struct.error, UnicodeDecodeError) as error:
        raise BadHeader(f"has a damaged {format} header") from error


def _name(data: bytes, offset: int, length: int) -> str:
    if length > LONGEST_NAME or offset + length > len(data):
        raise BadHeader("has a damaged header: the name of its backing file lies outside of it")
    name = data[offset : offset + length].decode()
    if "\0" in name:
        raise BadHeader("names a backing file with a NUL character in it")
    return name


def _qcow(data: bytes) -> Header:
    offset, length, _mtime, size = struct.unpack_from(">QIIQ", data, 8)
    return Header(_name(data, offset, length) if offset else "", size=size)


def _qcow2(data: bytes) -> Header:
    version, offset, length, _bits, size = struct.unpack_from(">IQIIQ", data, 4)
    incompatible, header_length = 0, 72
    if version >= 3:
        incompatible, header_length = struct.unpack_from(">Q20xI", data, 72)
    if incompatible & QCOW2_DATA_FILE:
        raise BadHeader("keeps its data in another file, which kvmd does not open (qemu-img convert makes it one file)")
    if not offset:
        return Header(size=size)
    return Header(_name(data, offset, length), _qcow2_backing_format(data, header_length), size=size)


def _qcow2_backing_format(data: bytes, at: int) -> str:
    while at + 8 <= len(data):
        kind, length = struct.unpack_from(">II", data, at)
        if kind == QCOW2_END:
            break
        if kind == QCOW2_BACKING_FORMAT:
            return data[at + 8 : at + 8 + length].decode()
        at += 8 + (length + 7 & ~7)
    return ""


def _qed(data: bytes) -> Header:
    features, size, offset, length = struct.unpack_from("<Q24xQII", data, 16)
    if not features & QED_BACKING_FILE:
        return Header(size=size)
    return Header(_name(data, offset, length), "raw" if features & QED_BACKING_RAW else "", size=size)


def _vmdk(data: bytes) -> Header:
    """A descriptor names extents; a sparse file has one within it, whose extent is the file itself."""
    if data[:4] == b"COWD":
        return Header()
    if data[:4] != b"KDMV":
        return _vmdk_descriptor(data)
    capacity, _grain, at, length = struct.unpack_from("<QQQQ", data, 12)
    if not capacity:
        raise BadHeader("is a vmdk with its extents elsewhere (qemu-img convert makes it one file)")
    inner = data[at * SECTOR : (at + length) * SECTOR] if at else b""
    if at and len(inner) < length * SECTOR:
        raise BadHeader("has a damaged vmdk header: its descriptor lies outside of it")
    return Header(_parent(inner), "vmdk", size=capacity * SECTOR)


def _vmdk_descriptor(data: bytes) -> Header:
    if len(data) >= LENGTH:
        raise BadHeader("is a vmdk descriptor of 64 KiB and more")
    return Header(_parent(data), "vmdk", tuple(_extents(data)))


def _extents(descriptor: bytes) -> Iterator[str]:
    """As vmdk_parse_extents() has them: it looks for one at each line, and takes line ends for spaces."""
    found, end = 0, 0
    while (at := descriptor.find(b"RW", end)) >= 0:
        gap = descriptor[end:at]
        blank = gap[len(gap.rstrip()) :]
        lines = blank.count(b"\n") + (len(blank) == at)
        extent = _EXTENT.match(descriptor, at) if lines else None
        for _ in range(lines if extent else 0):
            found += 1
            if found > MOST_EXTENTS:
                raise BadHeader(f"is a vmdk of more than {MOST_EXTENTS} extents")
            yield extent[1].decode() if extent else ""
        end = at + 2


def _parent(descriptor: bytes) -> str:
    match = _PARENT.search(descriptor)
    return match[1].decode() if match else ""


_PARSERS = {"qcow": _qcow, "qcow2": _qcow2, "qed": _qed, "vmdk": _vmdk}
