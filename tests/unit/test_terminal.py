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
    ],
)
def test_text(raw: bytes, reads: str) -> None:
    assert text(raw) == reads


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
