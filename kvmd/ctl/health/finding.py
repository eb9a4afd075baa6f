"""One line of kvmctl doctor."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

State = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Finding:
    """``failed``: it stops guests. ``hint``: what to do."""

    check: str
    state: State
    text: str
    hint: str = ""

    def json(self) -> dict[str, str]:
        return asdict(self)


def ok(check: str, text: str, hint: str = "") -> Finding:
    return Finding(check, "ok", text, hint)


def warning(check: str, text: str, hint: str = "") -> Finding:
    return Finding(check, "warning", text, hint)


def failed(check: str, text: str, hint: str = "") -> Finding:
    return Finding(check, "failed", text, hint)
