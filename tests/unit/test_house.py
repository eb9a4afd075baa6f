"""The maps in the docstrings of kvmd/ and its folders hold, and what is written for people names what there is."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvmd.config import guestfile
from kvmd.config.schema import GUEST, Key, Table
from kvmd.config.schema import HOST as OF_THE_HOST
from kvmd.systemd.journal import Event

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
MANUAL = (ROOT / "packaging/man/kvmd.toml.5").read_text()
CATALOG = (ROOT / "units/kvmd.catalog").read_text()
HOST = guestfile.HostIds("0" * 32)

# --- rooms ------------------------------------------------------------------------------------------------------------

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
    """A wing, a folder of one or a module, by its path: ``network.kernel.netlink``."""

    path: str
    pure: bool
    below: frozenset[str]  # of what it may import: paths of the wings on floors below,
    named: frozenset[str] = frozenset()  # and of its neighbours in the folder; what lies in these, too

    def may_import(self, path: str) -> bool:
        return any(path == each or path.startswith(f"{each}.") for each in self.below | self.named)


def _rows(folder: Path) -> Iterator[list[str]]:
    """Of the table in the folder's docstring."""
    docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    for line in docstring.partition("::\n\n    floor |" if folder == SOURCE else "::\n\n    room ")[2].splitlines()[1:]:
        yield [cell.strip() for cell in line.split("|")]


def _wings() -> Iterator[Room]:
    rows = [(int(floor), name, what) for floor, name, what in _rows(SOURCE)]
    for floor, name, what in rows:
        below = frozenset(each for lower, each, _what in rows if lower < floor)
        yield Room(name, what.endswith("; pure"), below)


def _inside(wing: Room) -> Iterator[Room]:
    """What lies in a folder, on all levels."""
    above: set[str] = set()
    folder = SOURCE / wing.path.replace(".", "/")
    for name, mark, _what, imports in _rows(folder) if folder.is_dir() else ():
        siblings = set(imports.split())
        assert siblings <= above, f"{wing.path}.{name} may import what stands below it: {sorted(siblings - above)}"
        above.add(name)
        named = frozenset(f"{wing.path}.{each}" for each in siblings)
        room = Room(f"{wing.path}.{name}", bool(mark), wing.below | wing.named, named)
        yield room
        yield from _inside(room)


SOURCE = ROOT / "kvmd"
WINGS = list(_wings())
ROOMS = {room.path: room for wing in WINGS for room in (wing, *_inside(wing))}
FILES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts): path
    for path in sorted(SOURCE.rglob("*.py"))
    if path.stem != "__init__"
}


# Libraries that one room knows, so that another one there is a change of that room.
KNOWN_TO = {
    "dbus_next": {"systemd.message", "ctl.bus"},
    "pyroute2": {"network.kernel.codec"},
    "tomli": {"config.toml_lines"},
}


@dataclass(frozen=True)
class Imports:
    inside: set[str]
    outside: set[str]


def _imports(tree: ast.Module) -> Imports:
    """Of a module and of the functions in it: paths of rooms, and top-level packages from elsewhere."""
    found = Imports(set(), set())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for package, _, path in (alias.name.partition(".") for alias in node.names):
                (found.inside if package == "kvmd" else found.outside).add(path if package == "kvmd" else package)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports name the whole path: a module can be moved, and found"
            package, _, path = (node.module or "").partition(".")
            if package != "kvmd":
                found.outside.add(package)
            elif path in FILES:
                found.inside.add(path)
            else:
                names = (f"{path}.{alias.name}".lstrip(".") for alias in node.names)
                found.inside.update(name for name in names if name != "__version__")
    return found


def test_every_room_is_in_the_map_of_its_folder() -> None:
    folders = {".".join(path.parent.relative_to(SOURCE).parts) for path in SOURCE.rglob("*.py")} - {"."}
    assert set(ROOMS) == {*FILES, *folders} - {""}


def test_the_map_keeps_its_own_rules() -> None:
    """Floors from the top; a pure folder has pure rooms only."""
    floors = [int(floor) for floor, _name, _what in _rows(SOURCE)]
    assert floors == sorted(floors, reverse=True)
    for room in ROOMS.values():
        assert not room.pure or all(ROOMS[path].pure for path in ROOMS if path.startswith(f"{room.path}."))


@pytest.mark.parametrize("path", FILES)
def test_imports_of(path: str) -> None:
    room = ROOMS[path]
    tree = ast.parse(FILES[path].read_text())
    imports = _imports(tree)
    assert [each for each in imports.inside if not room.may_import(each)] == [], "not allowed by the map of its folder"
    assert all(path in KNOWN_TO[library] for library in imports.outside & KNOWN_TO.keys())
    if path.startswith("ctl."):
        assert not {each for each in imports.inside if not each.startswith("ctl")}, "kvmctl loads nothing of the daemon"
    if room.pure:
        assert [each for each in imports.inside if not ROOMS[each].pure] == [], "a pure room imports pure rooms only"
        assert not imports.outside & ACTING_MODULES
        assert not list(_acts(tree)), f"kvmd/{path}.py is a pure room"


def test_the_map_names_no_import_that_is_not_there() -> None:
    for path, room in ROOMS.items():
        files = [FILES[each] for each in FILES if each == path or each.startswith(f"{path}.")]
        inside = set().union(*(_imports(ast.parse(file.read_text())).inside for file in files))
        assert [each for each in room.named if not any(f"{i}.".startswith(f"{each}.") for i in inside)] == [], path


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
    works = _section("What works")
    for path in KEYS:
        assert f"`{_written(path)}`" in works, f"{_written(path)} in the README"


def _examples() -> Iterator[tuple[str, str]]:
    for number, text in enumerate(re.findall(r"^```toml\n(.*?)^```", README, re.DOTALL | re.MULTILINE)):
        yield f"readme{number}", text
    for number, text in enumerate(re.findall(r"^\.Bd -literal.*?\n(.*?)^\.Ed", MANUAL, re.DOTALL | re.MULTILINE)):
        yield f"manual{number}", text.replace("\\&", "").replace("\\e", "\\")


@pytest.mark.parametrize(("name", "text"), [pytest.param(*example, id=example[0]) for example in _examples()])
def test_examples_can_be_used(name: str, text: str) -> None:
    assert tomllib.loads(text)
    guestfile.parse(text, Path(f"/etc/kvmd/{name}.toml"), HOST)
