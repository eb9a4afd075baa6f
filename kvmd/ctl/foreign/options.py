"""QEMU's way of writing options: key=value, with commas between them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

POWERS = {"": 0, "B": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def key_values(said: str, implied: str) -> dict[str, str]:
    """``,,`` is a comma; the first may be a value alone, of ``implied``; a key alone is on. JSON is flattened."""
    if said.startswith("{"):
        try:
            return dict(_flat(json.loads(said)))
        except ValueError:
            return {}
    given: dict[str, str] = {}
    for number, part in enumerate(re.split(r",(?!,)", said.replace(",,", "\0"))):
        part = part.replace("\0", ",")
        key, separator, value = part.partition("=")
        if not separator and number == 0:
            key, value = implied, part
        elif not separator and part:
            key, value = (part[2:], "off") if part.startswith("no") and part[2:] else (part, "on")
        if key:
            given[key] = f"{given[key]},{value}" if key in given else value
    return given


def _flat(values: Mapping[str, object], before: str = "") -> list[tuple[str, str]]:
    flat: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            flat += _flat(value, f"{before}{key}.")
        else:
            flat.append((f"{before}{key}", str(value).lower() if isinstance(value, bool) else str(value)))
    return flat


def on(said: str) -> bool:
    return said in ("on", "yes", "true", "y", "1")


def size(said: str, unit: int) -> int | None:
    """Bytes of a number that is of ``unit`` bytes where it says none."""
    match = re.fullmatch(r"([0-9]{1,12})([BKMGT]?)(?:i?B)?", said, re.IGNORECASE)
    if match is None:
        return None
    return int(match[1]) * (1 << POWERS[match[2].upper()] if match[2] else unit)
