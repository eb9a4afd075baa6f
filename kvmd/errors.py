"""What can go wrong, each kind once: a D-Bus error name and one sentence a person can act on.

    KvmdError                         org.kvmd1.Error.Failed
    ├── NoSuchGuest                   no guest file of that name
    ├── InvalidConfiguration          a guest file that cannot be used; ``problems`` has every line
    ├── StartFailed                   QEMU, systemd or the host refused
    ├── NotRunning                    the guest is off
    ├── Busy                          the guest is in the middle of something else
    ├── Timeout                       waited as long as configured
    ├── Unavailable                   valid, but not possible on this host or in this version
    ├── AddressInUse                  another machine of the LAN answers for the address
    ├── InvalidOption                 org.freedesktop.DBus.Error.InvalidArgs: what a caller asks for is not known
    └── AccessDenied                  org.freedesktop.DBus.Error.AccessDenied

The sentence says what is wrong, where, and what to do. Only ``bus`` turns these into D-Bus replies.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace


class KvmdError(Exception):
    """Anything a person may be told; ``str()`` is the sentence."""

    dbus_name = "org.kvmd1.Error.Failed"


class NoSuchGuest(KvmdError):
    dbus_name = "org.kvmd1.Error.NoSuchGuest"


def plain(text: str) -> str:
    """One line of printable text, whatever was in it: file names need not be UTF-8."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


@dataclass(frozen=True, order=True)
class Problem:
    """One defect of one file; ``str()`` is the line ``FILE:LINE: KEY: what is wrong (what to do)``.

    ``private``: not everybody may read that file.
    """

    file: str
    line: int
    key: str
    what: str
    hint: str = ""
    private: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}: "
        key = f"{self.key}: " if self.key else ""
        hint = f" ({self.hint})" if self.hint else ""
        return plain(f"{where}{key}{self.what}{hint}")

    def for_everybody(self) -> Problem:
        """Without what the file says, if that is not for everybody."""
        if not self.private:
            return self
        return replace(self, what="cannot be used", hint="kvmd --check FILE says why to who may read it")


class InvalidConfiguration(KvmdError):
    dbus_name = "org.kvmd1.Error.InvalidConfiguration"

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = sorted(problems)
        super().__init__("; ".join(str(problem) for problem in self.problems))


class StartFailed(KvmdError):
    dbus_name = "org.kvmd1.Error.StartFailed"


class NotRunning(KvmdError):
    dbus_name = "org.kvmd1.Error.NotRunning"


class Busy(KvmdError):
    dbus_name = "org.kvmd1.Error.Busy"


class Timeout(KvmdError):
    dbus_name = "org.kvmd1.Error.Timeout"


class Unavailable(KvmdError):
    dbus_name = "org.kvmd1.Error.Unavailable"


class AddressInUse(KvmdError):
    dbus_name = "org.kvmd1.Error.AddressInUse"


class InvalidOption(KvmdError):
    dbus_name = "org.freedesktop.DBus.Error.InvalidArgs"


class AccessDenied(KvmdError):
    dbus_name = "org.freedesktop.DBus.Error.AccessDenied"
