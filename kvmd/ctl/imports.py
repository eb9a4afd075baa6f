"""import: a guest file from what another tool has, and a line for each thing that stays behind."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from kvmd.ctl.failure import FAILED, Failure
from kvmd.ctl.files import NAME, problems, write
from kvmd.ctl.foreign import command, libvirt, proxmox, quickemu
from kvmd.ctl.foreign.draft import SUFFIXES, Draft, NotReadable, backing_of, format_of, name_of, render, settle

MOST = 1 << 20  # bytes of a source
BEGINNING = 64 << 10  # bytes of an image; the name of its backing file lies in its first cluster


async def run(arguments: argparse.Namespace) -> int:
    where = arguments.source if arguments.source != "-" else "the standard input"
    text = _text(arguments.source)
    beside = str(Path.cwd() if arguments.source == "-" else Path(arguments.source).absolute().parent)
    try:
        draft, origin = understand(text, str(Path.cwd()), beside, is_command=arguments.command)
    except NotReadable as error:
        raise Failure(f"{where}: {error}") from error
    draft.name = arguments.name or name_of(draft.name or Path(arguments.source).stem.strip("-"), draft)
    look_at_images(draft)
    settle(draft)
    content = render(draft, origin)
    if not arguments.json:
        for line in draft.missed:
            print(f"{Path(where).name}: {line}", file=sys.stderr)
    if not NAME.fullmatch(draft.name):
        raise Failure(f"{draft.name!r} cannot be the name of a guest (letters, digits and _ . - only, at most 63)")
    if arguments.print_only:
        return _show(arguments, draft, content)
    path = write(draft.name, content)
    print(json.dumps({"file": str(path), "missed": draft.missed}) if arguments.json else path)
    return 0


def _show(arguments: argparse.Namespace, draft: Draft, content: str) -> int:
    found = problems(draft.name, content)
    if arguments.json:
        print(json.dumps({"name": draft.name, "text": content, "missed": draft.missed, "problems": found}))
    else:
        print(content, end="")
        for line in found:
            print(line, file=sys.stderr)
    return FAILED if found else 0


def _text(source: str) -> str:
    """Raises ``Failure``."""
    try:
        if source == "-":
            raw = sys.stdin.buffer.read(MOST + 1)
        else:
            with Path(source).open("rb") as file:
                raw = file.read(MOST + 1)
        if len(raw) > MOST:
            raise Failure(f"{source} is larger than {MOST >> 20} MiB (is it what another tool has of one guest?)")
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Failure(f"{source} is not UTF-8 (is it an image?)") from error
    except OSError as error:
        raise Failure(f"cannot read {source}: {error.strerror}") from error


def understand(text: str, here: str, beside: str, *, is_command: bool = False) -> tuple[Draft, str]:
    """The draft, and what it is from, which the text tells. Raises ``NotReadable``.

    Relative paths of a command line are those of the caller, ``here``; quickemu's are ``beside`` its file.
    """
    environment = {name: os.environ[name] for name in ("HOME", "USER", "PWD") if name in os.environ}
    if is_command:
        return command.read(text, here, environment), "a command line"
    if text.lstrip().startswith("<"):
        return libvirt.read(text), "libvirt"
    if proxmox.KNOWN.search(text):
        return proxmox.read(text), "Proxmox"
    if quickemu.KNOWN.search(text):
        return quickemu.read(text, beside, environment), "quickemu"
    try:
        return command.read(text, here, environment), "a command line"
    except NotReadable as error:
        what = "it is neither libvirt XML nor a .conf of Proxmox or quickemu, nor a command line"
        raise NotReadable(f"{what} of kvm or qemu-system") from error


def look_at_images(draft: Draft) -> None:
    """What a disk's format is where its source did not say, and whether it is there."""
    for disk in draft.disks:
        path = str(disk["path"])
        beginning, why = _beginning(path)
        if "format" not in disk:
            suffix = SUFFIXES.get(path.rpartition(".")[2].lower(), "")
            disk["format"] = guess = format_of(beginning) if beginning else suffix or "qcow2"
            by = "it begins as one" if beginning else "its name ends so" if suffix else "kvmd's default"
            draft.miss(f"{path}: format", f"it is not said; {guess} here, as {by}", f"qemu-img info {path}")
        if why and "size" not in disk:
            draft.miss(path, f"this host does not show it: {why}", "bring the image there, or change path")
        below = backing_of(beginning)
        if below and "backing" not in disk and disk["format"] in ("qcow", "qcow2"):
            todo = f"if you trust it: backing = [{json.dumps(below)}]"
            draft.miss(
                f"{path}: backing file {below}",
                "only the image says so",
                todo,
            )


def _beginning(path: str) -> tuple[bytes, str]:
    """Of an image, or why it cannot be read."""
    try:
        if not (Path(path).is_file() or Path(path).is_block_device()):
            return b"", "no such file" if not os.path.lexists(path) else "not an image"
        with Path(path).open("rb") as file:
            return file.read(BEGINNING), ""
    except OSError as error:
        return b"", error.strerror or "unreadable"
