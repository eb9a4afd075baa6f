"""What a guest's terminal output reads like as text."""

from __future__ import annotations

import re

LONGEST = 16 << 10  # bytes; journald itself cuts at LineMax=, 48 K by default

# A line with its ending, or as much of one as fits an entry, if possible not cut within a character of UTF-8.
LINE = re.compile(
    rb"[^\n]{0,%d}\n|[^\n]{%d,%d}(?![\x80-\xbf])|[^\n]{1,%d}" % (LONGEST - 1, LONGEST - 3, LONGEST, LONGEST)
)

# ECMA-48: CSI sequences, OSC and other strings up to ST or BEL, two-character escapes; then C0 controls but tab.
ESCAPES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]PX^_].*?(?:\x1b\\|\x07|$)|\x1b[ -/]*[0-~]|[\x00-\x08\x0a-\x1f\x7f-\x9f]"
)


def complete(line: bytes) -> bool:
    """Whether a match of ``LINE`` is all there will be of it."""
    return line.endswith(b"\n") or len(line) >= LONGEST - 3


def text(line: bytes) -> str:
    """A line as it reads: without its ending, terminal control sequences and control characters."""
    decoded = line.rstrip(b"\r\n").decode(errors="replace")
    return ESCAPES.sub("", decoded.replace("\r", " ")) if not decoded.isprintable() else decoded
