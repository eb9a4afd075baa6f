"""As much of a shell as scripts that start QEMU need: words, quotes, variables; nothing is run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping

from kvmd.ctl.foreign.draft import NotReadable

ASSIGNMENT = re.compile(r"(?:export\s+|local\s+|declare\s+-\S+\s+)?([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)
VARIABLE = re.compile(r"\$(?:\{([A-Za-z_][A-Za-z0-9_]*)\}|([A-Za-z_][A-Za-z0-9_]*))")
ENDS = {";", "&", "&&", "|", "||", ";;"}


def read(text: str, environment: Mapping[str, str]) -> tuple[list[list[str]], dict[str, str]]:
    """Commands in their order, and the variables that the text sets. Raises ``NotReadable``."""
    variables, commands = dict(environment), list[list[str]]()
    own: dict[str, str] = {}
    for line in re.sub(r"\\\r?\n", " ", text).splitlines():
        for words in _commands(line):
            if re.match(r"\w+=\(", " ".join(words)) and words[-1].endswith(")"):
                words = [" ".join(words)]  # an array
            if len(words) == 1 and (match := ASSIGNMENT.fullmatch(words[0])):
                own[match[1]] = variables[match[1]] = expand(match[2], variables)
            elif words:
                commands.append(_expanded(words, variables))
    return commands, own


def _commands(line: str) -> list[list[str]]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
    lexer.whitespace_split = True
    lexer.commenters = ""
    try:
        words = list(lexer)
    except ValueError as error:
        raise NotReadable(f"a quotation does not end: {line.strip()[:60]!r}") from error
    commands: list[list[str]] = [[]]
    for word in words:
        if word.startswith("#"):
            break
        if word in ENDS:
            commands.append([])
        else:
            commands[-1].append(word)
    return commands


def _expanded(words: list[str], variables: Mapping[str, str]) -> list[str]:
    """A word that is one variable may stand for several options."""
    done: list[str] = []
    for word in words:
        value = expand(word, variables)
        several = VARIABLE.fullmatch(word) and value.startswith("-")
        done += value.split() if several else [value]
    return done


def expand(word: str, variables: Mapping[str, str]) -> str:
    """What is not set stays as it is written."""
    home = variables.get("HOME", "~")
    word = home + word[1:] if word == "~" or word.startswith("~/") else word
    return VARIABLE.sub(lambda match: variables.get(match[1] or match[2], match[0]), word)
