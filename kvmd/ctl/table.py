"""Plain columns, and numbers as people read them."""

from __future__ import annotations

from collections.abc import Sequence
from unicodedata import combining, east_asian_width

RESET = "\033[0m"
COLOURS = {
    "running": "\033[32m",
    "starting": "\033[33m",
    "stopping": "\033[33m",
    "paused": "\033[33m",
    "failed": "\033[1;31m",
}


def width(text: str) -> int:
    """Columns of a terminal."""
    return sum(0 if combining(char) else 2 if east_asian_width(char) in "WF" else 1 for char in text)


def cut(text: str, most: int) -> str:
    """To so many columns, with an ellipsis where something is missing."""
    if width(text) <= most:
        return text
    while text and width(text) > most - 1:
        text = text[:-1]
    return f"{text}…" if most > 0 else ""


def render(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, columns: int = 0, colour: bool = False, legend: bool = True
) -> list[str]:
    """Lines; ``columns``: the last column is cut for a terminal so wide; ``colour``: words of state have theirs."""
    lines = [list(head), *map(list, rows)] if legend else list(map(list, rows))
    widths = [max((width(row[column]) for row in lines), default=0) for column in range(len(head))]
    used = sum(widths[:-1]) + 2 * (len(head) - 1)
    shown = []
    for number, row in enumerate(lines):
        if columns:
            row[-1] = cut(row[-1], max(columns - used, 8))
        padded = [cell + " " * (size - width(cell)) for cell, size in zip(row, widths, strict=True)]
        if colour and not (legend and number == 0):
            padded = [
                f"{COLOURS[cell]}{pad}{RESET}" if cell in COLOURS else pad
                for cell, pad in zip(row, padded, strict=True)
            ]
        shown.append("  ".join(padded).rstrip())
    return shown


def span(seconds: float) -> str:
    """The two largest units: ``3d 4h``, ``5min 2s``, ``0.8s``."""
    if seconds < 10:
        return f"{max(seconds, 0):.1f}s"
    left = int(seconds)
    parts: list[str] = []
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        count, left = divmod(left, size)
        if count or parts:
            parts.append(f"{count}{unit}")
    return " ".join(part for part in parts[:2] if not part.startswith("0"))


def size(count: int) -> str:
    """Bytes, in powers of 1024: ``512M``, ``1.5G``."""
    amount = float(count)
    for unit in ("B", "K", "M", "G", "T"):
        if amount < 1024 or unit == "T":
            return f"{amount:.1f}{unit}" if amount < 10 and unit not in "BK" and amount % 1 else f"{amount:.0f}{unit}"
        amount /= 1024
    raise AssertionError
