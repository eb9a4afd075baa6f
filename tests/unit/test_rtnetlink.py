"""Requests and answers, byte by byte as the kernel took and gave them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kvmd.network.kernel import codec
from kvmd.network.kernel.rtnetlink import NEWROUTE

from .netlink import golden


def test_bytes_are_those_of_a_kernel() -> None:
    """tests/system/test_netlink.py says so of the distributions' pyroute2, too."""
    assert golden.differences() == []
    assert len(list(golden.requests())) == 53
    assert len(list(golden.answers())) == 48


def test_an_attribute_that_pyroute2_does_not_know_is_not_dropped() -> None:
    with pytest.raises(KeyError, match="RTA_NONSENSE"):
        codec.encode(NEWROUTE, 0, 1, {}, {"RTA_NONSENSE": 1})


def test_check_does_not_load_what_it_does_not_need() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sys, kvmd.__main__; print(*sorted({'pyroute2', 'dbus_next'} & {*sys.modules}))"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "\n"
