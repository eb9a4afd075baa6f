"""Other hosts, each by ssh and its own kvmctl: ssh carries what a bus cannot, descriptors and a terminal."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvmd.ctl.failure import NO_SUCH_GUEST, Failure

CONFIGURATION = Path("/etc/kvmd/kvmd.conf")
PATIENCE = 15  # seconds for a connection


def command(host: str, words: Sequence[str], *options: str) -> list[str]:
    return ["ssh", *options, "--", host, shlex.join(["kvmctl", *words])]


def group() -> list[str]:
    """group.hosts of kvmd.conf. Raises ``Failure``."""
    import tomllib

    try:
        hosts = tomllib.loads(CONFIGURATION.read_text()).get("group", {}).get("hosts", [])
    except FileNotFoundError:
        hosts = []
    except (OSError, ValueError) as error:
        raise Failure(f"cannot read {CONFIGURATION}: {error}") from error
    if not isinstance(hosts, list) or not hosts:
        raise Failure(f'{CONFIGURATION} names no hosts (write: [group], below it hosts = ["a.example", "b.example"])')
    return [str(host) for host in hosts]


async def there(host: str, words: Sequence[str]) -> Any:
    """What that host's kvmctl answers, as JSON; or a ``Failure`` with its name."""
    import asyncio
    import json

    options = ("-o", "BatchMode=yes", "-o", f"ConnectTimeout={PATIENCE}")
    pipe = asyncio.subprocess.PIPE
    try:
        process = await asyncio.create_subprocess_exec(
            *command(host, words, *options), stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe
        )
    except OSError as error:
        return Failure(f"cannot run ssh: {error.strerror} (install openssh-client)")
    said, complaint = await process.communicate()
    lines = complaint.decode(errors="replace").strip().splitlines() or [f"ssh ended with {process.returncode}"]
    try:
        found = json.loads(said)
    except ValueError:
        return Failure(f"{host}: {lines[-1]}")
    return found if process.returncode in (0, NO_SUCH_GUEST) else Failure(f"{host}: {lines[-1]}")
