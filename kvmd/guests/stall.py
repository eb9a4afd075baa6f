"""Why a guest that is on stands still: what QEMU says of it, by events and when it is asked (qapi/run-state.json)."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from kvmd.errors import plain
from kvmd.guest import Guest

LONGEST = 100  # characters of a word of QEMU's
MOST_TOLD = 16  # errors that a guest is told of, and so are we
REASONS = {
    "paused": "",
    "prelaunch": "",  # -S
    "suspended": "asleep (ACPI S3)",
    "io-error": "a disk is full, or failed",
    "shutdown": "it has powered off (-no-shutdown)",
    "internal-error": "its processor failed (internal-error, see QEMU's messages)",
}
ASLEEP = REASONS["suspended"]


class Stall:
    """``reason`` is None while the guest goes on, and empty where somebody just paused it."""

    def __init__(self, guest: Guest) -> None:
        self._paths = {f"disk{number}": str(disk.path) for number, disk in enumerate(guest.disks)}
        self._paths |= {f"cdrom{number}": str(cdrom.path or "") for number, cdrom in enumerate(guest.cdroms)}
        self._told: set[str] = set()
        self.reason: str | None = None
        self.blocked = asyncio.Event()  # by a disk: it goes on only as far as to the same error

    def name(self, drive: str, path: str) -> None:
        """What is in a CD drive now."""
        self._paths[drive] = path

    def hear(self, event: str, data: Mapping[str, Any]) -> str:
        """Returns what is news of a disk, for a warning, or nothing."""
        match event:
            case "STOP" if self.reason is None:
                self.reason = ""
            case "SUSPEND":
                self.reason = ASLEEP
            case "RESUME" | "WAKEUP":
                self._go()
            case "BLOCK_IO_ERROR":
                return self._failed(data)
        return ""

    def _go(self) -> None:
        self.reason = None
        self.blocked.clear()

    def _failed(self, data: Mapping[str, Any]) -> str:
        path = self._path(str(data.get("node-name", "")), str(data.get("qom-path", "")))
        what = f"disk full: {path}" if data.get("nospace") is True else f"disk failed: {path}"
        what += f" ({_word(data['reason'])})" if data.get("nospace") is not True and data.get("reason") else ""
        if data.get("action") == "stop":
            if self.blocked.is_set():  # one of many requests
                return ""
            self.reason = what
            self.blocked.set()
            return f"stands still: {what}"
        if what in self._told or len(self._told) >= MOST_TOLD:
            return ""
        self._told.add(what)
        return f"was told of an error: {what}"

    def look(self, status: object, drives: object) -> str:
        """As ``hear``, of the answers to query-status and, where it says io-error, to query-block."""
        if status == "running":
            self._go()
            return ""
        word = _word(status)
        self.reason = REASONS.get(word, f"QEMU says {word}")
        if word != "io-error":
            return ""
        for drive in drives if isinstance(drives, list) else ():
            if isinstance(drive, dict) and drive.get("io-status") in ("nospace", "failed"):
                inserted = drive.get("inserted")
                node = str(inserted.get("node-name", "")) if isinstance(inserted, dict) else ""
                path = self._path(node, str(drive.get("qdev", "")))
                self.reason = f"disk {'full' if drive['io-status'] == 'nospace' else 'failed'}: {path}"
                break
        self.blocked.set()
        return f"stands still: {self.reason}"

    def _path(self, node: str, device: str) -> str:
        """QEMU knows a drive by its node, and by its device: /machine/peripheral/disk0/virtio-backend."""
        for word in (node, *device.split("/")):
            if self._paths.get(word):
                return self._paths[word]
        return _word(node) or "of [qemu] args"


def _word(value: object) -> str:
    return plain(str(value)[:LONGEST])
