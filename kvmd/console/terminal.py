"""What a guest's terminal output reads like as text."""

from __future__ import annotations

import re

LONGEST = 16 << 10  # bytes; journald itself cuts at LineMax=, 48 K by default

# A line with its ending, or as much of one as fits an entry, if possible not cut within a character of UTF-8.
LINE = re.compile(
    rb"[^\n]{0,%d}\n|[^\n]{%d,%d}(?![\x80-\xbf])|[^\n]{1,%d}" % (LONGEST - 1, LONGEST - 3, LONGEST, LONGEST)
)

# Not seen itself, but makes text look like another, or hides it (UAX #9, UTS #39, Default_Ignorable_Code_Point):
# bidirectional controls, separators of lines and paragraphs, zero width space, invisible operators, annotations, tags.
# Not the joiners U+200C and U+200D, which scripts need, nor a variation selector by itself, which chooses a glyph.
SELECTORS = "\ufe00-\ufe0f\U000e0100-\U000e01ef"
DECEIVERS = (
    "\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff0-\ufffb"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e00ff\U000e01f0-\U000e0fff"
)

# ECMA-48: CSI sequences, OSC and other strings up to ST or BEL, two-character escapes; then C0 controls but tab.
ESCAPES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]PX^_].*?(?:\x1b\\|\x07|$)|\x1b[ -/]*[0-~]|[\x00-\x08\x0a-\x1f\x7f-\x9f]"
    f"|[{DECEIVERS}]|(?<=[{SELECTORS}])[{SELECTORS}]+"
)


def complete(line: bytes) -> bool:
    """Whether a match of ``LINE`` is all there will be of it."""
    return line.endswith(b"\n") or len(line) >= LONGEST - 3


def text(line: bytes) -> str:
    """A line as it reads: without its ending, terminal control sequences, control and invisible characters."""
    decoded = line.rstrip(b"\r\n").decode(errors="replace")
    if decoded.isascii() and decoded.isprintable():
        return decoded
    return ESCAPES.sub("", decoded.replace("\r", " "))
