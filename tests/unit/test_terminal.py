import time

import pytest

from kvmd.console.terminal import LINE, LONGEST, complete, text


@pytest.mark.parametrize(
    ("raw", "reads"),
    [
        (b"plain\n", "plain"),
        (b"dos\r\n", "dos"),
        (b"\x1b[2J\x1b[1;31mred\x1b[0m\n", "red"),
        (b"\x1b]0;title\x07after\n", "after"),
        (b"\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\\n", "link"),
        (b"\x1b(Bascii\n", "ascii"),
        (b"tab\tstays, \x00nul\x08 and \x7fgo\n", "tab\tstays, nul and go"),
        ("é".encode() + b"\xff\n", "é\ufffd"),
        (b"10%\r20%\n", "10% 20%"),
        (b"\n", ""),
        (b"cut off \x1b[3", "cut off 3"),
        ("user\u202eecived\u202c \u2066x\u2069\u061c\u200e\u200f".encode(), "userecived x"),
        ("one\u2028two\u2029three\x85four".encode(), "onetwothreefour"),
        ("hidden\U000e0001\U000e0041\U000e007f\U000e0fff.".encode(), "hidden."),
        ("\ufeffsu\u200bdo\u2060\u2063\u206f \ufff9a\ufffab\ufffb\U0001d173".encode(), "sudo ab"),
        ("\u2764\ufe0f\ufe0e\U000e0100\U000e01ef \u845b\U000e0100".encode(), "\u2764\ufe0f \u845b\U000e0100"),
        (
            "\u0645\u06cc\u200c\u062e \U0001f469\u200d\U0001f680".encode(),
            "\u0645\u06cc\u200c\u062e \U0001f469\u200d\U0001f680",
        ),
    ],
)
def test_text(raw: bytes, reads: str) -> None:
    assert text(raw) == reads


@pytest.mark.parametrize(
    "piece",
    [
        "\x1b]",
        "\x1b[",
        "\x1b[0",
        "\x1bP\x1b",
        "\x1b ",
        "\x1b",
        "\x1b]\x1b",
        "\x1b[" + "0 " * 99,
        "\ufe0f",
        "\u202e",
        "0;",
    ],
)
def test_a_hostile_line_takes_no_more_time_than_another(piece: str) -> None:
    """Of 16 KiB: some milliseconds; it would be seconds if it grew with the square."""
    for start in (b"", b"\x1b[", b"\x1b]", b"\x1b "):
        line = start + piece.encode() * (LONGEST // len(piece.encode()))
        begun = time.process_time()
        text(line)
        assert time.process_time() - begun < 0.1


def test_lines_lose_nothing() -> None:
    raw = b"a\n\nb" + b"x" * (3 * LONGEST) + b"\n" + b"y" * (LONGEST - 1) + b"\n" + b"end"
    pieces = LINE.findall(raw)
    assert b"".join(pieces) == raw
    assert max(map(len, pieces)) <= LONGEST


def test_long_lines_are_cut_between_characters() -> None:
    for start in (b"", b"x", b"xx"):
        pieces = LINE.findall(start + "€".encode() * LONGEST + b"\n")
        assert all(complete(piece) for piece in pieces)
        assert "\ufffd" not in "".join(map(text, pieces))
    assert [len(piece) for piece in LINE.findall(b"\x80" * (LONGEST + 1))] == [LONGEST, 1]
    assert not complete(b"login: ")
