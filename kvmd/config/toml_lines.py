"""TOML with line numbers: which line of a file says which key.

The TOML is read by ``tomli``. It does not tell lines, so where one is asked for, the physical lines are handed to it
again, one statement at a time: a statement ends where what has been gathered is TOML by itself. No second parser.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import tomli

from kvmd.errors import InvalidConfiguration, Problem

KeyPath = tuple[str | int, ...]  # ("network", 0, "address")

SIZE_MAX = 64 << 10  # bytes
STATEMENT_MAX = 1000  # lines that may be its last are tried; a longer one has its keys at the line of its table

# Only a line with one of these can be the last of a statement that began on an earlier line.
_MAY_CLOSE = re.compile(r"[]}]|\"\"\"|'''")
_POSITION = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)$")
_ESCAPES = {"\n": r"\n", "\t": r"\t", "\r": r"\r", '"': r"\"", "\\": r"\\"}


class Document:
    """A TOML file: ``values`` as tomli has them, and problems that know their line.

    Raises ``InvalidConfiguration`` for what is no TOML at all.
    """

    def __init__(self, text: str | bytes, file: Path) -> None:
        self.file = file
        self._text = ""
        raw = text.encode(errors="surrogatepass") if isinstance(text, str) else text
        if len(raw) > SIZE_MAX:
            raise self._refusal(1, f"the file is larger than {SIZE_MAX >> 10} KiB", "is it a guest file?")
        try:
            self._text = raw.decode("utf-8-sig")  # editors on Windows begin a file with a byte order mark
            self.values: dict[str, Any] = tomli.loads(self._text)
        except UnicodeDecodeError as error:
            line = raw.count(b"\n", 0, error.start) + 1
            raise self._refusal(line, "not UTF-8", "save the file as UTF-8") from error
        except RecursionError as error:
            raise self._refusal(1, "nested too deeply", "a guest file needs no more than lists in tables") from error
        except tomli.TOMLDecodeError as error:
            what = _POSITION.sub("", str(error))
            raise self._refusal(self._error_line(str(error)), f"not TOML: {what}", "see https://toml.io") from error
        except ValueError as error:  # int() takes at most sys.get_int_max_str_digits()
            raise self._refusal(1, "a number has thousands of digits", "write a smaller one") from error

    def problem(self, path: KeyPath, what: str, hint: str = "") -> Problem:
        """A problem at the line of a key, else of the nearest table around it, else at the first line.

        The key is shown without indexes, ``network.address``: which of several tables is meant, the line tells.
        """
        key = ".".join(_show_key(part) for part in path if isinstance(part, str))
        around = (path[:end] for end in range(len(path), 0, -1))
        line = next((self._lines[table] for table in around if table in self._lines), 1)
        return Problem(str(self.file), line, key, what, hint)

    def _refusal(self, line: int, what: str, hint: str) -> InvalidConfiguration:
        return InvalidConfiguration([Problem(str(self.file), line, "", what, hint)])

    def _error_line(self, message: str) -> int:
        """The line in tomli's message; older versions have it nowhere else."""
        last = self._text.rstrip("\n").count("\n") + 1
        position = _POSITION.search(message)
        return min(int(position[1]), last) if position and position[1] else last if position else 1

    @cached_property
    def _lines(self) -> Mapping[KeyPath, int]:
        lines: dict[KeyPath, int] = {}
        counts: dict[KeyPath, int] = {}
        table: KeyPath = ()

        def record(table: KeyPath, said: Mapping[str, Any]) -> None:
            for key, value in said.items():
                lines.setdefault((*table, key), number)
                if isinstance(value, dict):
                    record((*table, key), value)

        for number, statement, said in _statements(self._text):
            if statement.lstrip().startswith("["):
                table = _header(said, counts)
                lines.setdefault(table, number)
            else:
                record(table, said)
        return lines


def _header(said: Mapping[str, Any], counts: dict[KeyPath, int]) -> KeyPath:
    """The path a table header stands for; ``counts`` knows how many entries each array of tables has by now."""
    path: KeyPath = ()
    inner: Any = said
    while inner:  # one key in one key: a header says nothing else
        [(key, inner)] = inner.items()
        path = (*path, key)
        if isinstance(inner, list):
            counts[path] = counts.get(path, 0) + 1
            [inner] = inner
        if path in counts:
            path = (*path, counts[path] - 1)
    return path


def _statements(text: str) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
    """Each statement of a valid document: its first line, its text, and what it says taken alone."""
    gathered, start, tried = "", 1, 0
    for number, line in enumerate(text.split("\n"), 1):
        begun = bool(gathered)
        start, tried = (start, tried) if begun else (number, 0)
        gathered += line + "\n"
        if begun and not _MAY_CLOSE.search(line):
            continue
        tried += 1
        if tried > STATEMENT_MAX:  # each costs as much as all before it
            return
        try:
            said = tomli.loads(gathered)
        except tomli.TOMLDecodeError:
            continue
        yield start, gathered, said
        gathered = ""


def show(value: object) -> str:
    """A value as TOML could have it, on one line whatever is in it, and not too long to read."""
    match value:
        case bool():
            return str(value).lower()
        case str():
            text = value if len(value) <= 60 else value[:59] + "…"
            return '"' + "".join(map(_show_character, text)) + '"'
        case list():
            return "a list"
        case dict():
            return "a table"
        case int() if abs(value) >= 1 << 64:
            return "the number"
    return str(value)


def _show_character(char: str) -> str:
    return _ESCAPES.get(char) or (char if char.isprintable() else f"\\U{ord(char):08x}")


def _show_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else show(key)
