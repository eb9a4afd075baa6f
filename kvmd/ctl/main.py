"""kvmctl's arguments and exit status; on another host its own kvmctl does the work."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from kvmd.ctl.failure import FAILED, INTERRUPTED, Failure
from kvmd.ctl.parser import parser


def main(words: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if words is None else words)
    arguments = parser().parse_args(given)
    try:
        if arguments.host:
            return _elsewhere(arguments, given)
        import asyncio  # later than --help: it takes as long to load as all the rest

        return int(asyncio.run(import_module(f"kvmd.ctl.{arguments.room}").run(arguments)))
    except Failure as failure:
        complain(failure, as_json=arguments.json)
        return failure.status
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever reads has enough: head(1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def complain(failure: Failure, *, as_json: bool) -> None:
    import json

    text = json.dumps({"error": failure.name or None, "message": str(failure)}) if as_json else f"kvmctl: {failure}"
    print(text, file=sys.stderr)


def _elsewhere(arguments: argparse.Namespace, words: list[str]) -> int:
    """By ssh, in place of this process."""
    from kvmd.ctl.hosts import command

    kept, skip = [], False
    for word in words:
        if skip or word in ("-H", "--host"):
            skip = not skip
        elif not word.startswith("--host=") and not (word.startswith("-H") and len(word) > 2):
            kept.append(word)
    terminal = ["-t"] if sys.stdin.isatty() and sys.stdout.isatty() else []
    try:
        os.execvp("ssh", command(arguments.host, kept, *terminal))
    except OSError as error:
        raise Failure(f"cannot run ssh: {error.strerror} (install openssh-client)") from error
