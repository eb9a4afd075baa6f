"""The netlink codec with the pyroute2 of each release: bytes as a kernel took and gave them, and loaded when needed."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import lab
import pytest

GOLDEN = Path(__file__).parents[1] / "unit/netlink"
VERSIONS = {"bookworm": "0.7.2", "trixie": "0.7.7"}


@pytest.fixture(params=VERSIONS)
def tree(request: pytest.FixtureRequest, deb: Path, tmp_path: Path) -> Iterator[Path]:
    """A release with kvmd, not booted."""
    lower = [lab.roots.layer(request.param, deb), lab.roots.root(request.param)]
    with lab.roots.overlay(tmp_path / "upper", lower, tmp_path / request.param) as tree:
        yield tree


def python(tree: Path, code: str) -> str:
    argv = ["chroot", str(tree), "/usr/bin/python3", "-c", f"import sys; sys.path.insert(0, '/usr/lib/kvmd'); {code}"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_bytes_are_those_of_a_kernel(tree: Path) -> None:
    shutil.copytree(GOLDEN, tree / "root/netlink")
    code = "sys.path.insert(0, '/root/netlink'); import golden; print(golden.version(), golden.differences())"
    assert python(tree, code) == f"{VERSIONS[tree.name]} []\n"


def test_loaded_when_the_network_is_looked_at(tree: Path) -> None:
    """Not by the modules of the daemon: it is ready before."""
    modules = "kvmd.__main__, kvmd.bus.service, kvmd.guests.manager, kvmd.network.lan"
    assert python(tree, f"import {modules}; print('pyroute2' in sys.modules)") == "False\n"
