"""Guests of any name that the manual allows: units, scopes, taps, bus paths; others are one error each."""

from __future__ import annotations

import json

import pytest

from .guests import Guests

NAMES = [
    *("web_1", "web-", "a.b.c", "01", "db.service", "Web", "web", "foo", "foo-bar", "all", "default", "images"),
    *("production-db-1", "production-db-2", "x" * 63),
]
REFUSED = ["-x", "x@y", "größe", "y" * 64, "kvmd", ".hidden", "a b"]


def test_names(guests: Guests) -> None:
    host = guests.host
    host.write("/etc/systemd/system/kvmd-foo-.scope.d/limit.conf", "[Scope]\nTasksMax=77\n")
    host.run("systemctl", "daemon-reload")
    for name in NAMES:
        guests.write(name, 'memory = "16M"\naccelerator = "tcg"\nmachine = "microvm"\n[[network]]\n')
    units = [f"kvmd@{name}.service" for name in NAMES]
    host.run("systemctl", "start", *units)
    listed = {name: (state, path) for name, state, path in guests.call("ListGuests")[0]}
    assert set(NAMES) <= listed.keys()
    taps = set()
    for name in NAMES:
        assert listed[name][0] == "running"
        assert guests.path(name) == listed[name][1]
        [nic] = guests.get(name, "Networks")
        taps.add(nic["tap"]["data"])
        assert guests.active(name) == "active"
        assert host.show(f"kvmd-{name}.scope")["TasksMax"] == (
            "77" if name == "foo-bar" else host.show("kvmd-web.scope")["TasksMax"]
        )
    assert len(taps) == len(NAMES)
    assert all(len(tap) <= 15 for tap in taps)
    host.run("systemctl", "enable", *units)
    host.run("systemctl", "disable", *units)

    guests.write("production-db-3", "")  # a third of that kind changes nothing
    assert {guests.get(name, "Networks")[0]["tap"]["data"] for name in NAMES} == taps
    for name in NAMES:
        guests.guest_off(name)
    host.run("systemctl", "stop", *units)
    host.run("rm", "-r", "/etc/systemd/system/kvmd-foo-.scope.d")
    host.run("systemctl", "daemon-reload")


@pytest.mark.complaints("cannot be the name of a guest")
def test_names_that_are_none(guests: Guests) -> None:
    host = guests.host
    for name in REFUSED:
        host.write(f"/etc/kvmd/{name}.toml", "")
    guests.call("Reload")
    said = host.run(
        "busctl", "--json=short", "get-property", "org.kvmd1", "/org/kvmd1", "org.kvmd1.Manager", "Problems"
    )
    problems = json.loads(said.stdout)["data"]
    for name in REFUSED:
        about = [line for line in problems if line.startswith(f"/etc/kvmd/{name}.toml:")]
        assert len(about) == 1, problems
        assert "cannot be the name of a guest" in about[0]
        host.run("rm", f"/etc/kvmd/{name}.toml")
    guests.call("Reload")
