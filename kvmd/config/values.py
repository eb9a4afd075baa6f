"""One value of a guest file: from what TOML says to what is meant. Refused with ``Wrong``, a list with a group."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address, ip_address, ip_network
from pathlib import Path
from typing import Any
from uuid import UUID

from kvmd.config.toml_lines import show
from kvmd.guest import IMAGES, Address, Endpoint, Network

Parse = Callable[[object], Any]

VNC_PORT = 5900  # of display 0
ALTNAME = 127  # bytes; linux/if.h, ALTIFNAMSIZ
SIZE_HINT = 'write bytes, or a number with K, M, G or T: "512M"'
SPAN_HINT = 'write seconds, or a time span: "90s", "5min", "1h 30min"'
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_WEEK = 7 * 86400.0
MEGABYTE = 1 << 20
LEAST_PLAIN = 64 * MEGABYTE

# systemd.time(7), without months and years
_UNITS = {
    **dict.fromkeys(("us", "usec", "µs", "μs"), 1e-6),
    **dict.fromkeys(("ms", "msec"), 1e-3),
    **dict.fromkeys(("", "s", "sec", "second", "seconds"), 1.0),
    **dict.fromkeys(("m", "min", "minute", "minutes"), 60.0),
    **dict.fromkeys(("h", "hr", "hour", "hours"), 3600.0),
    **dict.fromkeys(("d", "day", "days"), 86400.0),
    **dict.fromkeys(("w", "week", "weeks"), _WEEK),
}
_SPAN = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([a-zµμ]*)\s*")

# What an address must not be; the property of ``ipaddress`` and its name.
_NO_HOST = {
    "is_multicast": "a multicast address",
    "is_loopback": "a loopback address",
    "is_unspecified": "the unspecified address",
    "is_link_local": "a link-local address",
}


class Wrong(ValueError):
    """What is wrong with a value, and what to do."""

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint


def text(value: object) -> str:
    if not isinstance(value, str):
        raise Wrong(f"{show(value)} is not a string", "put it in quotes")
    if "\0" in value:
        raise Wrong(f"{show(value)} has a NUL character in it", "remove it")
    return value


def secret(value: object) -> str:
    """Text that no error shows."""
    if not isinstance(value, str) or "\0" in value:
        raise Wrong("is not text", "write a string without NUL characters")
    return value


def line(value: object) -> str:
    if not text(value).isprintable():
        raise Wrong(f"{show(value)} is not one line of plain text", "remove the control characters")
    return text(value)


def word(value: object) -> str:
    if not re.fullmatch(r"[!-~]+", line(value)):
        raise Wrong(f"{show(value)} is not one word", "write it without spaces")
    return line(value)


def machine(value: object) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]+", line(value)):
        raise Wrong(
            f"{show(value)} is not the name of a machine",
            "see qemu-system-x86_64 -machine help; options of it go into [qemu] args",
        )
    return line(value)


def flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise Wrong(f"{show(value)} is neither true nor false", "write it without quotes")
    return value


def count(least: int, most: int) -> Parse:
    def parse(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise Wrong(f"{show(value)} is not a whole number", f"write a number from {least} to {most}")
        if not least <= value <= most:
            raise Wrong(f"{show(value)} is out of range", f"write a number from {least} to {most}")
        return value

    return parse


def either(words: Sequence[str]) -> str:
    """The words as a choice: "a", "b" or "c"."""
    return " or ".join(filter(None, (", ".join(map(show, words[:-1])), show(words[-1]))))


def choice(*words: str) -> Parse:
    def parse(value: object) -> str:
        if not isinstance(value, str) or value not in words:
            raise Wrong(f"{show(value)} is not known here", f"write {either(words)}")
        return value

    return parse


def size(value: object) -> int:
    """Bytes, a megabyte at least."""
    size = value
    if isinstance(value, str) and (match := re.fullmatch(r"([0-9]{1,19})([KMGT]?)", value)):
        size = int(match[1]) << 10 * _POWERS[match[2]]
    if isinstance(size, bool) or not isinstance(size, int):
        raise Wrong(f"{show(value)} is not a size", SIZE_HINT)
    if size < MEGABYTE:
        raise Wrong(f"{show(value)} is too small", 'write at least "1M"')
    if size >= 1 << 63:
        raise Wrong(f"{show(value)} is too large", SIZE_HINT)
    return size


def memory(value: object) -> int:
    """Bytes; a small number without a unit is another tool's number of KiB, libvirt's for one."""
    if isinstance(value, int) and MEGABYTE <= value < LEAST_PLAIN:
        hint = f'a number alone is bytes; write "{value >> 20}M", or "{value >> 10}M" if it is a number of KiB'
        raise Wrong(f"{show(value)} is {value >> 20} MiB", hint)
    return size(value)


def span(value: object) -> float:
    """Seconds of a systemd.time(7) span."""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1 << 63:
        return float(value)
    if isinstance(value, str) and value and not _SPAN.sub("", value):
        parts = _SPAN.findall(value)
        if all(unit in _UNITS for _, unit in parts):
            return sum(float(number) * _UNITS[unit] for number, unit in parts)
    raise Wrong(f"{show(value)} is not a time span", SPAN_HINT)


def timeout(value: object) -> float:
    if not 0 < span(value) <= _WEEK:
        raise Wrong(f"{show(value)} is out of range", "write more than nothing and at most a week")
    return span(value)


def list_of(parse: Parse) -> Parse:
    def parse_list(value: object) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise Wrong(
                f"{show(value)} is not a list",
                "put it in brackets" + (f": [{show(value)}]" if isinstance(value, str) else ""),
            )
        items: list[Any] = []
        wrong: list[Wrong] = []
        for written in value:
            try:
                item = parse(written)
                if item in items:
                    raise Wrong(f"{show(written)} is there twice", "remove one")
                items.append(item)
            except Wrong as error:
                wrong.append(error)
        if wrong:
            raise ExceptionGroup("in a list", wrong)
        return tuple(items)

    return parse_list


def boot_order(value: object) -> tuple[str, ...]:
    order: tuple[str, ...] = list_of(choice("disk", "cdrom", "network"))(value)
    if not order:
        raise Wrong("the list is empty", 'write at least one of "disk", "cdrom" and "network"')
    return order


_CANNOT_WORK = {
    "daemonize": "kvmd follows the process that it has started",
    **dict.fromkeys(("runas", "chroot"), "QEMU is not root, but a user that kvmd has chosen"),
    **dict.fromkeys(("h", "help", "version"), "QEMU prints it and ends"),
}


def arguments(value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise Wrong(f"{show(value)} is not a list", 'write each word by itself: ["-device", "usb-tablet"]')
    words = tuple(text(item) for item in value)
    for given, following in zip(words, (*words[1:], ""), strict=True):
        option = given.removeprefix("-").removeprefix("-") if given.startswith("-") else ""
        if option == "run-with" and re.search(r"(^|,)(user|chroot)=", following):
            given, option = f"{given} {following}", "runas"
        if why := _CANNOT_WORK.get(option):
            raise Wrong(f"{show(given)} cannot work here: {why}", "leave it out")
    return words


def image(value: object) -> Path:
    path = Path(line(value))
    if not path.name or ".." in path.parts:
        raise Wrong(f"{show(value)} is not the path of a file", 'name a file, without ".."')
    return IMAGES / path


def host_directory(value: object) -> Path:
    path = Path(line(value))
    if not path.is_absolute() or ".." in path.parts:
        raise Wrong(f"{show(value)} is not the absolute path of a directory", 'begin it with "/", without ".."')
    if not path.name:
        raise Wrong(f"{show(value)} is all there is on this host", "name a directory")
    return path


def tag(value: object) -> str:
    """What a guest mounts; virtio has room for 36 bytes."""
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,36}", line(value)):
        raise Wrong(f"{show(value)} cannot be a tag", 'use letters, digits and "_.-", at most 36')
    return line(value)


def usb_device(value: object) -> str:
    word = line(value).lower()
    if not re.fullmatch(r"[0-9a-f]{4}:[0-9a-f]{4}|[0-9]{1,3}-[0-9]{1,3}(\.[0-9]{1,3}){0,6}", word):
        hint = (
            'write vendor and product as lsusb shows them: "046d:c52b", or the port as lsusb -t and dmesg do: "1-1.2"'
        )
        raise Wrong(f"{show(value)} is not a USB device", hint)
    return word


def pci_device(value: object) -> str:
    """With its domain, which is 0000 where none is given."""
    match = re.fullmatch(r"([0-9a-f]{4}:)?([0-9a-f]{2}:[01][0-9a-f]\.[0-7])", line(value).lower())
    if not match:
        raise Wrong(
            f"{show(value)} is not the address of a PCI device", 'write it as lspci -D shows it: "0000:03:00.0"'
        )
    return f"{match[1] or '0000:'}{match[2]}"


def host_file(value: object) -> Path:
    path = Path(line(value))
    if not path.is_absolute() or not path.name or ".." in path.parts:
        raise Wrong(f"{show(value)} is not the absolute path of a file", 'begin it with "/", without ".."')
    return path


def endpoint(value: object) -> Endpoint:
    """Where QEMU's VNC server can listen: its port counts from 5900."""
    match = re.fullmatch(r"(\[[^]]*\]|[^:]*):([0-9]{1,5})", line(value))
    try:
        where = ip_address(match[1].strip("[]")) if match else None
    except ValueError:
        where = None
    if match is None or where is None or (where.version == 6) is not match[1].startswith("["):
        raise Wrong(f"{show(value)} is not an IP address with a port", 'write "127.0.0.1:5901" or "[::1]:5901"')
    if not VNC_PORT <= int(match[2]) <= 65535:
        raise Wrong(f"{show(value)} has a port that VNC cannot use", f"write one from {VNC_PORT} to 65535")
    return Endpoint(where, int(match[2]))


def pattern(value: object) -> re.Pattern[str]:
    try:
        return re.compile(text(value))
    except (re.error, OverflowError, RecursionError) as error:
        raise Wrong(f"{show(value)} is not a regular expression: {error}", "see pydoc3 re") from error


def uuid(value: object) -> UUID:
    if not re.fullmatch(r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}", text(value)):
        raise Wrong(f"{show(value)} is not a UUID", "make one with uuidgen, or remove the key for one that is stable")
    return UUID(text(value))


def interface(value: object, most: int = 15) -> str:
    """A name the kernel (dev_valid_name) and sysctl paths take, and no pattern for a new one ("tap%d")."""
    name = line(value)
    if not re.fullmatch(r"[!-$&-.0-9;-~]+", name) or len(name) > most or name in (".", "..", "all", "default"):
        hint = f'at most {most} characters, none of "/:%" or space'
        raise Wrong(f"{show(value)} is not the name of an interface", hint)
    return name


def uplink(value: object) -> str:
    """Also an alternative name (ip-link(8), altname)."""
    return interface(value, ALTNAME)


def mac(value: object) -> str:
    address = text(value).lower()
    if not re.fullmatch(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", address):
        digits = re.sub(r"[-:.]", "", address)
        hint = "write six pairs of hexadecimal digits: 52:54:00:12:34:56"
        if re.fullmatch(r"[0-9a-f]{12}", digits):
            hint = f'write "{":".join(re.findall("..", digits))}"'
        raise Wrong(f"{show(value)} is not a MAC address", hint)
    if int(address[:2], 16) & 1 or not address.strip("0:"):
        raise Wrong(f"{show(value)} is not the address of one machine", "begin it with 52:54:00")
    return address


def address(value: object) -> Address:
    written = text(value)
    try:
        address = ip_address(written)
    except ValueError as error:
        alone = written.partition("/")[0]
        if alone != written and _is_address(alone):
            hint = f"the prefix is the uplink's; write the address alone: {show(alone)}"
            raise Wrong(f"{show(value)} has a prefix length", hint) from error
        raise Wrong(f"{show(value)} is not an IP address", "write an IPv4 or an IPv6 address") from error
    for test, name in _NO_HOST.items():
        if getattr(address, test):
            raise Wrong(f"{show(value)} is {name}", "write an address of the LAN")
    if _is_reserved(address):
        raise Wrong(f"{show(value)} is not the address of a machine", "write an address of the LAN")
    return address


def _is_address(written: str) -> bool:
    try:
        ip_address(written)
    except ValueError:
        return False
    return True


def _is_reserved(address: Address) -> bool:
    if isinstance(address, IPv4Address):
        return address.is_reserved or address.packed[0] == 0
    return address.scope_id is not None or address.ipv4_mapped is not None


def network(value: object) -> Network:
    written = text(value)
    try:
        network = ip_network(written, strict=False)
    except ValueError as error:
        raise Wrong(f"{show(value)} is not a prefix", 'write address/length: "2001:db8:1:30::/64"') from error
    if "/" not in written:
        raise Wrong(f"{show(value)} has no prefix length", f"write {show(str(network))}, or put it under address")
    first = network.network_address
    if ip_address(written.partition("/")[0]) != first:
        raise Wrong(f"{show(value)} has bits set behind the prefix", f"write {show(str(network))}")
    if not network.prefixlen:
        raise Wrong(f"{show(value)} is the default route", "write the prefixes delegated to the guest")
    if first.is_multicast or first.is_loopback or first.is_link_local:
        raise Wrong(f"{show(value)} cannot be delegated to a guest", "write a prefix that is routed to this host")
    return network
