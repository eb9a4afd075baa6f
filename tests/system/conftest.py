"""Fixtures for tests on real hosts: one of each kind for all tests of a worker, checked for leftovers after each."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lab
import pytest

from .guests import Guests

DEB = Path(os.environ["KVMD_DEB"]) if "KVMD_DEB" in os.environ else None


@pytest.fixture(scope="session")
def deb() -> Path:
    return DEB or lab.deb()


@pytest.fixture(scope="session")
def bookworm(deb: Path) -> Iterator[lab.Host]:
    """Debian 12, on its LAN; alice and bob are neighbours, and docker0 is there before the uplink."""
    with lab.Host("bookworm", deb, name="bookworm") as host:
        lan = host.make_lan(docker0=True)
        for name, four, six in (("alice", "192.0.2.20", "2001:db8:1::20"), ("bob", "192.0.2.21", "2001:db8:1::21")):
            lan.neighbour(name, four, six)
        yield host


@pytest.fixture
def guests(bookworm: lab.Host, request: pytest.FixtureRequest) -> Iterator[Guests]:
    """Guests on the shared host. Afterwards the host is as it was, line by line, and kvmd complained of nothing."""
    before, since = bookworm.state(), bookworm.cursor()
    guests = Guests(bookworm)
    yield guests
    guests.clear()
    changed = list(difflib.unified_diff(before, bookworm.state(), n=0, lineterm=""))
    assert not changed, "\n".join(changed)
    assert not [
        unit for unit, state in bookworm.units().items() if unit.startswith("kvmd-") and unit.endswith(".scope")
    ]
    assert bookworm.run("ls", "/run/kvmd").stdout.split() in ([], ["sysctl.json"])
    expected = request.node.get_closest_marker("complaints")
    complaints = [
        entry["MESSAGE"]
        for entry in bookworm.journal("-p", "warning", "_SYSTEMD_UNIT=kvmd.service", since=since)
        if "is emulated" not in entry["MESSAGE"]
        and not any(word in entry["MESSAGE"] for word in (expected.args if expected else ()))
    ]
    assert not complaints


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """A failure comes with the end of the host's journal."""
    outcome: Any = yield
    report = outcome.get_result()
    hosts = [value for value in getattr(item, "funcargs", {}).values() if isinstance(value, lab.Machine) and value.runs]
    for host in hosts if report.failed else ():
        report.sections.append(
            ("journal of the host", host.run("journalctl", "--no-pager", "-n", "60", check=False).stdout)
        )
        host.save_logs()


@pytest.fixture(scope="session")
def vm(deb: Path) -> Iterator[lab.VM]:
    """The one whole machine with KVM; test_vm.py boots it anew."""
    with lab.VM("bookworm", deb) as vm:
        yield vm
