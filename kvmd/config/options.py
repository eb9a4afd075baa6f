"""What StartWith is given on the bus → options of one start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvmd.config.toml_lines import show
from kvmd.config.values import Parse, Wrong, choice, image
from kvmd.errors import InvalidOption
from kvmd.guest import StartOptions

OPTIONS: Mapping[str, Parse] = {"boot": choice("cdrom", "disk", "network"), "cdrom": image}


def parse_options(given: Mapping[str, object], uid: int = 0) -> StartOptions:
    """``uid``: of whom. Raises ``InvalidOption``."""
    options: dict[str, Any] = {}
    for name, value in given.items():
        if name not in OPTIONS:
            raise InvalidOption(f"there is no option {show(name)} (there are {', '.join(OPTIONS)})")
        try:
            options[name] = OPTIONS[name](value)
        except Wrong as wrong:
            raise InvalidOption(f"option {name}: {wrong.what} ({wrong.hint})") from wrong
    return StartOptions(**options, uid=uid if "cdrom" in options else 0)
