"""Requests and answers, byte by byte as the kernel took and gave them."""

from __future__ import annotations

import subprocess
import sys
from ipaddress import ip_address

import pytest
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from kvmd.network.kernel import codec
from kvmd.network.kernel.rtnetlink import NEWROUTE, Way

from .netlink import golden


def test_bytes_are_those_of_a_kernel() -> None:
    """tests/system/test_netlink.py says so of the distributions' pyroute2, too."""
    assert golden.differences() == []
    assert len(list(golden.requests())) == 53
    assert len(list(golden.answers())) == 50


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


def test_a_way_is_asked_as_pyroute2_would_write_it() -> None:
    for source, target in (("192.0.2.51", "198.41.0.4"), ("2001:db8:1::51", "2620:fe::9")):
        message = rtmsg()
        message["header"] = {"type": 26, "flags": 1, "sequence_number": 7}
        bits = ip_address(target).max_prefixlen
        message.update({"family": 2 if bits == 32 else 10, "dst_len": bits, "src_len": bits})
        message["attrs"] = [("RTA_SRC", source), ("RTA_DST", target), ("RTA_IIF", 5)]
        message.encode()
        assert Way(5, ip_address(source), ip_address(target)).encode(7) == bytes(message.data)
