"""All of /etc/kvmd read at once: its guests, and every problem of its files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kvmd import runtime
from kvmd.config import guestfile, watch
from kvmd.errors import InvalidConfiguration, Problem
from kvmd.guest import NAME, Guest

DIRECTORY = Path("/etc/kvmd")
SNAPSHOT, DEFAULTS = runtime.FILES


@dataclass(frozen=True)
class Entry:
    """A guest file: the guest, if it can be used, and what was read for it; else what is wrong."""

    guest: Guest | None = None
    snapshot: dict[str, bytes] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    stamp: object = None

    def stale(self, name: str) -> bool:
        """Whether the file of this name is not what was read."""
        return self.stamp != watch.stamp(DIRECTORY / f"{name}.toml")


@dataclass(frozen=True)
class Configuration:
    guests: dict[str, Entry]
    problems: list[Problem]  # of all files, kvmd.conf included
    missing: list[Path]
    open_firewalls: bool | None  # None: kvmd.conf cannot be used
    doubts: list[Problem]  # of files that can be used


def read(
    ids: guestfile.HostIds,
    paths: Sequence[Path] = (),
    directory: Path = DIRECTORY,
    same: Callable[[Path], Path] = lambda path: path,
) -> Configuration:
    """``paths``: guest files to read instead of all of the directory's. ``same``: what an image's path stands for."""
    problems: list[Problem] = []
    source: bytes = b""
    defaults: Mapping[str, Any] = {}
    open_firewalls = None
    try:
        source = watch.read(directory / DEFAULTS) or b""
        defaults = guestfile.parse_defaults(source, directory / DEFAULTS)
        open_firewalls = bool(defaults.get("firewall", {}).get("open"))
    except InvalidConfiguration as error:
        problems += _marked(error.problems, watch.private(directory / DEFAULTS))
    unusable = list(problems)  # a guest must not start without the limits that kvmd.conf meant to set
    guests: dict[str, Entry] = {}
    parsed: list[guestfile.GuestFile] = []
    missing: list[Path] = []
    for path in paths or sorted(directory.glob("*.toml")):
        stamp = watch.stamp(path)
        try:
            text = watch.read(path)
            if text is None:
                missing.append(path)
                continue
            parsed.append(guestfile.parse(text, path, ids, defaults))
            guest = None if unusable else parsed[-1].guest
            guests[path.stem] = Entry(guest, {SNAPSHOT: text, DEFAULTS: source}, unusable, stamp)
        except InvalidConfiguration as error:
            wrong = _marked(error.problems, watch.private(path))
            if NAME.fullmatch(path.stem):
                guests[path.stem] = Entry(problems=wrong, stamp=stamp)
            problems += wrong
        except Exception as error:  # noqa: BLE001  # a defect of ours: it concerns no other guest
            what = f"kvmd fails at it: {type(error).__name__}: {error}"
            problems.append(Problem(str(path), 1, "", what, "report it, please", private=True))
    clashes = guestfile.conflicts(parsed, same)
    private = bool(clashes) and any(watch.private(file.document.file) for file in parsed)  # it tells of two files
    for problem in _marked(clashes, private):
        name = Path(problem.file).stem
        entry = guests[name]
        guests[name] = replace(entry, guest=None, problems=[*entry.problems, problem])
        problems.append(problem)
    doubts = sorted(doubt for file in parsed for doubt in file.doubts)
    return Configuration(guests, sorted(problems), missing, open_firewalls, doubts)


def _marked(problems: Sequence[Problem], private: bool) -> list[Problem]:
    return [replace(problem, private=private) for problem in problems]


def recall(name: str, snapshot: Mapping[str, bytes], ids: guestfile.HostIds) -> Guest:
    """The guest as its files were when the snapshot was taken. Raises ``InvalidConfiguration``."""
    defaults = guestfile.parse_defaults(snapshot[DEFAULTS], DIRECTORY / DEFAULTS)
    return guestfile.parse(snapshot[SNAPSHOT], DIRECTORY / f"{name}.toml", ids, defaults).guest
