"""Guest files: each of guestfiles/pass and guestfiles/fail gives exactly what stands in the .ok file beside it."""

from __future__ import annotations

import time
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from kvmd.config.guestfile import GuestFile, HostIds, conflicts, derived_tap, parse, parse_defaults
from kvmd.config.options import parse_options
from kvmd.config.toml_lines import Document
from kvmd.errors import InvalidConfiguration, InvalidOption
from kvmd.guest import AS_ALWAYS, Cdrom, Guest, StartOptions

FILES = Path(__file__).parent / "guestfiles"
HOST = HostIds("0123456789abcdef0123456789abcdef")
CONF = Path("/etc/kvmd/kvmd.conf")


def guest(text: str, name: str = "web", defaults: str = "") -> Guest:
    return load(text, name, defaults).guest


def load(text: str, name: str = "web", defaults: str = "") -> GuestFile:
    return parse(text, Path(f"/etc/kvmd/{name}.toml"), HOST, parse_defaults(defaults, CONF))


def problems(text: str | bytes, defaults: str = "") -> list[str]:
    with pytest.raises(InvalidConfiguration) as caught:
        parse(text, Path("web.toml"), HOST, parse_defaults(defaults, CONF))
    return [str(problem) for problem in caught.value.problems]


def describe(thing: Any, name: str) -> list[str]:
    """What differs from a guest that says nothing, a line each."""
    if isinstance(thing, dict):
        return [line for key, item in thing.items() for line in describe(item, f"{name}[{key}]")]
    if isinstance(thing, tuple) and any(is_dataclass(item) for item in thing):
        return [line for number, item in enumerate(thing) for line in describe(item, f"{name}[{number}]")]
    if not is_dataclass(thing):
        return [f"{name} = {thing}"]
    said = []
    for field in fields(thing):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        value = getattr(thing, field.name)
        if value != default:
            said += describe(value, f"{name}.{field.name}")
    return said


def cases(directory: str) -> list[Any]:
    return [pytest.param(file, id=file.stem) for file in sorted((FILES / directory).glob("*.toml"))]


@pytest.mark.parametrize("file", cases("pass"))
def test_pass(file: Path) -> None:
    said = describe(parse(file.read_bytes(), Path(file.name), HOST).guest, "guest")
    assert said == file.with_suffix(".ok").read_text().splitlines()


@pytest.mark.parametrize("file", cases("fail"))
def test_fail(file: Path) -> None:
    with pytest.raises(InvalidConfiguration) as caught:
        parse(file.read_bytes(), Path(file.name), HOST)
    said = [str(problem) for problem in caught.value.problems]
    assert said == file.with_suffix(".ok").read_text().splitlines()
    assert all(line.isprintable() and len(line) < 250 for line in said)


def test_two_screens_at_one_address() -> None:
    screen = '[display]\nvnc = true\naddress = "127.0.0.1:5901"\n'
    clash = conflicts([load(screen, "a"), load(screen, "b"), load("[display]\nvnc = true", "c")])
    assert [str(problem) for problem in clash] == [
        '/etc/kvmd/b.toml:3: display.address: "127.0.0.1:5901" is already used by guest a (choose another)'
    ]
    assert guest("[display]\naddress = '127.0.0.1:5901'\nvnc = true").display.password_file is None
    default = '[display]\nvnc = true\npassword_file = "/p"'
    assert guest("", defaults=default).display == guest("[display]\nvnc = true").display
    assert guest("machine = 'microvm'", defaults=default).display == guest("").display


def test_every_file_has_an_answer() -> None:
    names = {path.with_suffix("") for path in FILES.glob("*/*.toml")}
    assert names == {path.with_suffix("") for path in FILES.glob("*/*.ok")}


def doubts(text: str) -> list[str]:
    return [str(doubt) for doubt in parse(text, Path("a.toml"), HOST).doubts]


def test_doubts_of_what_an_installer_cannot_see() -> None:
    windows = """
        profile = "windows"
        disk = [{ path = "a" }, { path = "b", bus = "virtio" }, { path = "c", bus = "nvme" }]
        network = [{}, { model = "virtio" }]
    """
    assert doubts(windows) == [
        "a.toml:3: disk.bus: the installer of Windows sees no disk on virtio "
        '(set bus = "sata", or add a [[cdrom]] with drivers)',
        'a.toml:4: network.model: Windows has no driver for virtio of its own (set model = "e1000e")',
        'a.toml:1: memory: the installer of Windows wants 2 GiB at least (set memory = "4G")',
    ]
    drivers = '\ncdrom = [{ path = "windows.iso" }, { path = "virtio-win.iso" }]\nmemory = "4G"'
    assert doubts(windows + drivers) == []
    legacy = 'profile = "legacy"\ndisk = [{ path = "a", bus = "nvme" }]\nnetwork = [{ model = "e1000e" }, {}]'
    assert doubts(legacy) == [
        'a.toml:2: disk.bus: the installer of a system of old sees no disk on nvme (set bus = "ide")',
        'a.toml:3: network.model: a system of old has no driver for e1000e of its own (set model = "rtl8139")',
    ]
    assert doubts('profile = "bsd"\ndisk = [{ path = "a" }]\nnetwork = [{}]') == []


def test_options_of_one_start() -> None:
    assert parse_options({}) == AS_ALWAYS
    options = parse_options({"boot": "cdrom", "cdrom": "freebsd.iso"})
    assert options == StartOptions("cdrom", Path("/var/lib/kvmd/images/freebsd.iso"))
    for given, said in (
        ({"boot": "floppy"}, 'option boot: "floppy" is not known here (write "cdrom", "disk" or "network")'),
        ({"cdrom": 7}, "option cdrom: 7 is not a string (put it in quotes)"),
        ({"size": "1G"}, 'there is no option "size" (there are boot, cdrom)'),
    ):
        with pytest.raises(InvalidOption) as caught:
            parse_options(given)
        assert str(caught.value) == said


def test_a_guest_as_it_is_for_one_start() -> None:
    text = 'boot.kernel = "vmlinuz"\ndisk = [{ path = "a" }]\ncdrom = [{ path = "b" }, { path = "c" }]'
    guest = parse(text, Path("a.toml"), HOST).guest
    once = guest.started_with(StartOptions("cdrom", Path("/iso")))
    assert [str(cdrom.path) for cdrom in once.cdroms] == ["/iso", "/var/lib/kvmd/images/c"]
    assert (once.boot.kernel, once.serial.screen) == (None, True)
    assert guest.started_with(AS_ALWAYS) == guest
    assert replace(guest, cdroms=()).started_with(StartOptions(cdrom=Path("/iso"))).cdroms == (Cdrom(Path("/iso")),)
    assert once.lacks("network")
    assert not once.lacks("cdrom")
    assert not guest.lacks(None)


# kvmd.conf


def test_a_group_of_hosts_has_one_identity() -> None:
    text, conf = "[[network]]\n", parse_defaults('[group]\nidentity = "blue"\nhosts = ["a", "b"]\n', CONF)
    files = [parse(text, Path("/etc/kvmd/web.toml"), HostIds(digit * 32), conf).guest for digit in "12"]
    assert files[0] == files[1]
    alone = parse(text, Path("/etc/kvmd/web.toml"), HostIds("1" * 32)).guest
    assert alone.uuid != files[0].uuid
    assert alone.nics[0].mac != files[0].nics[0].mac


def test_defaults_lie_underneath() -> None:
    defaults = """
        memory = "2G"
        cpus = 4
        [boot]
        order = ["network"]
        cmdline = "quiet"
        [disk]
        format = "raw"
        bus = "scsi"
        [network]
        uplink = "lan0"
        [limits]
        TasksMax = 64
        CPUWeight = 10
    """
    web = guest(
        """
        cpus = 2
        [[disk]]
        path = "a"
        [[disk]]
        path = "b"
        bus = "nvme"
        [[network]]
        [limits]
        CPUWeight = 20
        """,
        defaults=defaults,
    )
    assert (web.memory, web.cpus) == (2 << 30, 2)
    assert [(disk.format, disk.bus) for disk in web.disks] == [("raw", "scsi"), ("raw", "nvme")]
    assert web.nics[0].uplink == "lan0"
    assert [(limit.property, limit.value) for limit in web.limits.values()] == [("TasksMax", 64), ("CPUWeight", 20)]
    assert web.boot.order == ("network",)
    assert web.boot.cmdline == ""  # of no use without a kernel
    assert guest('boot.kernel = "k"', defaults=defaults).boot.cmdline == "quiet"
    assert not guest("", defaults=defaults).disks
    assert not guest("", defaults=defaults).nics


@pytest.mark.parametrize(
    ("text", "defaults", "timeout"),
    [
        ("", "", None),
        ('[vsock]\nready_timeout = "9s"', "", None),
        ("[vsock]\nready = true", "", 300),
        ('[vsock]\nready = true\nready_timeout = "9s"', "", 9),
        ("", '[vsock]\nready = true\nready_timeout = "9s"', 9),
        ("vsock.ready = false", "[vsock]\nready = true", None),
        ('machine = "microvm"', "[vsock]\nready = true", None),
        ('serial = { ready = "login:", ready_timeout = 8 }', "vsock = { ready = true, ready_timeout = 9 }", 8),
        ("vsock = { ready = true, ready_timeout = 9 }", 'serial = { ready = "login:", ready_timeout = 8 }', 9),
    ],
)
def test_a_guest_says_in_one_way_that_it_is_ready(text: str, defaults: str, timeout: float | None) -> None:
    web = guest(text, defaults=defaults)
    assert web.ready_timeout == timeout
    assert not (web.serial.ready and web.vsock.ready)


def test_inherited_creation_is_dropped_where_nothing_is_created() -> None:
    defaults = 'disk = { base = "debian.qcow2", size = "8G" }'
    text = 'disk = [{ path = "a" }, { path = "b", format = "raw" }, { path = "c", readonly = true }]'
    overlay, raw, readonly = guest(text, defaults=defaults).disks
    assert overlay.base
    assert (raw.base, raw.size) == (None, 8 << 30)
    assert (readonly.base, readonly.size) == (None, None)


def test_defaults_of_one_guest_are_refused() -> None:
    text = """
        description = "x"
        autostart = true
        uuid = "7a1e5c8e-7e4b-4c8a-9b0c-0e6c8c1e2f3a"
        secure_boot = "yes"
        [disk]
        path = "a"
        bus = "usb"
        [network]
        address = []
        route = []
        mac = "52:54:00:00:00:01"
        tap = "tap0"
        [cdrom]
        path = "x"
        [limits]
        x = 1
    """
    with pytest.raises(InvalidConfiguration) as caught:
        parse_defaults(text, CONF)
    assert [(problem.line - 1, problem.key) for problem in caught.value.problems] == [
        (1, "description"),
        (2, "autostart"),
        (3, "uuid"),
        (4, "secure_boot"),
        (6, "disk.path"),
        (7, "disk.bus"),
        (9, "network.address"),
        (10, "network.route"),
        (11, "network.mac"),
        (12, "network.tap"),
        (14, "cdrom.path"),
        (16, "limits.x"),
    ]
    with pytest.raises(InvalidConfiguration):
        parse_defaults('[[disk]]\nbus = "scsi"', CONF)


def test_what_concerns_the_host_is_in_kvmd_conf_only() -> None:
    assert parse_defaults("[firewall]\nopen = true", CONF) == {"firewall": {"open": True}}
    assert guest("", defaults="[firewall]\nopen = true") == guest("")
    assert problems("\n[firewall]\nopen = true") == [
        "web.toml:2: firewall: belongs to the host (set it in /etc/kvmd/kvmd.conf)"
    ]
    for text in ('[firewall]\nopen = "yes"', "[firewall]\nclosed = true", "firewall = true"):
        with pytest.raises(InvalidConfiguration, match=r"kvmd.conf:[12]: firewall"):
            parse_defaults(text, CONF)


# derived


def test_derived_values_are_stable_and_differ() -> None:
    two = "[[network]]\n[[network]]\n"
    web, mail = guest(two), guest(two, "mail")
    assert web == guest(two)
    assert web.uuid != mail.uuid
    macs = {nic.mac for guest in (web, mail) for nic in guest.nics}
    assert len(macs) == 4
    assert all(mac.startswith("52:54:00:") for mac in macs)
    elsewhere = parse(two, Path("/etc/kvmd/web.toml"), HostIds("f" * 32)).guest
    assert elsewhere.uuid != web.uuid
    assert elsewhere.nics[0].mac != web.nics[0].mac


@pytest.mark.parametrize(
    ("name", "position", "tap"),
    [
        ("web", 0, "kv-web"),
        ("web", 1, "kv2-web"),
        ("x" * 12, 0, "kv-" + "x" * 12),
        ("x" * 63, 0, None),
        ("x" * 12, 1, None),
    ],
)
def test_derived_tap(name: str, position: int, tap: str | None) -> None:
    derived = derived_tap(name, position)
    assert len(derived) <= 15
    assert tap in (None, derived)
    assert derived != derived_tap(name + "y", position)


# between guests


def clashes(**texts: str) -> list[str]:
    return [str(problem) for problem in conflicts(load(text, name) for name, text in texts.items())]


def test_no_conflict() -> None:
    shared = '[[disk]]\npath = "data"\nreadonly = true\n[[cdrom]]\npath = "cd.iso"\n[[network]]\n'
    overlay = '[[disk]]\nbase = "debian"\n'
    a = shared + 'address = ["10.1.1.1"]\nroute = ["2001:db8:1::/64"]\n' + overlay + 'path = "a"\n'
    b = shared + 'address = ["10.1.1.2"]\nroute = ["2001:db8:2::/64"]\n' + overlay + 'path = "b"\n'
    assert clashes(a=a, b=b) == []


def test_the_later_guest_is_to_blame_once_for_each_key() -> None:
    text = 'uuid = "7a1e5c8e-7e4b-4c8a-9b0c-0e6c8c1e2f3a"\n[[disk]]\npath = "d"\n[[network]]\ntap = "t"\n'
    text += 'mac = "52:54:00:00:00:01"\naddress = ["10.1.1.1"]\n'
    told = clashes(c=text, a=text, b=text)
    assert told == [
        line.format(name)
        for name in "bc"
        for line in (
            '/etc/kvmd/{}.toml:1: uuid: "7a1e5c8e-7e4b-4c8a-9b0c-0e6c8c1e2f3a" is already used by guest a '
            "(choose another)",
            '/etc/kvmd/{}.toml:3: disk.path: "/var/lib/kvmd/images/d" is already used by guest a '
            "(images can be shared only read-only)",
            '/etc/kvmd/{}.toml:5: network.tap: "t" is already used by guest a (choose another)',
            '/etc/kvmd/{}.toml:6: network.mac: "52:54:00:00:00:01" is already used by guest a (choose another)',
            '/etc/kvmd/{}.toml:7: network.address: "10.1.1.1" is already used by guest a (choose another)',
        )
    ]


def test_overlapping_prefixes() -> None:
    inner = '[[network]]\nroute = ["2001:db8:1:30::/64"]'
    outer = '[[network]]\nroute = ["2001:db8:1::/48"]'
    address = '[[network]]\naddress = ["2001:db8:1:30::1"]'
    assert clashes(a=inner, b=outer) == [
        '/etc/kvmd/b.toml:2: network.route: "2001:db8:1::/48" overlaps "2001:db8:1:30::/64" of guest a (choose another)'
    ]
    assert clashes(a=outer, b=address) == [
        '/etc/kvmd/b.toml:2: network.address: "2001:db8:1:30::1" overlaps "2001:db8:1::/48" of guest a (choose another)'
    ]
    assert [line.partition(":")[0] for line in clashes(a=address, b=outer, c=inner)] == [
        "/etc/kvmd/b.toml",
        "/etc/kvmd/c.toml",
    ]


def test_an_image_that_one_writes_is_nobody_elses() -> None:
    writes = '[[disk]]\npath = "d"'
    reads = '[[disk]]\npath = "d"\nreadonly = true'
    stands_on = '[[disk]]\npath = "e"\nbase = "d"'
    assert len(clashes(a=writes, b=reads)) == 1
    assert len(clashes(a=reads, b=writes)) == 1
    assert len(clashes(a=writes, b=stands_on)) == 1
    assert len(clashes(a=reads, b=stands_on, c=writes)) == 1
    assert clashes(a=reads, b=stands_on) == []


def test_a_thousand_guests_are_compared_quickly() -> None:
    text = '[[network]]\naddress = ["10.{0}.{1}.1", "2001:db8::{0}:{1}"]\nroute = ["2001:db9:{0}:{1}::/64"]'
    files = [load(text.format(n // 250, n % 250), f"g{n}") for n in range(1000)]
    began = time.process_time()
    assert conflicts(files) == []
    assert time.process_time() - began < 1


# lines and values


def test_lines_of_a_long_statement_are_found_in_linear_time() -> None:
    text = 'description = """\n' + "key = 1\n" * 7000 + '"""\ncpus = 0\n'
    began = time.process_time()
    assert [line.partition(": ")[0] for line in problems(text)] == ["web.toml:1", "web.toml:7003"]
    assert time.process_time() - began < 2


def test_lines_with_carriage_returns_and_without_a_last_newline() -> None:
    assert problems("memory = '1G'\r\n\r\ncpus = 0")[0].startswith("web.toml:3: cpus:")


def test_text_that_is_no_unicode() -> None:
    with pytest.raises(InvalidConfiguration, match="not UTF-8"):
        Document("x = '\udc80'", Path("web.toml"))
