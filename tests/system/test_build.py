"""The package as a file: the same tree gives the same bytes, here and anywhere, and lintian has nothing to say."""

from __future__ import annotations

import io
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePath

import lab
import pytest

ROOT = Path(__file__).resolve().parents[2]
NOBODY = 65534
RELEASES = list(lab.roots.RELEASES.values())


@pytest.fixture
def elsewhere() -> Iterator[Path]:
    """The tree in another directory, without git, of another user with another umask."""
    with tempfile.TemporaryDirectory() as name:
        script = 'umask 077; tar -C "$1" -c --exclude=.git --exclude=dist . | tar -C "$2" -x --no-same-permissions -m'
        subprocess.run(["sh", "-c", script, "copy", ROOT, name], check=True)
        subprocess.run(["chown", "-R", str(NOBODY), name], check=True)
        yield Path(name)


def test_same_tree_same_bytes(deb: Path, elsewhere: Path) -> None:
    done = subprocess.run(
        [elsewhere / "packaging/build-deb"], user=NOBODY, group=NOBODY, extra_groups=[], umask=0o077,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    built = Path(done.stdout.splitlines()[-1])
    assert built == elsewhere / "dist" / deb.name
    assert built.read_bytes() == deb.read_bytes()


@pytest.mark.parametrize("release", RELEASES)
def test_lintian(release: str, deb: Path, elsewhere: Path) -> None:
    (elsewhere / deb.name).write_bytes(deb.read_bytes())
    assert lab.roots.work(release, elsewhere, f"lintian --fail-on error,warning {deb.name}") == ""


def test_the_other_debian_builds_the_same(deb: Path, elsewhere: Path) -> None:
    """Not the same bytes, as its debhelper is another: the same files, and the same relations."""
    (other,) = set(RELEASES) - {lab.roots.own_release()}
    built = Path(lab.roots.work(other, elsewhere, "packaging/build-deb").splitlines()[-1])
    packages = [deb, elsewhere / built.relative_to("/mnt")]
    for part in ("control", "md5sums"):
        ours, theirs = (subprocess.check_output(["dpkg-deb", "--info", path, part], text=True) for path in packages)
        assert theirs == ours


def test_two_versions(elsewhere: Path) -> None:
    """There is no package whose version the daemon does not know."""
    module = elsewhere / "kvmd/__init__.py"
    module.write_text(module.read_text().replace('__version__ = "', '__version__ = "9.'))
    done = subprocess.run([elsewhere / "packaging/build-deb"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "kvmd/__init__.py says version '9." in done.stderr.splitlines()[-1]
    assert not (elsewhere / "dist").exists()


def test_every_file_has_its_place(deb: Path) -> None:
    contents = subprocess.check_output(["dpkg-deb", "--fsys-tarfile", deb])
    with tarfile.open(fileobj=io.BytesIO(contents)) as archive:
        packed = {PurePath("/", member.name) for member in archive if member.isfile()}
    files = [path for name in ("kvmd", "units", "dbus") for path in (ROOT / name).rglob("*") if path.is_file()]
    ours = [path.relative_to(ROOT) for path in files if "__pycache__" not in path.parts]
    assert {PurePath("/usr/lib/kvmd", path) for path in ours if path.parts[0] == "kvmd"} < packed
    assert {path.name for path in ours} < {path.name for path in packed}
