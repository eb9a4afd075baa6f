"""The scope a guest's QEMU lives in, and the names systemd and D-Bus know a guest by."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from kvmd.guest import Guest, Share

# At host shutdown the daemon ends a guest within its stop_timeout; systemd waits this much longer before it kills.
STOP_MARGIN = 10.0

MS_REC = 1 << 14  # linux/mount.h: what is mounted below, too
FILES = 1 << 16  # that a virtiofsd may have open: one for each that its guest knows


def properties(guest: Guest, pid: int) -> list[tuple[str, str, object]]:
    """What StartTransientUnit is told: name, D-Bus signature and value of each property.

    ``RefuseManualStop`` because stopping a scope is SIGTERM, to a guest a power cut; ``kvmd@NAME.service`` stops
    gracefully. The order: that service ends before its scope, scopes before ``kvmd-guests.target``, this before the
    daemon; never directly after the daemon, a start would wait for itself.
    """
    return [
        ("Description", "s", guest.description or f"Guest {guest.name}"),
        ("Slice", "s", "machine.slice"),
        ("PIDs", "au", [pid]),
        ("After", "as", ["kvmd-guests.target"]),
        ("Before", "as", [guest.unit]),
        ("RefuseManualStop", "b", True),
        ("TimeoutStopUSec", "t", round((guest.stop_timeout + STOP_MARGIN) * 1_000_000)),
        ("CollectMode", "s", "inactive"),
        *((limit.property, limit.signature, limit.value) for limit in guest.limits.values()),
    ]


def tpm_properties(guest: Guest, pid: int) -> list[tuple[str, str, object]]:
    """As ``properties``, for the guest's TPM: at host shutdown it ends after QEMU, which ends it."""
    return [
        ("Description", "s", f"TPM of guest {guest.name}"),
        ("Slice", "s", "machine.slice"),
        ("PIDs", "au", [pid]),
        ("After", "as", ["kvmd-guests.target"]),
        ("Before", "as", [guest.scope, guest.unit]),
        ("RefuseManualStop", "b", True),
        ("TimeoutStopUSec", "t", round(STOP_MARGIN * 1_000_000)),
        ("CollectMode", "s", "inactive-or-failed"),
    ]


def share_properties(
    guest: Guest, share: Share, source: Path, command: Sequence[str], capabilities: int, root: Path, listener: int
) -> list[tuple[str, str, object]]:
    """As ``tpm_properties``, for the virtiofsd of a shared directory: a service, whose sandbox systemd makes.

    ``source``: what is to be /share in ``root``, an empty directory. Its standard input is ``listener``. Without
    ``user`` it is one that systemd makes up for it.
    """
    programs = [[path, path, True, MS_REC] for path in ("/usr", "/bin", "/lib", "/lib64")]
    shared = [[str(source), "/share", False, MS_REC]]
    return [
        ("Description", "s", f"{share.path} for guest {guest.name}"),
        ("Slice", "s", "machine.slice"),
        ("After", "as", ["kvmd-guests.target"]),
        ("Before", "as", [guest.scope, guest.unit]),
        ("RefuseManualStop", "b", True),
        ("TimeoutStopUSec", "t", round(STOP_MARGIN * 1_000_000)),
        ("CollectMode", "s", "inactive-or-failed"),
        ("Type", "s", "exec"),
        ("ExecStartEx", "a(sasas)", [[command[0], list(command), ["no-env-expand"]]]),
        ("StandardInputFileDescriptor", "h", listener),
        ("SyslogIdentifier", "s", "virtiofsd"),
        ("User", "s", share.user) if share.user else ("DynamicUser", "b", True),
        ("CapabilityBoundingSet", "t", capabilities),
        ("AmbientCapabilities", "t", capabilities),
        ("NoNewPrivileges", "b", True),
        ("RootDirectory", "s", str(root)),
        ("MountAPIVFS", "b", True),
        ("BindReadOnlyPaths", "a(ssbt)", programs + (shared if share.readonly else [])),
        *([] if share.readonly else [("BindPaths", "a(ssbt)", shared)]),
        ("PrivateNetwork", "b", True),
        ("PrivateIPC", "b", True),
        ("DevicePolicy", "s", "closed"),
        ("ProtectProc", "s", "invisible"),
        ("ProtectKernelTunables", "b", True),
        ("ProtectControlGroups", "b", True),
        ("RestrictRealtime", "b", True),
        ("RestrictSUIDSGID", "b", True),
        ("RestrictNamespaces", "t", 0),
        ("LockPersonality", "b", True),
        ("LimitNOFILE", "t", FILES),
        ("UMask", "u", 0o022),
    ]


def changed_limits(guest: Guest) -> list[tuple[str, str, object]]:
    """What SetUnitProperties is told. To a list systemd adds; an empty one clears it."""
    return [
        (limit.property, limit.signature, value)
        for limit in guest.limits.values()
        for value in ([[], limit.value] if limit.signature.startswith("a(") else [limit.value])
    ]


def blame(guest: Guest, refusal: str) -> str:
    """systemd's refusal, with the key of ``[limits]`` whose property it names."""
    named = set(re.findall(r"\w+", refusal))
    keys = [f"limits.{key}: " for key, limit in guest.limits.items() if limit.property in named]
    return "".join(keys[:1]) + refusal


def guest_name(scope: str) -> str:
    """The guest whose scope this is: ``kvmd-NAME.scope``."""
    return scope.removeprefix("kvmd-").removesuffix(".scope")


def escape(name: str) -> str:
    """A name as one element of an object path, like systemd's bus_label_escape()."""
    kept = re.compile(rb"[A-Za-z]|(?<=.)[0-9]", re.DOTALL)
    raw = name.encode()
    escaped = (chr(byte) if kept.match(raw, at) else f"_{byte:02x}" for at, byte in enumerate(raw))
    return "".join(escaped) or "_"


def unescape(label: str) -> str | None:
    """The name behind an element of an object path; None for what ``escape`` does not make."""
    raw = re.sub(rb"_([0-9a-f]{2})", lambda match: bytes.fromhex(match[1].decode()), label.encode())
    try:
        name = "" if label == "_" else raw.decode()
    except UnicodeDecodeError:
        return None
    return name if escape(name) == label else None
