"""The lab from the command line.

python3 -m lab prepare           build what tests need, side by side
python3 -m lab shell [RELEASE]   a host with kvmd and a LAN, to try things on
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from . import Host, deb, roots, vm
from .roots import RELEASES


def prepare() -> None:
    package = deb()

    def build(release: str) -> None:
        vm.image(release, package)
        vm.initrd(release)

    with ThreadPoolExecutor() as pool:
        work: list[Callable[[], object]] = [
            lambda: roots.layer("bookworm", package, "others"),
            roots.systems,
            roots.cloud,
        ]
        work += [partial(make, release) for make in (build, roots.workshop) for release in RELEASES.values()]
        for task in [pool.submit(each) for each in work]:
            task.result()


def shell(release: str) -> None:
    with Host(release, deb()) as host:
        host.lan.neighbour("alice", "192.0.2.20", "2001:db8:1::20")
        subprocess.run(host.enter(["env", "TERM=linux", "bash", "-l"]), check=False)


match sys.argv[1:]:
    case ["prepare"]:
        prepare()
    case ["shell"]:
        shell(roots.own_release())
    case ["shell", release]:
        shell(release)
    case _:
        sys.exit(__doc__)
