"""The linters are tests. What they look at: all of the tree that is ours."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def lint(*argv: str | Path, **environment: str) -> None:
    words = [str(word) for word in argv]
    done = subprocess.run(words, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"{' '.join(words)}\n{done.stdout}{done.stderr}", pytrace=False)


def shell_scripts() -> list[Path]:
    """By their first line, wherever they are."""
    found = []
    for directory in (
        "",
        ".ci",
        "packaging",
        "packaging/debian",
        "tests",
        "tests/bench",
        "tests/lab",
        "units",
        "units/libexec",
    ):
        for path in (ROOT / directory).iterdir() if (ROOT / directory).is_dir() else ():
            if path.is_file():
                with path.open("rb") as file:
                    first = file.readline()
                if first.startswith(b"#!") and first.split()[0].endswith((b"/sh", b"/bash", b"/busybox")):
                    found.append(path)
    return sorted(found)


def test_ruff() -> None:
    lint(sys.executable, "-m", "ruff", "check", ".")


def test_ruff_format() -> None:
    lint(sys.executable, "-m", "ruff", "format", "--check", ".")


def test_types() -> None:
    lint(sys.executable, "-m", "mypy")


@pytest.mark.parametrize(
    "what", ["-plab", "-pbench", "packaging/demo.py", "tests/test_lint.py", "tests/system/test_lab.py"]
)
def test_types_around(what: str) -> None:
    lint(sys.executable, "-m", "mypy", "--strict", what, MYPYPATH=str(ROOT / "tests"))


def test_shellcheck() -> None:
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    lint("shellcheck", *shell_scripts())
