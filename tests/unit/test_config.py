"""/etc/kvmd as a whole: which guests can be used, and all that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmd import __main__
from kvmd.config.directory import Configuration, read
from kvmd.config.guestfile import HostIds, parse

TAP = '[[network]]\ntap = "t"'


def configuration(directory: Path, *paths: Path, **texts: str) -> Configuration:
    for name, text in texts.items():
        (directory / ("kvmd.conf" if name == "conf" else f"{name}.toml")).write_text(text)
    return read(HostIds(""), paths, directory)


def usable(found: Configuration) -> list[str]:
    return [name for name, entry in found.guests.items() if entry.guest]


def lines(found: Configuration) -> list[str]:
    return [str(problem).partition(": ")[0].rpartition("/")[2] for problem in found.problems]


def test_every_problem_of_every_file(tmp_path: Path) -> None:
    found = configuration(tmp_path, conf="\nx = 1", b=TAP, a=TAP, c="cpus = 0\nmemory = 0\n")
    assert lines(found) == ["b.toml:2", "c.toml:1", "c.toml:2", "kvmd.conf:2"]
    assert found.open_firewalls is None


def test_a_guest_is_not_used_while_kvmd_conf_cannot_be(tmp_path: Path) -> None:
    found = configuration(tmp_path, conf="\nx = 1", a="")
    assert usable(found) == []
    assert found.guests["a"].problems == found.problems


def test_the_first_of_two_that_conflict_is_used(tmp_path: Path) -> None:
    found = configuration(tmp_path, conf="[firewall]\nopen = true", b=TAP, a=TAP, c="cpus = 2")
    assert usable(found) == ["a", "c"]
    assert found.guests["b"].problems == found.problems
    assert found.guests["c"].snapshot == {"guest.toml": b"cpus = 2", "kvmd.conf": b"[firewall]\nopen = true"}
    assert found.open_firewalls is True


def test_named_files_only(tmp_path: Path) -> None:
    gone = tmp_path / "gone.toml"
    found = configuration(tmp_path, tmp_path / "a.toml", gone, a=TAP, b=TAP)
    assert usable(found) == ["a"]
    assert found.missing == [gone]
    assert found.problems == []


def test_what_is_checked_has_the_hosts_own_derived_addresses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(__main__, "MACHINE_ID", tmp_path / "machine-id")
    __main__.MACHINE_ID.write_text("0123abcd\n")
    paths = [tmp_path / "a.toml", tmp_path / "b.toml"]
    paths[0].write_text("[[network]]\n")
    derived = parse("[[network]]\n", paths[0], HostIds("0123abcd")).guest
    assert derived
    paths[1].write_text(f'[[network]]\nmac = "{derived.nics[0].mac}"\n')
    assert __main__.check(paths) == 1
    assert derived.nics[0].mac in capsys.readouterr().out
    __main__.MACHINE_ID.unlink()
    assert __main__.check(paths) == 0
