"""kvmd/__init__.py says which version this is; the changelogs cannot say another."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import kvmd

ROOT = Path(__file__).resolve().parents[2]


def test_changelogs_begin_with_this_version() -> None:
    debian = (ROOT / "packaging/debian/changelog").read_text()
    assert debian.startswith(f"kvmd ({kvmd.__version__}) ")
    headings = re.findall(r"^## (\S+?)(?:,.*)?$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings == re.findall(r"^kvmd \((.*?)\)", debian, re.MULTILINE)


def test_the_project_takes_it_from_there() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"] == {"version": {"attr": "kvmd.__version__"}}
