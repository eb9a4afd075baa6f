"""Settings are put back: exactly, after a kill in between, and not over somebody else's change. In a made-up /proc."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from kvmd.network.kernel import sysctl
from kvmd.network.kernel.sysctl import Sysctls
from kvmd.network.model.things import ALL, Operation, Setting

NAMES = {1: "lo", 2: "eth0", 3: "br0"}
DELAY = Setting("ipv4/neigh", 2, "proxy_delay", 0)
FORWARDING = Setting("ipv6/conf", ALL, "forwarding", 1)


class Tree:
    """/proc/sys/net of a host that has eth0 and br0; br0 forwards already."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for interface in ("all", "default", *NAMES.values()):
            self["ipv6/conf", interface, "forwarding"] = int(interface == "br0")
            self["ipv6/conf", interface, "accept_ra"] = 1
            self["ipv4/conf", interface, "forwarding"] = 0
        self["ipv4/neigh", "eth0", "proxy_delay"] = 80

    def __setitem__(self, key: tuple[str, str, str], value: int) -> None:
        path = self.root.joinpath(*key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")

    def __getitem__(self, key: tuple[str, str, str]) -> int:
        return int(self.root.joinpath(*key).read_text())


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    monkeypatch.setattr(sysctl, "ROOT", str(tmp_path / "net"))
    monkeypatch.setattr(socket, "if_nameindex", lambda: list(NAMES.items()))
    return Tree(tmp_path / "net")


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "run" / "sysctl.json"


def add(*settings: Setting) -> list[Operation]:
    return [Operation("add", setting) for setting in settings]


def remove(*settings: Setting) -> list[Operation]:
    return [Operation("remove", setting) for setting in settings]


def test_back_as_it_was(tree: Tree, journal: Path) -> None:
    settings = Sysctls(journal, NAMES.get)
    assert settings.apply(add(DELAY)) == []
    assert tree["ipv4/neigh", "eth0", "proxy_delay"] == 0
    assert settings.remembered() == [DELAY]
    settings.apply(remove(DELAY))
    assert tree["ipv4/neigh", "eth0", "proxy_delay"] == 80
    assert not journal.exists()


def test_back_after_a_kill(tree: Tree, journal: Path) -> None:
    Sysctls(journal, NAMES.get).apply(add(DELAY))
    successor = Sysctls(journal, NAMES.get)
    assert successor.remembered() == [DELAY]
    successor.apply(remove(*successor.remembered()))
    assert tree["ipv4/neigh", "eth0", "proxy_delay"] == 80


def test_the_first_value_counts(tree: Tree, journal: Path) -> None:
    """Somebody resets it, we set it once more."""
    settings = Sysctls(journal, NAMES.get)
    settings.apply(add(DELAY))
    tree["ipv4/neigh", "eth0", "proxy_delay"] = 70
    settings.apply([Operation("replace", DELAY)])
    settings.apply(remove(DELAY))
    assert tree["ipv4/neigh", "eth0", "proxy_delay"] == 80


def test_somebody_elses_change_stays(tree: Tree, journal: Path) -> None:
    settings = Sysctls(journal, NAMES.get)
    settings.apply(add(DELAY))
    tree["ipv4/neigh", "eth0", "proxy_delay"] = 5
    settings.apply(remove(DELAY))
    assert tree["ipv4/neigh", "eth0", "proxy_delay"] == 5


def test_somebody_made_the_host_a_router(tree: Tree, journal: Path) -> None:
    """Docker, say, started while a guest ran: its forwarding is not switched off under it."""
    forwarding = Setting("ipv4/conf", 2, "forwarding", 1)
    settings = Sysctls(journal, NAMES.get)
    settings.apply(add(forwarding))
    tree["ipv4/conf", "all", "forwarding"] = 1
    settings.apply(remove(forwarding))
    assert tree["ipv4/conf", "eth0", "forwarding"] == 1


def test_journal_comes_first(tree: Tree, journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Sysctls(journal, NAMES.get)

    def killed(key: object, value: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(settings, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        settings.apply(add(DELAY))
    assert json.loads(journal.read_text()) == [["ipv4/neigh", 2, "proxy_delay", 80, 0]]


def test_nothing_is_written_without_a_journal(tree: Tree, journal: Path) -> None:
    settings = Sysctls(journal, NAMES.get)
    journal.parent.write_text("no directory")
    assert "cannot write" in settings.apply(add(DELAY))[0].text
    assert tree["ipv4/neigh", "eth0", "proxy_delay"] == 80


def test_copies_of_all(tree: Tree, journal: Path) -> None:
    """The kernel copies `all` to every interface: those that differed are as before, and are not taken for ours."""
    Sysctls(journal, NAMES.get).apply(add(FORWARDING))
    settings = Sysctls(journal, NAMES.get)
    assert settings.remembered() == [FORWARDING]
    tree["ipv6/conf", "br0", "forwarding"] = 0  # the kernel's doing when `all` becomes 0
    settings.apply(remove(FORWARDING))
    assert tree["ipv6/conf", "all", "forwarding"] == 0
    assert tree["ipv6/conf", "br0", "forwarding"] == 1
    assert not journal.exists()


def test_learners(tree: Tree, journal: Path) -> None:
    tree["ipv6/conf", "lo", "accept_ra"] = 0
    settings = Sysctls(journal, NAMES.get)
    assert settings.learners(NAMES) == (2,)  # br0 forwards: it has not learnt before
    accept = Setting("ipv6/conf", 2, "accept_ra", 2)
    settings.apply(add(accept, FORWARDING))
    tree["ipv6/conf", "br0", "forwarding"] = 1
    assert settings.learners(NAMES) == (2, 3)  # born since, for all we know


def test_gone_interface_and_unknown_setting(tree: Tree, journal: Path) -> None:
    settings = Sysctls(journal, NAMES.get)
    settings.apply(add(DELAY))
    gone = Sysctls(journal, {1: "lo"}.get)
    assert gone.remembered() == []
    assert gone.apply(remove(DELAY)) == []
    unknown = Setting("ipv6/conf", 2, "force_forwarding", 1)
    assert settings.present([unknown, DELAY]) == [DELAY]


@pytest.mark.parametrize("text", ["not json", "[]", "[1]", '[["one"]]', "{}"])
def test_journal_of_another_version(tree: Tree, journal: Path, text: str) -> None:
    journal.parent.mkdir()
    journal.write_text(text)
    assert Sysctls(journal, NAMES.get).remembered() == []
