"""What goes wrong, as a person is told: a sentence, and the exit status (those of systemctl)."""

from __future__ import annotations

FAILED, USAGE, NOT_RUNNING, NO_SUCH_GUEST, INTERRUPTED = 1, 2, 3, 4, 130

_STATUS = {"org.kvmd1.Error.NoSuchGuest": NO_SUCH_GUEST}


class Failure(Exception):
    """``name`` is that of the D-Bus error, if it was one."""

    def __init__(self, text: str, name: str = "", status: int | None = None) -> None:
        super().__init__(text)
        self.name = name
        self.status = _STATUS.get(name, FAILED) if status is None else status
