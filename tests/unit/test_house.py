"""The rooms of the code map in kvmd/__init__.py hold, and what is written for people names what there is."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvmd.config import guestfile
from kvmd.config.schema import GUEST, WORKING, Key, Table
from kvmd.config.schema import HOST as OF_THE_HOST
from kvmd.systemd.journal import Event

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
MANUAL = (ROOT / "packaging/man/kvmd.toml.5").read_text()
CATALOG = (ROOT / "units/kvmd.catalog").read_text()
HOST = guestfile.HostIds("0" * 32)

# --- rooms ------------------------------------------------------------------------------------------------------------

KINDS = ("pure", "ground", "acting", "joining")
ACTING_MODULES = {
    *("asyncio", "concurrent", "ctypes", "fcntl", "io", "logging", "multiprocessing", "os", "pty", "select"),
    *("selectors", "shutil", "signal", "subprocess", "tempfile", "threading", "time", "datetime", "random", "secrets"),
    *("dbus_next", "systemd"),
}
# Of ``socket``, the constants and byte orders are pure; of ``Path``, everything that only looks at the words.
ACTING_NAMES = {
    *("socketpair", "create_connection", "if_nameindex", "if_nametoindex", "if_indextoname", "getaddrinfo"),
    *("read_text", "read_bytes", "write_text", "write_bytes", "exists", "is_file", "is_dir", "stat", "iterdir", "glob"),
    *("resolve", "unlink", "mkdir", "touch", "chmod", "readlink", "symlink_to"),
}


@dataclass(frozen=True)
class Room:
    name: str
    kind: str
    allowed: frozenset[str]


def _rooms() -> dict[str, Room]:
    """The table in the docstring of kvmd/__init__.py."""
    docstring = ast.get_docstring(ast.parse((ROOT / "kvmd/__init__.py").read_text())) or ""
    _, _, table = docstring.partition("| may import\n")
    rooms: dict[str, Room] = {}
    kind = ""
    for line in filter(str.strip, table.splitlines()):
        if match := re.fullmatch(r" *(\w+): .*", line):
            kind = match[1]
            continue
        name, _, words = (cell.strip() for cell in line.split("|"))
        allowed = set(words.split())
        for group in [word for word in allowed if word in (*KINDS, "everything")]:
            allowed.remove(group)
            allowed |= {room.name for room in rooms.values() if group in (room.kind, "everything")}
        rooms[name] = Room(name, kind, frozenset(allowed))
    return rooms


ROOMS = _rooms()
FILES = {path.stem: path for path in sorted((ROOT / "kvmd").glob("*.py")) if path.stem != "__init__"}


@dataclass(frozen=True)
class Imports:
    inside: set[str]
    outside: set[str]


def _imports(tree: ast.Module) -> Imports:
    """Of a module and of the functions in it: names of rooms, and of top-level packages from elsewhere."""
    found = Imports(set(), set())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.outside.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = ("kvmd." if node.level else "") + (node.module or "")
            if module.rstrip(".") == "kvmd":
                found.inside.update(alias.name for alias in node.names if not alias.name.startswith("__"))
            elif module.startswith("kvmd."):
                found.inside.add(module.split(".")[1])
            else:
                found.outside.add(module.partition(".")[0])
    return found


def test_every_room_is_in_the_code_map() -> None:
    assert set(ROOMS) == set(FILES)
    assert {room.kind for room in ROOMS.values()} == set(KINDS)


def test_the_code_map_keeps_its_own_rules() -> None:
    """Only what stands above; pure rooms only pure ones; acting rooms never each other."""
    above: set[str] = set()
    for room in ROOMS.values():
        assert room.allowed <= above, f"{room.name} may import what stands below it: {sorted(room.allowed - above)}"
        kinds = {ROOMS[name].kind for name in room.allowed}
        assert kinds <= {"pure": {"pure"}, "ground": {"pure"}, "acting": {"pure", "ground"}}.get(room.kind, set(KINDS))
        above.add(room.name)


@pytest.mark.parametrize("name", FILES)
def test_imports_of(name: str) -> None:
    assert name in ROOMS, f"give kvmd/{name}.py a row in the code map of kvmd/__init__.py"
    tree = ast.parse(FILES[name].read_text())
    imports = _imports(tree)
    assert imports.inside <= ROOMS[name].allowed, "not allowed by the code map in kvmd/__init__.py"
    if ROOMS[name].kind == "pure":
        assert not imports.outside & ACTING_MODULES
        assert not list(_acts(tree)), f"kvmd/{name}.py is a pure room"


def _acts(tree: ast.Module) -> Iterator[str]:
    """Calls of a pure room that reach the world."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            if function in ("open", "input", "print", "socket.socket") or function.rpartition(".")[2] in ACTING_NAMES:
                yield f"line {node.lineno}: {function}()"


# --- what people read -------------------------------------------------------------------------------------------------


def _keys(table: Table, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of all keys; a table of free names counts as one."""
    for name, key in table.keys.items():
        if isinstance(key, Key) or key.other:
            yield (*path, name)
        else:
            yield from _keys(key, (*path, name))


KEYS = sorted([*_keys(GUEST), *_keys(OF_THE_HOST)])


def _section(heading: str) -> str:
    """A section of the README, by its heading."""
    match = re.search(rf"^(#+) {re.escape(heading)}\n(.*?)(?=^#{{1,2}} |\Z)", README, re.DOTALL | re.MULTILINE)
    assert match, f"README.md has no section {heading}"
    return match[2]


def _written(path: tuple[str, ...]) -> str:
    """A key as the README writes it: ``memory``, ``disk.size``; tables with many names as a whole: ``[limits]``."""
    return f"[{path[0]}]" if path[0] in ("limits", "credentials", "cloud_init") else ".".join(path)


def test_catalog_has_every_event_once() -> None:
    ids = re.findall(r"^-- ([0-9a-f]{32})$", CATALOG, re.MULTILINE)
    assert sorted(ids) == sorted(event.value for event in Event)
    for entry in re.split(r"^-- [0-9a-f]{32}\n", CATALOG, flags=re.MULTILINE)[1:]:
        header, _, text = entry.partition("\n\n")
        assert re.match(r"Subject: \S.*\nDefined-By: kvmd\nDocumentation: man:kvmd", header)
        assert text.strip()


def test_manual_documents_exactly_the_keys_there_are() -> None:
    documented: set[tuple[str, ...]] = set()
    table: tuple[str, ...] = ()
    for line in MANUAL.splitlines():
        if match := re.fullmatch(r"\.(Sh|Ss) (.*)", line):
            named = re.fullmatch(r"\[+(\w+)\]+", match[2])
            table = (named[1],) if named else ()
            if named and table in KEYS:
                documented.add(table)
        elif match := re.fullmatch(r"\.It Cm (\w+)(?: Ar .*)?|\.Cm (\w+) [.,]", line):
            documented.add((*table, match[1] or match[2]))
    assert sorted(documented) == KEYS


def test_readme_names_every_key_where_it_belongs() -> None:
    works, waits = _section("What works"), _section("What does not work yet")
    for path in KEYS:
        waiting = any(path[:depth] in WORKING for depth in range(1, len(path) + 1))
        assert f"`{_written(path)}`" in (waits if waiting else works), f"{_written(path)} in the README"


def _examples() -> Iterator[tuple[str, str]]:
    for number, text in enumerate(re.findall(r"^```toml\n(.*?)^```", README, re.DOTALL | re.MULTILINE)):
        yield f"readme{number}", text
    for number, text in enumerate(re.findall(r"^\.Bd -literal.*?\n(.*?)^\.Ed", MANUAL, re.DOTALL | re.MULTILINE)):
        yield f"manual{number}", text.replace("\\&", "").replace("\\e", "\\")


@pytest.mark.parametrize(("name", "text"), [pytest.param(*example, id=example[0]) for example in _examples()])
def test_examples_can_be_used(name: str, text: str) -> None:
    assert tomllib.loads(text)
    guestfile.parse(text, Path(f"/etc/kvmd/{name}.toml"), HOST)
