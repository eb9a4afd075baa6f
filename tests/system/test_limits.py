"""Every key of [limits], as systemd shows it of the scope: at the start, changed while the guest runs, and refused."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import lab
import pytest

from .guests import RELEASES, Guests

# Key; its value at the start, as written and as shown; its value afterwards.
SETTINGS = """
MemoryMin                     | "1M"           | 1048576          | "2M"                        | 2097152
MemoryLow                     | "3M"           | 3145728          | 0                           | 0
MemoryHigh                    | "2G"           | 2147483648       | "infinity"                  | infinity
MemoryMax                     | "4G"           | 4294967296       | "5.5G"                      | 5905580032
MemorySwapMax                 | "6G"           | 6442450944       | 0                           | 0
TasksMax                      | 500            | 500              | "infinity"                  | infinity
CPUQuota                      | "250%"         | 2.500000s        | "350.5%"                    | 3.505000s
CPUQuotaPeriodSec             | "50ms"         | 50ms             | "200ms"                     | 200ms
CPUWeight                     | 200            | 200              | "idle"                      | idle
StartupCPUWeight              | "idle"         | idle             | 300                         | 300
IOWeight                      | 20             | 20               | "30"                        | 30
StartupIOWeight               | 40             | 40               | 50                          | 50
IODeviceWeight                | "/dev/sda 60"  | /dev/sda 60      | ["/dev/sdb 7", "/dev/sdc 8"] | /dev/sdb 7 /dev/sdc 8
IOReadBandwidthMax            | "/dev/sda 1M"  | /dev/sda 1000000 | "/dev/sdb 2M"               | /dev/sdb 2000000
IOWriteBandwidthMax           | "/dev/sda 3M"  | /dev/sda 3000000 | "/dev/sdb 4M"               | /dev/sdb 4000000
IOReadIOPSMax                 | "/dev/sda 1K"  | /dev/sda 1000    | "/dev/sdb 2000"             | /dev/sdb 2000
IOWriteIOPSMax                | "/dev/sda 3K"  | /dev/sda 3000    | "/dev/sdb 4000"             | /dev/sdb 4000
IODeviceLatencyTargetSec      | "/dev/sda 9ms" | /dev/sda 9ms     | "/dev/sdb 1s"               | /dev/sdb 1s
AllowedCPUs                   | "0-1"          | 0-1              | 0                           | 0
StartupAllowedCPUs            | 0              | 0100000000000000 | "0,1"                       | 0300000000000000
AllowedMemoryNodes            | 0              | 0                | "0-1"                       | 0-1
StartupAllowedMemoryNodes     | 0              | 0100000000000000 | "0,1"                       | 0300000000000000
CPUAccounting                 | true           | yes              | false                       | no
MemoryAccounting              | "no"           | no               | true                        | yes
IOAccounting                  | true           | yes              | "off"                       | no
TasksAccounting               | false          | no               | true                        | yes
IPAccounting                  | "on"           | yes              | false                       | no
IPAddressAllow                | "10.0.0.0/8"   | 10.0.0.0/8       | ["::1", "192.0.2.7"]        | ::1/128 192.0.2.7/32
IPAddressDeny                 | "any"          | ::/0 0.0.0.0/0   | "192.0.2.0/24"              | 192.0.2.0/24
DeviceAllow                   | "/dev/null r"  | /dev/null r      | ["/dev/tty r", "char-pts"] | /dev/tty r char-pts rwm
DevicePolicy                  | "closed"       | closed           | "auto"                      | auto
ManagedOOMSwap                | "kill"         | kill             | "auto"                      | auto
ManagedOOMMemoryPressure      | "kill"         | kill             | "auto"                      | auto
ManagedOOMMemoryPressureLimit | "60%"          | 2576980377       | "70%"                       | 3006477107
ManagedOOMPreference          | "avoid"        | avoid            | "none"                      | none
"""
LATER_THAN_252 = """
MemoryZSwapMax                | "7G"           | 7516192768       | 0                           | 0
MemoryZSwapWriteback          | false          | no               | true                        | yes
StartupMemoryLow              | "3M"           | 3145728          | "4M"                        | 4194304
StartupMemoryHigh             | "2G"           | 2147483648       | "3G"                        | 3221225472
StartupMemoryMax              | "4G"           | 4294967296       | "5G"                        | 5368709120
StartupMemorySwapMax          | "6G"           | 6442450944       | "7G"                        | 7516192768
StartupMemoryZSwapMax         | "6G"           | 6442450944       | "infinity"                  | infinity
"""
PROPERTIES = {
    "CPUQuota": "CPUQuotaPerSecUSec",
    "CPUQuotaPeriodSec": "CPUQuotaPeriodUSec",
    "IODeviceLatencyTargetSec": "IODeviceLatencyTargetUSec",
}


@pytest.fixture(params=RELEASES, scope="module")
def host(request: pytest.FixtureRequest, deb: Path) -> Iterator[lab.Host]:
    with lab.Host(request.param, deb, name=request.param) as host:
        yield host


@pytest.fixture
def guests(host: lab.Host) -> Iterator[Guests]:
    guests = Guests(host)
    yield guests
    guests.clear()


def settings(host: lab.Machine) -> list[list[str]]:
    old = host.run("systemctl", "--version").stdout.startswith("systemd 252")
    lines = (SETTINGS if old else SETTINGS + LATER_THAN_252).strip().replace("\n\n", "\n").splitlines()
    return [[cell.strip() for cell in line.split("|")] for line in lines]


def limits(written: dict[str, str]) -> str:
    return "[limits]\n" + "".join(f"{key} = {value}\n" for key, value in written.items())


def shown(guests: Guests, name: str, keys: list[str]) -> dict[str, list[str]]:
    """The words systemd shows for each key; their order means nothing."""
    words = defaultdict(list)
    for line in guests.host.run("systemctl", "show", f"kvmd-{name}.scope").stdout.splitlines():
        prop, _, value = line.partition("=")
        words[prop] += value.split()
    return {key: sorted(words[PROPERTIES.get(key, key)]) for key in keys}


def test_every_limit_is_known_here() -> None:
    """What the guest file takes is what this test sets."""
    source = Path(lab.__file__).parents[2] / "kvmd/config/limits.py"
    tested = {line.split()[0] for line in (SETTINGS + LATER_THAN_252).splitlines() if line}
    table = source.read_text().partition("LIMITS = _table(")[2]
    assert tested == {word for word in table.replace('"', " ").split() if word[0].isupper() and word.isalnum()}


def test_every_limit_holds_and_changes(guests: Guests) -> None:
    rows = settings(guests.host)
    keys = [row[0] for row in rows]
    for place in (1, 3):
        guests.linux("all", extra=limits({row[0]: row[place] for row in rows}))
        if place == 1:
            guests.start("all", ready=False)
        assert shown(guests, "all", keys) == {row[0]: sorted(row[place + 1].split()) for row in rows}
        assert guests.get("all", "NeedsRestart") is False


def test_a_limit_that_is_taken_away_waits_for_the_next_start(guests: Guests) -> None:
    guests.linux("less", extra=limits({"TasksMax": "500", "CPUWeight": "200"}))
    guests.start("less", ready=False)
    guests.linux("less", extra=limits({"CPUWeight": "300"}))
    assert shown(guests, "less", ["TasksMax", "CPUWeight"]) == {"TasksMax": ["500"], "CPUWeight": ["200"]}
    assert guests.get("less", "NeedsRestart") is True


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("MemoryMax", "0", "Value specified in MemoryMax is out of range"),
        ("TasksMax", '"0%"', "Value specified in TasksMaxScale is out of range"),
        ("IODeviceLatencyTargetSec", '"/dev/../x 1s"', "is not normalized"),
        ("DeviceAllow", '"/dev/../x r"', "DeviceAllow= requires device node or pattern"),
    ],
)
def test_what_systemd_refuses_is_named(guests: Guests, key: str, value: str, reason: str) -> None:
    guests.linux("greedy", extra=limits({"CPUWeight": "200", key: value}))
    done = guests.host.run("systemctl", "start", "kvmd@greedy", check=False)
    assert done.returncode == 1
    assert [line for line in guests.status("greedy").splitlines() if f"limits.{key}: " in line and reason in line]
    refused = guests.call("StartGuest", "s", "greedy", check=False).stderr
    assert f"limits.{key}: systemd refused kvmd-greedy.scope: " in refused
    assert reason in refused
    guests.linux("greedy", extra=limits({"CPUWeight": "200"}))
    guests.start("greedy", ready=False)
    since = guests.host.cursor()
    guests.linux("greedy", extra=limits({"CPUWeight": "300", key: value}))
    guests.host.wait_journal("KVMD_GUEST=greedy", message=f"do not hold .*limits.{key}: .*", since=since)
    assert guests.get("greedy", "NeedsRestart") is True


def test_what_this_systemd_does_not_know_is_named(guests: Guests) -> None:
    guests.linux("new", extra=limits({"MemoryZSwapMax": '"1G"'}))
    done = guests.call("StartGuest", "s", "new", check=False)
    if "MemoryZSwapMax" in [row[0] for row in settings(guests.host)]:
        assert done.returncode == 0
    else:
        assert "limits.MemoryZSwapMax: systemd refused kvmd-new.scope: " in done.stderr


def test_slice_and_drop_ins(guests: Guests) -> None:
    """A drop-in counts for all guests, whatever their files say; all of them share what machine.slice has."""
    host = guests.host
    host.write("/etc/systemd/system/kvmd-.scope.d/all.conf", "[Scope]\nCPUWeight=50\nIOWeight=60\n")
    host.write("/etc/systemd/system/machine.slice.d/all.conf", "[Slice]\nTasksMax=5000\n")
    host.run("systemctl", "daemon-reload")
    guests.linux("own", extra=limits({"CPUWeight": "70"}))
    guests.linux("plain")
    guests.start("own", "plain", ready=False)
    keys = ["CPUWeight", "IOWeight", "Slice"]
    for name in ("own", "plain"):
        assert shown(guests, name, keys) == {"CPUWeight": ["50"], "IOWeight": ["60"], "Slice": ["machine.slice"]}
    assert host.show("machine.slice")["TasksMax"] == "5000"
    host.run("rm", "-r", "/etc/systemd/system/kvmd-.scope.d", "/etc/systemd/system/machine.slice.d")
    host.run("systemctl", "daemon-reload")
