"""Workers share the tests: the longest come first, so that all end at the same time."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent

# By what they take; those of one xdist_group share a host, and go to one worker.
FIRST = [
    "system/test_vm.py",
    "system/test_vsock.py",
    "system/test_faults.py",
    "system/test_neighbourhood.py",
    "system/test_lab.py",
    "system/test_forward.py",
    "system/test_matrix.py",
    "system/test_package.py",
    "system/test_limits.py",
    "system",
    "netns",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_place)


def _place(item: pytest.Item) -> int:
    path = item.path.relative_to(HERE)
    names = [str(path), *map(str, path.parents)]
    return next((FIRST.index(name) for name in names if name in FIRST), len(FIRST))
