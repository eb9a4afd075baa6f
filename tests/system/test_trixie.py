"""The main job once more, on Debian 13."""

from __future__ import annotations

from pathlib import Path

import lab

from .guests import Guests


def test_main_job_on_debian_13(deb: Path) -> None:
    with lab.Host("trixie", deb, name="trixie") as host:
        host.lan.neighbour("alice", "192.0.2.20", "2001:db8:1::20")
        guests, before = Guests(host), host.state()
        guests.linux("web", last=42)
        guests.start("web")
        for address in ("192.0.2.42", "2001:db8:1::42"):
            host.run("ping", "-n", "-c", "1", "-W", "3", address, netns="alice")
        for address in ("192.0.2.20", "2001:db8:1::20", "198.51.100.1", "2001:db8:ffff::1"):
            assert guests.type("web", f"ping {address}", "^guest: ping")["MESSAGE"] == f"guest: ping {address} ok"
        assert guests.status("web").rstrip().endswith("guest: ping 2001:db8:ffff::1 ok")
        host.run("systemctl", "stop", "kvmd@web")
        guests.clear()
        assert host.state() == before
