"""``[limits]``: systemd.resource-control(5) settings as StartTransientUnit wants them.

What systemd takes of a scope and what concerns a single QEMU in it: nothing below its cgroup, no BPF programs. MemoryZ…
and StartupMemory… are younger than systemd 252, which refuses them. The conversions are those of ``systemctl
set-property`` (src/shared/bus-unit-util.c). Values may be strings as in a unit file, or what TOML has for them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from ipaddress import IPv4Network, IPv6Network, ip_network
from socket import AddressFamily

from kvmd.config.toml_lines import show
from kvmd.config.values import Wrong, span
from kvmd.guest import Limit

INFINITY = 2**64 - 1
_SCALE = 2**32 - 1  # what 100 % is in a property named …Scale
_CPUS_MAX = 8192
_TRUE, _FALSE = ("1", "yes", "y", "true", "t", "on"), ("0", "no", "n", "false", "f", "off")
_SIZE = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([KMGTPE]?)B?")
_NETWORKS = {
    "any": ("0.0.0.0/0", "::/0"),
    "localhost": ("127.0.0.0/8", "::1/128"),
    "link-local": ("169.254.0.0/16", "fe80::/64"),
    "multicast": ("224.0.0.0/4", "ff00::/8"),
}

Convert = Callable[[str, object], Limit]


def _words(value: object) -> list[str]:
    """A setting that may be given more than once: a string, or a list of them."""
    items = value if isinstance(value, list) else [value]
    return [_string(item) for item in items]


def _string(value: object) -> str:
    """What would stand in a unit file."""
    if isinstance(value, str) and value.isprintable() and value.strip():
        return value.strip()
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and 0 <= value <= INFINITY:
        return str(value)
    raise Wrong(f"{show(value)} is not a setting of systemd", "write a string as in a unit file")


def _bytes(text: str, base: int) -> int:
    if text == "infinity":
        return INFINITY
    if match := _SIZE.fullmatch(text):
        whole, _, part = match[1].partition(".")
        unit: int = base ** " KMGTPE".index(match[2] or " ")
        value: int = int(whole) * unit + int(part or 0) * unit // 10 ** len(part)
        if value < INFINITY:
            return value
    raise Wrong(f"{show(text)} is not a size", 'write bytes, a number with K, M, G or T, or "infinity": "768M"')


def _permyriad(text: str) -> int | None:
    """Hundredths of a percent, as exact as systemd takes them."""
    match = re.fullmatch(r"([0-9]{1,7})(?:\.([0-9]{1,2}))?%", text)
    return int(match[1]) * 100 + int((match[2] or "").ljust(2, "0")) if match else None


def _share(text: str) -> int:
    share = _permyriad(text)
    if share is None or share > 10000:
        raise Wrong(f"{show(text)} is not a share", 'write at most "100%"')
    return (share * _SCALE + 5000) // 10000


def _number(text: str, least: int, most: int) -> int:
    if not re.fullmatch(r"[0-9]{1,20}", text) or not least <= int(text) <= most:
        raise Wrong(f"{show(text)} is not a number from {least} to {most}")
    return int(text)


def _microseconds(text: str) -> int:
    seconds = span(text)
    if not 0 < seconds < 1e12:
        raise Wrong(f"{show(text)} is out of range", 'write a time span: "100ms"')
    return round(seconds * 1_000_000)


def _boolean(name: str, value: object) -> Limit:
    text = _string(value).lower()
    if text not in _TRUE + _FALSE:
        raise Wrong(f"{show(value)} is neither true nor false", "write true or false")
    return Limit(name, "b", text in _TRUE)


def _memory(name: str, value: object) -> Limit:
    text = _string(value)
    if text.endswith("%"):
        return Limit(f"{name}Scale", "u", _share(text))
    return Limit(name, "t", _bytes(text, 1024))


def _tasks(name: str, value: object) -> Limit:
    text = _string(value)
    if text.endswith("%"):
        return Limit(f"{name}Scale", "u", _share(text))
    return Limit(name, "t", INFINITY if text == "infinity" else _number(text, 1, INFINITY - 1))


def _quota(name: str, value: object) -> Limit:
    share = _permyriad(_string(value))
    if not share:
        raise Wrong(f"{show(value)} is not a share of a CPU", 'write a percentage; one whole CPU is "100%"')
    return Limit("CPUQuotaPerSecUSec", "t", share * 100)


def _period(name: str, value: object) -> Limit:
    return Limit("CPUQuotaPeriodUSec", "t", _microseconds(_string(value)))


def _weight(name: str, value: object) -> Limit:
    return Limit(name, "t", _number(_string(value), 1, 10000))


def _cpu_weight(name: str, value: object) -> Limit:
    return Limit(name, "t", 0) if value == "idle" else _weight(name, value)


def _cpus(name: str, value: object) -> Limit:
    """A set as ``0-3,8``: bit after bit, the lowest first."""
    mask = 0
    for part in re.split(r"[\s,]+", " ".join(_words(value)).strip(", ")):
        match = re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < _CPUS_MAX:
            raise Wrong(f"{show(part)} is not a range of numbers", 'write numbers and ranges: "0-3,8"')
        mask |= (1 << last + 1) - (1 << first)
    return Limit(name, "ay", mask.to_bytes((mask.bit_length() + 7) // 8, "little"))


def _per_device(parse: Callable[[str], int], name: str, value: object) -> Limit:
    pairs = []
    for text in _words(value):
        path, _, rest = text.partition(" ")
        if not path.startswith("/") or not rest.strip():
            raise Wrong(f"{show(text)} is not a device and its limit", 'write both: "/dev/sda 10M"')
        pairs.append([path, parse(rest.strip())])
    return Limit(name.removesuffix("Sec") + "USec" if name.endswith("Sec") else name, "a(st)", pairs)


def _devices(name: str, value: object) -> Limit:
    pairs = []
    for text in _words(value):
        path, _, access = text.partition(" ")
        access = access.strip() or "rwm"
        if not re.fullmatch(r"/dev/.+|(?:char|block)-.+", path) or not re.fullmatch(r"[rwm]{1,3}", access):
            raise Wrong(f"{show(text)} is not a device and the access to it", 'write both: "/dev/sda r"')
        pairs.append([path, access])
    return Limit(name, "a(ss)", pairs)


def _networks(name: str, value: object) -> Limit:
    words = [word for text in _words(value) for word in text.split()]
    prefixes = [prefix for word in words for prefix in _NETWORKS.get(word, (word,))]
    return Limit(name, "a(iayu)", [_prefix(prefix) for prefix in prefixes])


def _prefix(text: str) -> list[object]:
    try:
        network: IPv4Network | IPv6Network = ip_network(text, strict=False)
    except ValueError as error:
        raise Wrong(f"{show(text)} is not an address or a prefix", 'write them as "10.1.1.0/24"') from error
    family = AddressFamily.AF_INET if network.version == 4 else AddressFamily.AF_INET6
    return [int(family), network.network_address.packed, network.prefixlen]


def _one_of(words: Iterable[str], name: str, value: object) -> Limit:
    text = _string(value)
    if text not in words:
        raise Wrong(f"{show(value)} is not known here", f"write one of {', '.join(words)}")
    return Limit(name, "s", text)


def _pressure(name: str, value: object) -> Limit:
    return Limit(name, "u", _share(_string(value)))


def _table(*rows: tuple[Convert, str]) -> Mapping[str, Callable[[object], Limit]]:
    return {name: partial(convert, name) for convert, names in rows for name in names.split()}


LIMITS = _table(
    (_memory, "MemoryMin MemoryLow MemoryHigh MemoryMax MemorySwapMax MemoryZSwapMax"),
    (_memory, "StartupMemoryLow StartupMemoryHigh StartupMemoryMax StartupMemorySwapMax StartupMemoryZSwapMax"),
    (_tasks, "TasksMax"),
    (_quota, "CPUQuota"),
    (_period, "CPUQuotaPeriodSec"),
    (_cpu_weight, "CPUWeight StartupCPUWeight"),
    (_weight, "IOWeight StartupIOWeight"),
    (partial(_per_device, partial(_number, least=1, most=10000)), "IODeviceWeight"),
    (partial(_per_device, partial(_bytes, base=1000)), "IOReadBandwidthMax IOWriteBandwidthMax"),
    (partial(_per_device, partial(_bytes, base=1000)), "IOReadIOPSMax IOWriteIOPSMax"),
    (partial(_per_device, _microseconds), "IODeviceLatencyTargetSec"),
    (_cpus, "AllowedCPUs StartupAllowedCPUs AllowedMemoryNodes StartupAllowedMemoryNodes"),
    (_boolean, "CPUAccounting MemoryAccounting IOAccounting TasksAccounting IPAccounting MemoryZSwapWriteback"),
    (_networks, "IPAddressAllow IPAddressDeny"),
    (_devices, "DeviceAllow"),
    (partial(_one_of, ("auto", "closed", "strict")), "DevicePolicy"),
    (partial(_one_of, ("auto", "kill")), "ManagedOOMSwap ManagedOOMMemoryPressure"),
    (_pressure, "ManagedOOMMemoryPressureLimit"),
    (partial(_one_of, ("none", "avoid", "omit")), "ManagedOOMPreference"),
)
