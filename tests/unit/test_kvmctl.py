"""kvmctl: columns and numbers; what its manual, its completions and the bus's manual say is what there is."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvmd.ctl import failure
from kvmd.ctl.guests import label
from kvmd.ctl.install import Disc, identify
from kvmd.ctl.parser import parser
from kvmd.ctl.table import cut, render, size, span
from kvmd.systemd.scope import escape

ROOT = Path(__file__).resolve().parents[2]
MANUAL = (ROOT / "packaging/man/kvmctl.1").read_text()
COMPLETIONS = {path.name: path.read_text() for path in (ROOT / "packaging/completions").iterdir()}
TOP = parser()


def options(verb: argparse.ArgumentParser) -> set[str]:
    """Long ones, but for those of every verb."""
    found = {word for action in verb._actions for word in action.option_strings if word.startswith("--")}
    return found - {"--help", "--json", "--host"}


def sections() -> dict[str, str]:
    """What the manual says of each verb."""
    text = MANUAL.partition(".Sh VERBS\n")[2].partition(".Ss Waiting\n")[0]
    parts = re.split(r"^\.It Cm (\w+)(.*)\n", text, flags=re.MULTILINE)
    return {name: about + text for name, about, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True)}


def test_the_manual_has_every_verb_and_no_other() -> None:
    assert sorted(sections()) == sorted(TOP.verbs)


@pytest.mark.parametrize("name", sorted(TOP.verbs))
def test_the_manual_has_every_option(name: str) -> None:
    waiting = {"--no-wait", "--timeout"}  # which have a section of their own
    said = {f"--{word}" for word in re.findall(r"Fl -([a-z-]+)", sections()[name])}
    of_file = options(TOP.verbs["new"]) if name == "install" else set()
    assert options(TOP.verbs[name]) - waiting <= said | of_file
    known = set().union(*map(options, TOP.verbs.values()))
    assert said <= known


def test_the_manual_has_every_exit_status() -> None:
    text = MANUAL.partition(".Sh EXIT STATUS\n")[2].partition(".Sh ")[0]
    numbers = {value for name, value in vars(failure).items() if name.isupper() and isinstance(value, int)}
    assert {int(number) for number in re.findall(r"^\.It (\d+)$", text, re.MULTILINE)} == numbers | {0}


@pytest.mark.parametrize("name", sorted(COMPLETIONS))
def test_completions_know_what_there_is(name: str) -> None:
    text = COMPLETIONS[name]
    for verb, verbs in TOP.verbs.items():
        assert re.search(rf"\b{verb}\b", text), verb
        for option in options(verbs):
            form = rf"-l {option[2:]}\b" if name.endswith(".fish") else rf"{option}\b"
            assert re.search(form, text), f"{verb} {option}"
    known = {"help", "json", "host", "version"} | {
        option[2:] for each in TOP.verbs.values() for option in options(each)
    }
    form = r"complete -c kvmctl.* -l ([a-z-]+)" if name.endswith(".fish") else r"--([a-z][a-z-]+)"
    assert set(re.findall(form, text)) <= known


def test_bash_takes_its_completion() -> None:
    script = 'source "$1"; COMP_WORDS=(kvmctl st); COMP_CWORD=1; _kvmctl; printf "%s\\n" "${COMPREPLY[@]}"'
    path = str(ROOT / "packaging/completions/kvmctl")
    done = subprocess.run(["bash", "-c", script, "bash", path], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["status", "start", "stop"]
    assert done.stderr == ""


def test_the_bus_manual_has_every_member() -> None:
    text = (ROOT / "packaging/man/org.kvmd1.5").read_text()
    members = set()
    for path in (ROOT / "dbus").glob("org.kvmd1.*.xml"):
        members |= set(re.findall(r'<(?:method|signal|property) name="(\w+)"', path.read_text()))
    assert set(re.findall(r"^\.It Ic (\w+)$", text, re.MULTILINE)) == members


def test_help_needs_neither_bus_nor_asyncio() -> None:
    code = "import sys; from kvmd.ctl.parser import parser; parser(); print({'asyncio', 'dbus_next'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "set()\n"


def test_columns() -> None:
    rows = [("web", "running", "first guest"), ("größe", "off", "二つ目")]
    assert render(("NAME", "STATE", "ABOUT"), rows) == [
        "NAME   STATE    ABOUT",
        "web    running  first guest",
        "größe  off      二つ目",
    ]
    assert render(("N", "A"), [("web", "a long description")], columns=14, legend=False) == ["web  a long d…"]
    assert render(("N", "S"), [("web", "failed")], colour=True, legend=False) == ["web  \033[1;31mfailed\033[0m"]
    assert cut("二つ目", 5) == "二つ…"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.84, "0.8s"), (59, "59s"), (60, "1min"), (302, "5min 2s"), (90000, "1d 1h"), (86400, "1d"), (-1, "0.0s")],
)
def test_span(seconds: float, text: str) -> None:
    assert span(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0B"), (1536, "2K"), (512 << 20, "512M"), (3 << 29, "1.5G"), (2 << 30, "2G")]
)
def test_size(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize("name", ["web", "1st", "a.b-c_d", "x2"])
def test_label_is_the_daemons(name: str) -> None:
    assert label(name) == escape(name)


def descriptor(system: str = "", volume: str = "", publisher: str = "", year: str = "2024") -> bytes:
    """All that is looked at of a primary volume descriptor."""
    data = bytearray(2048)
    data[1:6] = b"CD001"
    for at, length, text in ((8, 32, system), (40, 32, volume), (318, 128, publisher)):
        data[at : at + length] = text.encode().ljust(length)
    data[813:817] = year.encode()
    return bytes(32768) + bytes(data)


@pytest.mark.parametrize(
    ("data", "disc"),
    [
        (descriptor(publisher="MICROSOFT CORPORATION"), Disc("Windows", "windows")),
        (descriptor(system="FreeBSD", volume="14_0_RELEASE_AMD64_CD"), Disc("FreeBSD", "bsd")),
        (descriptor(volume="FreeBSD_bootonly", year="2008"), Disc("FreeBSD", "legacy")),
        (descriptor(system="OpenBSD"), Disc("OpenBSD", "bsd")),
        (descriptor(volume="Debian 12.5.0 amd64 n"), Disc("Debian", "linux")),
        (descriptor(volume="Fedora-WS-Live-40"), Disc("", "linux")),
    ],
)
def test_the_system_on_a_disc(tmp_path: Path, data: bytes, disc: Disc) -> None:
    image = tmp_path / "a.iso"
    image.write_bytes(data)
    assert identify(image) == disc


def test_what_is_no_disc(tmp_path: Path) -> None:
    image = tmp_path / "a.iso"
    image.write_bytes(bytes(40000))
    with pytest.raises(failure.Failure, match="is no CD image"):
        identify(image)
    with pytest.raises(failure.Failure, match="cannot read"):
        identify(tmp_path / "b.iso")
