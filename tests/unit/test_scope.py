"""The scope's properties and names; conversions of [limits] against what systemctl set-property sends."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

import pytest
from dbus_next.signature import SignatureTree, Variant

from kvmd.config.limits import INFINITY, LIMITS
from kvmd.config.values import Wrong
from kvmd.guest import Guest, Limit, Share
from kvmd.systemd import scope

GUEST = Guest("web", Path("/etc/kvmd/web.toml"), UUID(int=1), stop_timeout=20.0)


def test_properties() -> None:
    assert scope.properties(GUEST, 4711) == [
        ("Description", "s", "Guest web"),
        ("Slice", "s", "machine.slice"),
        ("PIDs", "au", [4711]),
        ("After", "as", ["kvmd-guests.target"]),
        ("Before", "as", ["kvmd@web.service"]),
        ("RefuseManualStop", "b", True),
        ("TimeoutStopUSec", "t", 30_000_000),
        ("CollectMode", "s", "inactive"),
    ]


def test_a_shared_directory_is_mounted_read_only_unless_a_user_writes() -> None:
    root, source = Path("/run/kvmd/web/share0"), Path("/srv/music")
    where = (source, ["/bin/sh"], 0, root, 7)
    mine = {name: value for name, _, value in scope.share_properties(GUEST, Share(source, "music"), *where)}
    mount = ["/srv/music", "/share", False, scope.MS_REC]
    assert mount in mine["BindReadOnlyPaths"]  # type: ignore[operator]
    assert (mine["DynamicUser"], mine["StandardInputFileDescriptor"], mine["RootDirectory"]) == (True, 7, str(root))
    assert mine.keys().isdisjoint({"BindPaths", "User"})
    hers = {name: value for name, _, value in scope.share_properties(GUEST, Share(source, "m", False, "eve"), *where)}
    assert (hers["BindPaths"], hers["User"]) == ([mount], "eve")
    assert mount not in hers["BindReadOnlyPaths"]  # type: ignore[operator]
    assert "DynamicUser" not in hers


def test_limits_come_last() -> None:
    guest = Guest("web", GUEST.file, GUEST.uuid, limits={"MemoryMax": Limit("MemoryMax", "t", 1 << 30)})
    assert scope.properties(guest, 1)[-1] == ("MemoryMax", "t", 1 << 30)


def test_guest_name() -> None:
    assert scope.guest_name(GUEST.scope) == "web"
    assert scope.guest_name("kvmd-a-b.scope.scope") == "a-b.scope"


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("web", "web"),
        ("", "_"),
        ("7up", "_37up"),
        ("a7", "a7"),
        ("mail-host.example", "mail_2dhost_2eexample"),
        ("a_b", "a_5fb"),
        ("ü", "_c3_bc"),
    ],
)
def test_escape(name: str, label: str) -> None:
    assert scope.escape(name) == label
    assert scope.unescape(label) == name


@pytest.mark.parametrize("label", ["_zz", "a_", "a_2", "_61", "_2D", "7up", "a-b", "_ff"])
def test_labels_nobody_makes(label: str) -> None:
    assert scope.unescape(label) is None


@pytest.mark.parametrize(
    ("name", "value", "limit"),
    [
        ("MemoryMax", "768M", ("MemoryMax", "t", 768 << 20)),
        ("MemoryMax", 1 << 30, ("MemoryMax", "t", 1 << 30)),
        ("MemoryHigh", "1.5G", ("MemoryHigh", "t", 3 << 29)),
        ("MemorySwapMax", "infinity", ("MemorySwapMax", "t", INFINITY)),
        ("MemoryMax", "50%", ("MemoryMaxScale", "u", 2147483648)),
        ("MemoryLow", "100%", ("MemoryLowScale", "u", 2**32 - 1)),
        ("TasksMax", 64, ("TasksMax", "t", 64)),
        ("TasksMax", "10%", ("TasksMaxScale", "u", 429496730)),
        ("TasksMax", "infinity", ("TasksMax", "t", INFINITY)),
        ("CPUQuota", "150%", ("CPUQuotaPerSecUSec", "t", 1_500_000)),
        ("CPUQuota", "12.5%", ("CPUQuotaPerSecUSec", "t", 125_000)),
        ("CPUQuotaPeriodSec", "10ms", ("CPUQuotaPeriodUSec", "t", 10_000)),
        ("CPUWeight", 200, ("CPUWeight", "t", 200)),
        ("CPUWeight", "idle", ("CPUWeight", "t", 0)),
        ("IOWeight", "10", ("IOWeight", "t", 10)),
        ("IODeviceWeight", "/dev/sda 200", ("IODeviceWeight", "a(st)", [["/dev/sda", 200]])),
        ("IOReadBandwidthMax", "/dev/sda 10M", ("IOReadBandwidthMax", "a(st)", [["/dev/sda", 10_000_000]])),
        (
            "IOWriteIOPSMax",
            ["/dev/sda 100", "/dev/sdb infinity"],
            ("IOWriteIOPSMax", "a(st)", [["/dev/sda", 100], ["/dev/sdb", INFINITY]]),
        ),
        ("IODeviceLatencyTargetSec", "/dev/sda 25ms", ("IODeviceLatencyTargetUSec", "a(st)", [["/dev/sda", 25_000]])),
        ("AllowedCPUs", "0-1,9", ("AllowedCPUs", "ay", b"\x03\x02")),
        ("AllowedCPUs", 3, ("AllowedCPUs", "ay", b"\x08")),
        ("AllowedMemoryNodes", ["0", "1"], ("AllowedMemoryNodes", "ay", b"\x03")),
        ("IOAccounting", True, ("IOAccounting", "b", True)),
        ("IPAccounting", "off", ("IPAccounting", "b", False)),
        ("IPAddressDeny", "any", ("IPAddressDeny", "a(iayu)", [[2, bytes(4), 0], [10, bytes(16), 0]])),
        ("IPAddressAllow", "10.1.0.0/16 ::1", None),
        ("DeviceAllow", "/dev/kvm rw", ("DeviceAllow", "a(ss)", [["/dev/kvm", "rw"]])),
        ("DevicePolicy", "closed", ("DevicePolicy", "s", "closed")),
        ("ManagedOOMSwap", "kill", ("ManagedOOMSwap", "s", "kill")),
        ("ManagedOOMMemoryPressureLimit", "60%", ("ManagedOOMMemoryPressureLimit", "u", 2576980377)),
        ("ManagedOOMPreference", "omit", ("ManagedOOMPreference", "s", "omit")),
    ],
)
def test_limit(name: str, value: object, limit: tuple[str, str, object] | None) -> None:
    converted = LIMITS[name](value)
    if limit is not None:
        assert converted == Limit(*limit)
    [kind] = SignatureTree(converted.signature).types
    kind.verify(Variant(converted.signature, converted.value).value)  # what goes to the bus can be marshalled


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MemoryMax", "lots"),
        ("MemoryMax", "101%"),
        ("MemoryMax", -1),
        ("MemoryMax", ""),
        ("MemoryMax", "1" * 5000),
        pytest.param("MemoryMax", 10**4000, id="huge"),
        pytest.param("MemoryMax", 1 << 20000, id="too huge to print"),
        ("MemoryMax", ["1M"]),
        ("MemoryMax", {}),
        ("MemoryMax", "20E" * 2),
        ("TasksMax", "0"),
        ("TasksMax", True),
        ("CPUQuota", "0%"),
        ("CPUQuota", "150"),
        ("CPUQuotaPeriodSec", "soon"),
        ("CPUWeight", 0),
        ("CPUWeight", 10001),
        ("IOWeight", "idle"),
        ("IODeviceWeight", "/dev/sda"),
        ("IODeviceWeight", "sda 10"),
        ("AllowedCPUs", "3-1"),
        ("AllowedCPUs", ""),
        ("AllowedCPUs", "0-99999"),
        ("IOAccounting", "perhaps"),
        ("IPAddressAllow", "example.org"),
        ("DeviceAllow", "/dev/kvm x"),
        ("DevicePolicy", "open"),
        ("ManagedOOMSwap", "no"),
        ("MemoryMax", "1\n2"),
    ],
)
def test_no_limit(name: str, value: object) -> None:
    with pytest.raises(Wrong) as caught:
        LIMITS[name](value)
    assert caught.value.what.isprintable()
    assert len(caught.value.what) < 120
