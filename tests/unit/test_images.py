"""Images nobody vouches for: headers that name others' files, links, pipes; made by qemu-img where it makes them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvmd.errors import StartFailed
from kvmd.guest import BACKED_FORMATS, FORMATS, Disk
from kvmd.qemu import files, headers, images, used
from kvmd.qemu.process import Descriptors, User
from kvmd.qemu.used import Used, forget_all_but

needs_qemu = pytest.mark.skipif(not shutil.which("qemu-img"), reason="qemu-img is not installed")
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")

MEGABYTE = 1 << 20
STRANGER = 1_000_000


def qemu_img(*words: str | Path) -> None:
    subprocess.run(["qemu-img", *words], check=True, stdout=subprocess.DEVNULL)


def make(path: Path, format: str = "qcow2", *options: str | Path, size: str = "8M") -> Path:
    qemu_img("create", "-q", "-f", format, *options, path, size)
    return path


@pytest.fixture
def opened() -> Iterator[Descriptors]:
    with Descriptors() as descriptors:
        yield descriptors


def refusal(disk: Disk) -> str:
    with Descriptors() as descriptors, pytest.raises(StartFailed) as refused:
        images.open_disk(disk, descriptors)
    return str(refused.value)


def names(layers: list[Any]) -> list[str]:
    return [Path(f"/proc/self/fd/{layer.fd}").readlink().name for layer in layers]


# --- headers ----------------------------------------------------------------------------------------------------------


@needs_qemu
@pytest.mark.parametrize("format", [format for format in FORMATS if format not in headers.UNMARKED])
def test_every_format_is_known_by_its_mark(tmp_path: Path, format: str) -> None:
    data = make(tmp_path / "disk", format).read_bytes()[: headers.LENGTH]
    assert headers.format_of(data) == format
    assert headers.parse(format, data).backing == ""
    assert headers.parse(format, data).size in (8 * MEGABYTE, None)
    for other in FORMATS:
        if other not in (format, *headers.UNMARKED):
            with pytest.raises(headers.BadHeader, match=f"is no {other}"):
                headers.parse(other, data)


@needs_qemu
@pytest.mark.parametrize("format", BACKED_FORMATS)
def test_a_backing_file_is_found_in_every_format_that_has_one(tmp_path: Path, format: str) -> None:
    below = "vmdk" if format == "vmdk" else "raw"
    make(tmp_path / "below", below)
    made = make(tmp_path / "disk", format, "-b", tmp_path / "below", "-F", below)
    header = headers.parse(format, made.read_bytes()[: headers.LENGTH])
    assert header.backing == str(tmp_path / "below")
    assert header.backing_format == {"qcow": ""}.get(format, below)
    assert header.size == 8 * MEGABYTE


@needs_qemu
@pytest.mark.parametrize("version", ["0.10", "1.1"])
def test_both_versions_of_qcow2(tmp_path: Path, version: str) -> None:
    options = ("-o", f"compat={version},cluster_size=2M", "-u", "-b", "b" * 1000, "-F", "qcow2")
    header = headers.parse("qcow2", make(tmp_path / "disk", "qcow2", *options).read_bytes()[: headers.LENGTH])
    assert (header.backing, header.backing_format) == ("b" * 1000, "qcow2")


@pytest.mark.parametrize("format", FORMATS)
def test_a_header_that_is_cut_off_or_wild_is_an_error(format: str) -> None:
    wild = {
        "qcow2": b"QFI\xfb" + struct.pack(">IQI", 3, 1 << 63, 1 << 31) + b"\xff" * 200,
        "qcow": b"QFI\xfb" + struct.pack(">IQI", 1, 60_000, 1023) + b"\xff" * 60_000,
        "qed": b"QED\0" + b"\xff" * 100,
        "vmdk": b"KDMV" + b"\xff" * 100,
    }
    if format in wild:
        for length in (4, 8, 20, 60, 100, len(wild[format])):
            with pytest.raises(headers.BadHeader):
                headers.parse(format, wild[format][:length])
    with pytest.raises(headers.BadHeader) if format not in headers.UNMARKED else Nothing():
        headers.parse(format, b"")


class Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def test_extents_are_those_that_qemu_would_open() -> None:
    """As vmdk_parse_extents(): a line end is a space, and what follows an empty line counts once more."""
    text = b'# Disk DescriptorFile\nRW 10 FLAT "a" 0\nRW\n7\nSPARSE\n"b"\n\nRW 1 VMFS "c"\nRW 0 FLAT "d" 0\nRW 5 ZERO\n'
    text += b'RDONLY 5 FLAT "e" 0\nRW 5 ODD "f"\n  RW +5 FLAT "g" 0'
    assert headers.parse("vmdk", text).extents == ("a", "b", "c", "c", "g")


@pytest.mark.parametrize(
    "descriptor",
    [b"\n" * 60_000, b" " * 60_000, (b"RW" + b"\n" * 600) * 100, b'RW 1 FLAT "x" 0\n' * 4000, b"RW " * 20_000],
)
def test_no_descriptor_takes_long(descriptor: bytes) -> None:
    """The interpreter does nothing else meanwhile."""
    before = time.thread_time()
    with contextlib.suppress(headers.BadHeader):
        headers.parse("vmdk", b"# Disk DescriptorFile\n" + descriptor)
    assert time.thread_time() - before < 0.5


# --- what a header names is not opened unless somebody else names it, too ---------------------------------------------


@needs_qemu
@pytest.mark.parametrize(
    "name",
    ["/etc/shadow", "../../../../etc/shadow", "json:{}", "nbd://127.0.0.1:1/x", "file:/etc/shadow", "below.raw"],
)
def test_what_only_the_header_names_is_not_opened(tmp_path: Path, name: str) -> None:
    make(tmp_path / "below.raw", "raw")
    disk = Disk(make(tmp_path / "disk", "qcow2", "-u", "-b", name, "-F", "raw"))
    said = refusal(disk)
    assert said.startswith(f"cannot use the disk image {disk.path}: the header of {disk.path} names {name!a} below it")
    hint = ", which is no file" if ":" in name else " (if the guest may read that file: backing = ['"
    assert hint in said


@needs_qemu
def test_what_the_guest_file_names_is_opened(tmp_path: Path, opened: Descriptors) -> None:
    (tmp_path / "a").mkdir()
    lowest = make(tmp_path / "a/lowest.raw", "raw")
    middle = make(tmp_path / "a/middle.qcow2", "qcow2", "-b", "lowest.raw", "-F", "raw")
    disk = Disk(make(tmp_path / "disk", "qcow2", "-b", "a/middle.qcow2", "-F", "qcow2"))
    assert "middle.qcow2" in refusal(disk)
    assert "lowest.raw" in refusal(replace(disk, base=middle))
    for allowed in (replace(disk, base=middle, backing=(lowest,)), replace(disk, backing=(middle, lowest))):
        layers = images.open_disk(allowed, opened)
        assert names(layers) == ["disk", "middle.qcow2", "lowest.raw"]
        assert [layer.format for layer in layers] == ["qcow2", "qcow2", "raw"]


@needs_qemu
def test_what_lies_among_the_images_is_opened(
    tmp_path: Path, opened: Descriptors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "IMAGES", tmp_path)
    make(tmp_path / "below.raw", "raw")
    disk = Disk(make(tmp_path / "disk", "qcow2", "-b", "below.raw", "-F", "raw"))
    assert names(images.open_disk(disk, opened)) == ["disk", "below.raw"]
    qemu_img("rebase", "-u", "-b", f"{tmp_path}/../{tmp_path.name}/../secret", "-F", "raw", disk.path)
    assert "(if the guest may read that file" in refusal(disk)


@needs_qemu
def test_no_format_is_guessed(tmp_path: Path, opened: Descriptors) -> None:
    below = make(tmp_path / "below", "raw")
    disk = Disk(make(tmp_path / "disk", "qcow", "-b", below, "-F", "raw"), format="qcow", backing=(below,))
    assert f"no format for it, and none is guessed (qemu-img rebase -u -b '{below}' -F FORMAT" in refusal(disk)
    layers = images.open_disk(replace(disk, base=below, base_format="raw"), opened)
    assert [layer.format for layer in layers] == ["qcow", "raw"]
    qemu_img("create", "-q", "-f", "qcow2", below, "1M")  # as its former guest may have done
    said = refusal(replace(disk, base=below, base_format="raw"))
    assert said.endswith('begins as qcow2 does, but counts as raw (if it is one: base_format = "qcow2")')
    said = refusal(Disk(make(tmp_path / "plain", "raw")))
    assert said == f'cannot use the image {tmp_path}/plain: it is no qcow2 (if it is one: format = "raw")'


@needs_qemu
def test_a_raw_disk_that_does_not_look_raw_is_doubted(tmp_path: Path, opened: Descriptors) -> None:
    for path, doubts in ((make(tmp_path / "a"), True), (make(tmp_path / "b", "raw"), False)):
        disk = Disk(path, format="raw")
        assert ('format = "qcow2"' in "".join(images.doubts(disk, images.open_disk(disk, opened)))) == doubts
    disk = Disk(tmp_path / "a")
    assert list(images.doubts(disk, images.open_disk(disk, opened))) == []


@needs_qemu
@pytest.mark.parametrize("format", ["qcow2", "raw", "vmdk"])
def test_a_size_that_the_image_does_not_have(tmp_path: Path, format: str, opened: Descriptors) -> None:
    disk = Disk(make(tmp_path / "disk", format), 9 * MEGABYTE, format)
    [doubt] = images.doubts(disk, images.open_disk(disk, opened))
    assert f"has {8 * MEGABYTE} bytes, not {9 * MEGABYTE}: one that exists does not grow (qemu-img resize -f" in doubt
    for size in (None, 7 * MEGABYTE, 8 * MEGABYTE):
        same = replace(disk, size=size)
        assert list(images.doubts(same, images.open_disk(same, opened))) == []


@needs_qemu
def test_a_chain_that_goes_round_or_on_and_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "IMAGES", tmp_path)
    make(tmp_path / "a", "qcow2", "-u", "-b", "b", "-F", "qcow2")
    make(tmp_path / "b", "qcow2", "-u", "-b", "a", "-F", "qcow2")
    assert f"goes round, at {tmp_path}/a" in refusal(Disk(tmp_path / "a"))
    monkeypatch.setattr(images, "LONGEST_CHAIN", 1)
    assert "more than 1 images" in refusal(Disk(tmp_path / "a"))


@needs_qemu
def test_data_in_another_file(tmp_path: Path) -> None:
    disk = Disk(make(tmp_path / "disk", "qcow2", "-o", f"data_file={tmp_path}/data"))
    assert "it keeps its data in another file" in refusal(disk)


@needs_qemu
@pytest.mark.parametrize("name", ["/etc/shadow", "../x", "a/b", "json:{}", "nbd:x:1"])
def test_extents_elsewhere(tmp_path: Path, name: str) -> None:
    disk = Disk(make(tmp_path / "disk.vmdk", "vmdk", "-o", "subformat=monolithicFlat"), format="vmdk")
    disk.path.write_text(disk.path.read_text().replace("disk-flat.vmdk", name))
    assert refusal(disk).endswith(f"its extent {name!a} is no file beside it")


@needs_qemu
def test_extents_beside_it(tmp_path: Path, opened: Descriptors) -> None:
    disk = Disk(make(tmp_path / "disk.vmdk", "vmdk", "-o", "subformat=twoGbMaxExtentFlat", size="3G"), format="vmdk")
    [layer] = images.open_disk(disk, opened)
    assert [Path(f"/proc/self/fd/{fd}").readlink().name for fd in layer.extents] == [
        "disk-f001.vmdk",
        "disk-f002.vmdk",
    ]


@pytest.mark.parametrize(("mode", "then"), [(0o644, 0o640), (0o666, 0o660), (0o600, 0o600)])
def test_a_disk_is_not_for_everybody_to_read(tmp_path: Path, mode: int, then: int, opened: Descriptors) -> None:
    """Every other QEMU of the host is among these. What is only read is left alone."""
    (tmp_path / "disk").write_bytes(bytes(512))
    (tmp_path / "disk").chmod(mode)
    disk = Disk(tmp_path / "disk", format="raw")
    images.open_disk(replace(disk, readonly=True), opened)
    assert disk.path.stat().st_mode & 0o777 == mode
    images.open_disk(disk, opened)
    assert disk.path.stat().st_mode & 0o777 == then


# --- what there is instead of a file ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fifo", "directory", "socket", "device"])
def test_neither_file_nor_block_device(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "disk"
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case "socket":
            import socket

            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(path))
        case "device":
            path = Path("/dev/zero")
    for write in (False, True):
        with pytest.raises(StartFailed, match=f"the kernel {path}: it is neither a file nor a block device"):
            files.open_file(path, "kernel", write=write)


@needs_root
def test_links(tmp_path: Path) -> None:
    """Root's lead anywhere, a stranger's to their own files only, in the middle of a path, too."""
    tmp_path.chmod(0o755)
    for name, owner in (("root", 0), ("theirs", STRANGER)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
        os.chown(tmp_path / name / "file", owner, owner)
    for link, target, owner in (
        ("by-root", "theirs/file", 0),
        ("by-them", "theirs/file", STRANGER),
        ("to-root", "root/file", STRANGER),
        ("way", tmp_path / "root", STRANGER),
        ("way-by-root", "root/../root", 0),
        ("round", "round", 0),
    ):
        (tmp_path / link).symlink_to(target)
        os.lchown(tmp_path / link, owner, owner)
    for good in ("by-root", "by-them", "way-by-root/file"):
        os.close(files.open_file(tmp_path / good, "CD image"))
    for bad in ("to-root", "way/file"):
        with pytest.raises(StartFailed, match=f"a link of user {STRANGER} leads there, to a file of user 0"):
            files.open_file(tmp_path / bad, "CD image")
    with pytest.raises(StartFailed, match="Too many levels of symbolic links"):
        files.open_file(tmp_path / "round", "CD image")
    with pytest.raises(StartFailed, match="No such file"):
        files.open_file(tmp_path / "none", "CD image")


@needs_root
def test_a_kernel_is_copied_within_bounds(tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(b"k" * MEGABYTE)
    kernel.chmod(0o600)
    fd = files.open_readable(kernel, "kernel", MEGABYTE)
    assert os.pread(fd, 2 * MEGABYTE, 0) == b"k" * MEGABYTE
    assert os.fstat(fd).st_mode & 0o777 == 0o444
    os.close(fd)
    os.truncate(kernel, MEGABYTE + 1)
    with pytest.raises(StartFailed, match="only a file of at most 1 MiB is copied"):
        files.open_readable(kernel, "kernel", MEGABYTE)
    kernel.chmod(0o644)
    fd = files.open_readable(kernel, "kernel", MEGABYTE)
    assert os.fstat(fd).st_ino == kernel.stat().st_ino
    os.close(fd)


# --- used before ------------------------------------------------------------------------------------------------------


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(used, "STATE", tmp_path / "state")
    (tmp_path / "state").mkdir()
    return tmp_path / "state"


def use(disk: Disk) -> str:
    known = Used("web")
    with Descriptors() as descriptors:
        doubt = known.note(disk, images.open_disk(disk, descriptors))
    assert known.save() == ""
    return doubt


@needs_qemu
def test_what_has_been_used_is_not_made_anew(tmp_path: Path, state: Path) -> None:
    disk = Disk(make(tmp_path / "disk"), MEGABYTE)
    assert use(disk) == ""
    disk.path.unlink()
    with pytest.raises(StartFailed, match=f"has gone, which this guest has used before .*: rm {state}/web/disks"):
        images.create(disk, USER, Used("web"))
    assert not disk.path.exists()
    Used("other").refuse_new(disk)
    (state / "web/disks").unlink()
    Used("web").refuse_new(disk)


@needs_qemu
def test_with_the_guest_its_images_are_forgotten(tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those on storage that is away are not: they may come back, and so may the guest."""
    disk = Disk(make(tmp_path / "disk"))
    use(disk)
    forget_all_but({"web"})
    assert (state / "web/disks").exists()
    monkeypatch.setattr(used, "_storage", lambda path: 1)
    forget_all_but(set())
    with pytest.raises(StartFailed):
        Used("web").refuse_new(disk)
    monkeypatch.undo()
    monkeypatch.setattr(used, "STATE", state)
    forget_all_but(set())
    assert list(state.iterdir()) == []


@needs_qemu
def test_what_lies_below_must_stay_what_it_was(tmp_path: Path, state: Path) -> None:
    base = make(tmp_path / "base")
    disk = Disk(make(tmp_path / "disk", "qcow2", "-b", base, "-F", "qcow2"), base=base)
    assert use(disk) == ""
    assert use(disk) == ""
    make(base)
    assert use(disk) == (
        f"what lies below the disk image {disk.path} is not what it was: the guest's data may be damaged by it"
    )


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": 1}', '{"/disk": {"below": 3}}'])
def test_a_damaged_record_stops_nobody(state: Path, text: str) -> None:
    (state / "web").mkdir()
    (state / "web/disks").write_text(text)
    Used("web").refuse_new(Disk(Path("/other")))
    forget_all_but(set())


# --- made -------------------------------------------------------------------------------------------------------------

USER = User(STRANGER, STRANGER)


@needs_qemu
@needs_root
@pytest.mark.parametrize("format", FORMATS)
def test_made_by_the_guests_user_and_then_roots(tmp_path: Path, format: str, opened: Descriptors) -> None:
    disk = Disk(tmp_path / "new/disk", 8 * MEGABYTE, format)
    images.create(disk, USER, Used("web"))
    status = disk.path.stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (0, 0, 0o600)
    assert [path.name for path in disk.path.parent.iterdir()] == ["disk"]
    assert images.open_disk(disk, opened)
    disk.path.write_bytes(b"precious")
    images.create(disk, USER, Used("web"))
    assert disk.path.read_bytes() == b"precious"


@needs_qemu
@needs_root
@pytest.mark.parametrize("format", ["qcow2", "raw"])
def test_an_overlay_is_as_large_as_its_base(tmp_path: Path, format: str, opened: Descriptors) -> None:
    base = make(tmp_path / "base", format)
    disk = Disk(tmp_path / "disk", base=base, base_format=format)
    images.create(disk, USER, Used("web"))
    assert headers.parse("qcow2", disk.path.read_bytes()).size == 8 * MEGABYTE
    assert names(images.open_disk(disk, opened)) == ["disk", "base"]


@needs_qemu
@needs_root
def test_nothing_is_made_upon_a_base_that_cannot_be_used(tmp_path: Path) -> None:
    base = make(tmp_path / "base", "qcow2", "-u", "-b", "/etc/shadow", "-F", "raw")
    disk = Disk(tmp_path / "disk", base=base)
    with pytest.raises(StartFailed, match=r"cannot create .*/base names '/etc/shadow' below it"):
        images.create(disk, USER, Used("web"))
    assert not disk.path.exists()


@needs_qemu
@needs_root
def test_an_overlay_is_not_smaller_than_its_base(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "disk", 4 * MEGABYTE, base=make(tmp_path / "base"))
    with pytest.raises(StartFailed, match=f"its size, {4 * MEGABYTE}, is less than that of its base .*{8 * MEGABYTE}"):
        images.create(disk, USER, Used("web"))
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@needs_qemu
@needs_root
def test_the_longest_name(tmp_path: Path) -> None:
    disk = Disk(tmp_path / ("n" * 255), MEGABYTE)
    images.create(disk, USER, Used("web"))
    assert disk.path.exists()


@needs_root
def test_in_a_strangers_directory(tmp_path: Path) -> None:
    """No link there is followed, no other name is touched; what a killed daemon left is removed."""
    os.chown(tmp_path, STRANGER, STRANGER)
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / ".disk.new").symlink_to(victim)
    mark = hashlib.sha256(b"disk").hexdigest()[:16]
    (tmp_path / f".kvmd-{mark}-{'0' * 16}").symlink_to(victim)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with files.new_file(tmp_path / "disk") as (fd, keep):
        os.write(fd, b"new")
        keep()
    assert (tmp_path / "disk").read_text() == "new"
    assert victim.read_text() == "mine"
    assert victim.stat().st_uid == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [".disk.new", "dangling", "disk", "victim"]
    images.create(Disk(tmp_path / "dangling", 8 * MEGABYTE), USER, Used("web"))
    assert (tmp_path / "dangling").is_symlink()
    (tmp_path / "way").symlink_to("/etc")
    os.lchown(tmp_path / "way", STRANGER, STRANGER)
    with pytest.raises(StartFailed, match="a link that is not root's leads to its directory"):
        images.create(Disk(tmp_path / "way/disk", 8 * MEGABYTE), USER, Used("web"))
    with pytest.raises(StartFailed, match="No such file"):
        images.create(Disk(tmp_path / "way/new/disk", 8 * MEGABYTE), USER, Used("web"))


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that everybody may pass through."""
    with tempfile.TemporaryDirectory(prefix="kvmd-") as path:
        Path(path).chmod(0o755)
        yield Path(path)


@needs_root
def test_qemu_img_is_bounded(public: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whom it runs as, what it may use, and what is said and left when it does not end."""
    fake = public / "qemu-img"
    monkeypatch.setattr(images, "ENVIRONMENT", {"PATH": f"{public}:/usr/bin:/bin"})
    disk = Disk(public / "disk", 8 * MEGABYTE)
    said = {
        "echo $(id -u) $(id -G) $(ulimit -v) $(ulimit -t) >&2; exit 1": rf"{STRANGER} {STRANGER} 1048576 30$",
        "kill -9 $$": r"killed by signal 9 \(it may use 1 GiB of memory and 30 s\)",
        "exec sleep 60": r"did not end within 0.3 s",
    }
    for script, sentence in said.items():
        monkeypatch.setattr(images, "PATIENCE", 0.3 if "sleep" in script else 60)
        fake.write_text(f"#!/bin/sh\n{script}\n")
        fake.chmod(0o755)
        with pytest.raises(StartFailed, match=sentence):
            images.create(disk, USER, Used("web"))
    fake.unlink()
    (public / "prlimit").symlink_to("/usr/bin/prlimit")
    monkeypatch.setattr(images, "ENVIRONMENT", {"PATH": str(public)})
    with pytest.raises(StartFailed, match="there is no qemu-img"):
        images.create(disk, USER, Used("web"))
    assert [path.name for path in public.iterdir()] == ["prlimit"]
