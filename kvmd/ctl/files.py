"""new, edit, check: guest files. What counts is what kvmd --check says of them."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from kvmd.ctl.failure import FAILED, NO_SUCH_GUEST, Failure

DIRECTORY = Path("/etc/kvmd")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
LINE = re.compile(r"(?P<file>.*?):(?P<line>[0-9]+): (?:(?P<key>[^ :]+): )?(?P<message>.*)")
MEMORY = {"windows": "4G"}


async def run(arguments: argparse.Namespace) -> int:
    match arguments.verb:
        case "check":
            return _check(arguments)
        case "edit":
            return edit(arguments.name)
        case _:
            path = write(arguments.name, compose(arguments))
            print(json.dumps({"file": str(path)}) if arguments.json else path)
            return 0


def _check(arguments: argparse.Namespace) -> int:
    if not arguments.json:
        return subprocess.run(["kvmd", "--check", *arguments.files], check=False).returncode
    done = subprocess.run(["kvmd", "--check", *arguments.files], check=False, capture_output=True, text=True)
    found = [match.groupdict() for line in done.stdout.splitlines() if (match := LINE.fullmatch(line))]
    print(json.dumps([{**problem, "line": int(problem["line"])} for problem in found]))
    return done.returncode


def compose(arguments: argparse.Namespace) -> str:
    """A guest file with its reasons beside it."""
    profile = arguments.profile or "linux"
    lines = [f"# {arguments.name}, a guest of kvmd: man kvmd.toml has all keys.", ""]
    lines += [f"memory = {_text(arguments.memory or MEMORY.get(profile, '1G'))}"]
    lines += [f"cpus = {arguments.cpus}"] if arguments.cpus else ["# cpus = 2"]
    lines += [f"profile = {_text(profile)}"] if profile != "linux" else []
    lines += [f"firmware = {_text(arguments.firmware)}"] if arguments.firmware else []
    lines += ["# autostart = true      # start it when the host boots", ""]
    disk, base = getattr(arguments, "disk", None), getattr(arguments, "base", None)
    lines += ["[[disk]]"]
    if disk:
        lines += [f"path = {_text(_here(disk))}"]
        lines += ['format = "raw"'] if Path(disk).suffix in (".img", ".raw") else []
    else:
        lines += [f"path = {_text(arguments.name + '.qcow2')}      # in /var/lib/kvmd/images; made at the first start"]
        lines += [f"base = {_text(_here(base))}"] if base else []
        lines += [f"size = {_text(arguments.size or '20G')}"]
    if cdrom := getattr(arguments, "cdrom", None) if arguments.verb == "new" else None:
        lines += ["", "[[cdrom]]", f"path = {_text(_here(cdrom))}"]
    lines += ["", "[[network]]"]
    if arguments.address:
        lines += [f"address = [{', '.join(map(_text, arguments.address))}]"]
        told = "configure = true      # tell the guest by DHCP and router advertisements"
        lines += [told] if arguments.configure else []
    else:
        lines += ['# address = ["192.0.2.42"]      # of the LAN; without one the guest reaches nothing']
    if base:
        lines += ["", "[cloud_init]", "# user_data = '''", "# #cloud-config"]
        lines += ["# ssh_authorized_keys: [ssh-ed25519 …]", "# '''"]
    return "\n".join(lines) + "\n"


def _text(value: object) -> str:
    """As a TOML string: JSON's escapes are TOML's."""
    return json.dumps(str(value), ensure_ascii=False)


def _here(image: str) -> str:
    return str(Path(image).absolute()) if Path(image).exists() else image


def write(name: str, text: str) -> Path:
    """A file that was not there, and can be used. Raises ``Failure``."""
    if not NAME.fullmatch(name):
        raise Failure(f"{name!r} cannot be the name of a guest (letters, digits and _ . - only, at most 63)")
    path = DIRECTORY / f"{name}.toml"
    if os.path.lexists(path):
        raise Failure(f"{path} is there already (kvmctl edit {name})")
    _refuse(problems(name, text))
    try:
        with path.open("x") as file:
            file.write(text)
    except FileExistsError as error:
        raise Failure(f"{path} is there already (kvmctl edit {name})") from error
    except OSError as error:
        raise Failure(f"cannot write {path}: {error.strerror}{_as_root(error)}") from error
    return path


def problems(name: str, text: str) -> list[str]:
    """What kvmd --check says of a file of that name with this text. Raises ``Failure``."""
    with tempfile.TemporaryDirectory(prefix="kvmctl-") as directory:
        draft = Path(directory, f"{name}.toml")
        draft.write_text(text)
        try:
            done = subprocess.run(["kvmd", "--check", draft], check=False, capture_output=True, text=True)
        except OSError as error:
            raise Failure(f"cannot run kvmd --check: {error.strerror}") from error
    return [line.replace(f"{directory}/", "") for line in done.stdout.splitlines()]


def _refuse(found: Sequence[str]) -> None:
    if found:
        raise Failure("\n".join(["nothing is written:", *(f"  {line}" for line in found)]))


def _as_root(error: OSError) -> str:
    return " (as root)" if isinstance(error, PermissionError) else ""


def edit(name: str) -> int:
    """In an editor, again and again until it can be used, or the person gives up. Raises ``Failure``."""
    path = DIRECTORY / f"{name}.toml"
    try:
        target = path.resolve(strict=True)
        before = target.read_text()
        mode = target.stat()
    except FileNotFoundError as error:
        raise Failure(f"there is no {path} (kvmctl new {name})", status=NO_SUCH_GUEST) from error
    except OSError as error:
        raise Failure(f"cannot read {path}: {error.strerror}{_as_root(error)}") from error
    with tempfile.TemporaryDirectory(prefix="kvmctl-") as directory:
        draft = Path(directory, f"{name}.toml")
        draft.write_text(before)
        while True:
            status = subprocess.run([*_editor(), str(draft)], check=False).returncode
            if status:
                raise Failure(f"the editor ended with {status}: {path} is as it was")
            text = draft.read_text()
            if text == before:
                print(f"{path} is as it was", file=sys.stderr)
                return 0
            found = problems(name, text)
            if not found:
                break
            print("\n".join(found), file=sys.stderr)
            if not sys.stdin.isatty() or input("Edit it again? [Y/n] ").lower().startswith("n"):
                raise Failure(f"{path} is as it was", status=FAILED)
    try:
        new = target.with_name(f".{target.name}.kvmctl")
        new.write_text(text)
        new.chmod(mode.st_mode & 0o7777)
        os.chown(new, mode.st_uid, mode.st_gid)
        new.replace(target)
    except OSError as error:
        raise Failure(f"cannot write {target}: {error.strerror}{_as_root(error)}") from error
    print(f"{path} is changed; what runs goes on as it was started (kvmctl restart {name})", file=sys.stderr)
    return 0


def _editor() -> list[str]:
    for name in (os.environ.get("VISUAL"), os.environ.get("EDITOR"), "sensible-editor", "editor", "vi"):
        if name and (words := shlex.split(name)) and shutil.which(words[0]):
            return words
    raise Failure("there is no editor (set EDITOR)")
