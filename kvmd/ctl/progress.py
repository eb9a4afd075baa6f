"""What goes on, on the standard error: one line that changes at a terminal, else a line for each step."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import Self

from kvmd.ctl.table import cut, span


def colourful(stream: object = sys.stdout) -> bool:
    """NO_COLOR (no-color.org), SYSTEMD_COLORS=0, a dumb terminal or none have no colour."""
    is_terminal = getattr(stream, "isatty", lambda: False)()
    dumb = os.environ.get("TERM", "dumb") == "dumb" or os.environ.get("SYSTEMD_COLORS") in ("0", "no", "false")
    return bool(is_terminal and not os.environ.get("NO_COLOR") and not dumb)


def columns(stream: object = sys.stdout) -> int:
    """Of the terminal; 0 where there is none."""
    try:
        return os.get_terminal_size(stream.fileno()).columns  # type: ignore[attr-defined]
    except (OSError, AttributeError, ValueError):
        return 0


class Progress:
    """Of several things at once: what is said of one last is shown. Nothing of it stays at a terminal."""

    def __init__(self, *, silent: bool = False) -> None:
        self._live = sys.stderr.isatty() and not silent
        self._steps: dict[str, tuple[str, float]] = {}
        self._shown = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clear()

    def step(self, name: str, what: str) -> None:
        if self._steps.get(name, ("", 0.0))[0] != what:
            self._steps[name] = what, time.monotonic()
        self.draw()

    def done(self, name: str) -> None:
        self._steps.pop(name, None)
        self.draw()

    def draw(self) -> None:
        if not self._live:
            return
        now = time.monotonic()
        parts = [f"{name}: {what} ({span(now - since)})" for name, (what, since) in self._steps.items()]
        line = cut(" · ".join(parts), max(columns(sys.stderr) - 1, 20))
        sys.stderr.write(f"\r\033[K{line}")
        sys.stderr.flush()
        self._shown = bool(parts)

    def clear(self) -> None:
        if self._live and self._shown:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()
            self._shown = False
