"""A user of its own for each guest: QEMU of one can neither open, nor signal, nor trace what belongs to another.

A TPM has another one: what a guest that breaks into its QEMU must not take away. The numbers are set aside by the
package: subordinate IDs of kvmd-qemu (subuid(5)). A guest gets those that its name leads to, while they are free: the
same at each start, and after an upgrade. Names are for people: drop-in records that nss-systemd(8) and userdbctl(1)
show as long as the guest runs (systemd's docs/USER_RECORD).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

from kvmd.errors import StartFailed
from kvmd.qemu.process import User

OWNER = "kvmd-qemu"
NAMES = {"QEMU": "kv", "TPM": "kvtpm"}  # before the guest's; the first as its taps
RECORDS = Path("/run/userdb")
LONGEST = 31  # characters of a user's name (utmp(5))


def choose(guest: str, taken: Collection[int], of: str = "QEMU") -> User:
    """For a guest that is not running; ``taken``: user IDs of those that are. Raises ``StartFailed``."""
    ids = _range("/etc/subuid")
    if ids != _range("/etc/subgid"):
        raise StartFailed(f"the lines of {OWNER} in /etc/subuid and /etc/subgid are not the same (make them so)")
    first = int.from_bytes(hashlib.sha256((guest if of == "QEMU" else f"{guest} {of}").encode()).digest()[:8], "big")
    for attempt in range(len(ids)):
        if (uid := ids[(first + attempt) % len(ids)]) not in taken:
            return User(uid, uid)
    raise StartFailed(f"all {len(ids)} users of {OWNER} in /etc/subuid are in use")


def _range(file: str) -> range:
    try:
        for line in Path(file).read_text().splitlines():
            name, _, ids = line.partition(":")
            if name == OWNER:
                first, count = map(int, ids.split(":"))
                if count > 0 and 0 < first <= (1 << 32) - 1 - count:
                    return range(first, first + count)
        reason = f"has no usable line of {OWNER}"
    except (OSError, ValueError) as error:
        reason = f"cannot be read: {error}"
    raise StartFailed(f"there are no users for guests: {file} {reason} (dpkg-reconfigure kvmd makes one)")


def name(guest: str, of: str = "QEMU") -> str:
    """Of the guest's user and of its group; where it is too long its beginning and a hash."""
    full = f"{NAMES[of]}-{guest}"
    return full if len(full) <= LONGEST else f"{full[: LONGEST - 7]}-{hashlib.sha256(full.encode()).hexdigest()[:6]}"


def publish(guest: str, user: User, of: str = "QEMU") -> None:
    """Have people see the name. It is for show: where it cannot be written, they see the number."""
    with suppress(OSError):
        _withdraw(name(guest, of))
        if not RECORDS.is_dir():
            RECORDS.mkdir()
            RECORDS.chmod(0o755)
        for path, link, record in _records(name(guest, of), user, f"{of} of guest {guest}"):
            path.write_text(json.dumps(record))
            path.chmod(0o644)
            link.unlink(missing_ok=True)
            link.symlink_to(path.name)


def _records(name: str, user: User, real: str) -> Iterator[tuple[Path, Path, dict[str, object]]]:
    about = {"userName": name, "uid": user.uid, "gid": user.gid, "realName": real}
    about |= {"disposition": "system", "locked": True, "shell": "/usr/sbin/nologin", "homeDirectory": "/nonexistent"}
    yield RECORDS / f"{name}.user", RECORDS / f"{user.uid}.user", about
    group = {"groupName": name, "gid": user.gid, "disposition": "system"}
    yield RECORDS / f"{name}.group", RECORDS / f"{user.gid}.group", group


def withdraw(guest: str) -> None:
    """The guest has ended: its numbers are free."""
    for of in NAMES:
        _withdraw(name(guest, of))


def _withdraw(name: str) -> None:
    for kind in ("user", "group"):
        path = RECORDS / f"{name}.{kind}"
        with suppress(OSError, ValueError):
            record = json.loads(path.read_text())
            (RECORDS / f"{int(record['uid' if kind == 'user' else 'gid'])}.{kind}").unlink(missing_ok=True)
        with suppress(OSError):
            path.unlink(missing_ok=True)
