"""Devices of the host: which they are, and what is in the way, over trees as /sys has them."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest

from kvmd.errors import StartFailed
from kvmd.guest import Guest, Share
from kvmd.qemu import pci, usb
from kvmd.qemu.passthrough import OfTheHost, passthrough_args
from kvmd.qemu.process import User

GUEST = Guest("web", Path("/etc/kvmd/web.toml"), UUID(int=1), memory=64 << 20)
US = User(os.getuid(), os.getgid())
NIC, AUDIO, BRIDGE = "0000:03:00.0", "0000:03:00.1", "0000:00:01.0"


def test_nothing_of_the_host_is_no_argument() -> None:
    assert passthrough_args(GUEST, OfTheHost(), None) == []


def test_directories_by_shared_memory() -> None:
    guest = replace(GUEST, shares=(Share(Path("/srv/a"), "a"), Share(Path("/srv/b"), "b")))
    expected = """
        -object memory-backend-memfd,id=mem,size=67108864B,share=on -machine memory-backend=mem
        -chardev socket,id=share0,fd=7 -device vhost-user-fs-pci,id=share0,chardev=share0,tag=a
        -chardev socket,id=share1,fd=8 -device vhost-user-fs-pci,id=share1,chardev=share1,tag=b
    """
    assert passthrough_args(guest, OfTheHost(shares=[7, 8]), None) == expected.split()


def test_usb_devices_by_descriptor_on_a_bus_for_any_speed() -> None:
    guest, of = replace(GUEST, usb=("046d:c52b", "1-1.2")), OfTheHost(usb=[7, 8])
    devices = """
        -add-fd set=3001000,fd=7 -device usb-host,id=host0,bus={0}.0,hostdevice=/dev/fdset/3001000
        -add-fd set=3001001,fd=8 -device usb-host,id=host1,bus={0}.0,hostdevice=/dev/fdset/3001001
    """
    assert passthrough_args(guest, of, "usb0.0") == devices.format("usb0").split()
    assert passthrough_args(guest, of, None) == ["-device", "qemu-xhci,id=usb1", *devices.format("usb1").split()]


def test_pci_devices_and_the_agent() -> None:
    expected = """
        -device vfio-pci,id=pci0,host=0000:03:00.0
        -chardev socket,id=agent,fd=9,server=on,wait=off -device virtio-serial-pci,id=channels
        -device virtserialport,bus=channels.0,chardev=agent,name=org.qemu.guest_agent.0
    """
    assert passthrough_args(replace(GUEST, pci=(NIC,), agent=True), OfTheHost(agent=9), None) == expected.split()


# --- USB --------------------------------------------------------------------------------------------------------------


def plug(sys: Path, port: str, bus: int, number: int, ids: str, name: str = "", kind: str = "00") -> None:
    vendor, _, product = ids.partition(":")
    attributes = {"busnum": bus, "devnum": number, "idVendor": vendor, "idProduct": product, "bDeviceClass": kind}
    (sys / port).mkdir(parents=True)
    for key, value in {**attributes, **({"product": name} if name else {})}.items():
        (sys / port / key).write_text(f"{value}\n")


@pytest.fixture
def bus(tmp_path: Path) -> Path:
    sys = tmp_path / "sys"
    plug(sys, "usb1", 1, 1, "1d6b:0002", "xHCI Host Controller", kind="09")
    plug(sys, "1-1", 1, 2, "05e3:0608", "USB2.0 Hub", kind="09")
    plug(sys, "1-1.2", 1, 7, "046d:c52b", "USB Receiver\x1b[31m")
    plug(sys, "2-1", 2, 3, "0951:1666")
    (sys / "1-1:1.0").mkdir()
    (sys / "1-3").mkdir()  # unplugged meanwhile
    return sys


@pytest.mark.parametrize(("word", "node"), [("046d:c52b", "001/007"), ("1-1.2", "001/007"), ("2-1", "002/003")])
def test_a_usb_device_is_found_by_what_it_is_and_by_its_port(bus: Path, tmp_path: Path, word: str, node: str) -> None:
    (tmp_path / "nodes" / node).parent.mkdir(parents=True)
    (tmp_path / "nodes" / node).write_text("this one")
    fd = usb.open_device(word, bus, tmp_path / "nodes")
    try:
        assert os.read(fd, 100) == b"this one"
    finally:
        os.close(fd)


def test_a_usb_device_that_cannot_be_had(bus: Path, tmp_path: Path) -> None:
    def refusal(word: str, sys: Path = bus) -> str:
        with pytest.raises(StartFailed) as refused:
            usb.open_device(word, sys, tmp_path / "nodes")
        return str(refused.value)

    plugged = r"plugged in: 1-1.2 is 046d:c52b USB Receiver\x1b[31m; 2-1 is 0951:1666"
    assert refusal("1234:5678") == f"there is no USB device 1234:5678 ({plugged})"
    assert refusal("1-1") == f"there is no USB device 1-1 ({plugged})"
    assert refusal("1-1", tmp_path / "none") == "there is no USB device 1-1 (there is none on this host)"
    node = tmp_path / "nodes/002/003"
    assert refusal("2-1") == f"cannot open the USB device 2-1 is 0951:1666 ({node}): No such file or directory"
    plug(bus, "2-2", 2, 4, "0951:1666")
    assert refusal("0951:1666") == ('there are 2 USB devices 0951:1666 (say which by its port: "2-1" or "2-2")')


@pytest.mark.skipif(not shutil.which("qemu-system-x86_64"), reason="qemu-system-x86_64 is not installed")
def test_qemu_takes_a_usb_device_by_descriptor() -> None:
    """It opens what it was given, and only then finds that this is no device."""
    fd = os.open("/dev/null", os.O_RDWR)
    args = passthrough_args(replace(GUEST, usb=("1-1",)), OfTheHost(usb=[fd]), None)
    command = ["qemu-system-x86_64", "-nodefaults", "-machine", "q35", "-display", "none", "-S", *args]
    done = subprocess.run(command, pass_fds=[fd], capture_output=True, text=True, timeout=30)
    os.close(fd)
    assert "failed to open host usb device /dev/fdset/3001000" in done.stderr


# --- PCI --------------------------------------------------------------------------------------------------------------


def insert(sys: Path, address: str, group: str = "", driver: str = "", kind: str = "0x020000") -> None:
    device = sys / "bus/pci/devices" / address
    device.mkdir(parents=True)
    (device / "class").write_text(f"{kind}\n")
    if group:
        members = sys / "kernel/iommu_groups" / group / "devices"
        members.mkdir(parents=True, exist_ok=True)
        (members / address).symlink_to(device)
        (device / "iommu_group").symlink_to(members.parent)
    if driver:
        (sys / "bus/pci/drivers" / driver).mkdir(parents=True, exist_ok=True)
        (device / "driver").symlink_to(sys / "bus/pci/drivers" / driver)


def refusal(sys: Path) -> str:
    with pytest.raises(StartFailed) as refused:
        pci.find_group(NIC, sys)
    return str(refused.value)


CANNOT = f"PCI device {NIC} cannot be handed over: "


def test_a_pci_device_that_is_not_there(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"there is no PCI device {NIC} (lspci -D lists them)"


def test_a_host_without_iommu(tmp_path: Path) -> None:
    insert(tmp_path, NIC)
    assert refusal(tmp_path).startswith(f"{CANNOT}this host has no IOMMU in use (switch it on in the firmware")
    (tmp_path / "kernel/iommu_groups").mkdir(parents=True)
    assert refusal(tmp_path).startswith(f"{CANNOT}this host has no IOMMU in use")
    insert(tmp_path, AUDIO, "7")
    assert refusal(tmp_path) == f"{CANNOT}the IOMMU does not cover it (use another slot)"


def test_a_pci_device_that_the_host_uses(tmp_path: Path) -> None:
    insert(tmp_path, NIC, "7", "igb")
    insert(tmp_path, AUDIO, "7", "snd_hda_intel")
    hint = f"(driverctl set-override {NIC} vfio-pci)"
    assert refusal(tmp_path) == f"{CANNOT}it is in the hands of the host's driver igb {hint}"
    (tmp_path / "bus/pci/devices" / NIC / "driver").unlink()
    assert refusal(tmp_path) == f"{CANNOT}it is not bound to vfio-pci {hint}"


def test_others_of_its_group(tmp_path: Path) -> None:
    insert(tmp_path, BRIDGE, "7", "pcieport", kind="0x060400")
    insert(tmp_path, NIC, "7", "vfio-pci")
    assert pci.find_group(NIC, tmp_path) == "7"
    insert(tmp_path, AUDIO, "7", "snd_hda_intel")
    hint = f"(driverctl set-override {AUDIO} vfio-pci, or use another slot)"
    which = f"{AUDIO}, of the same IOMMU group 7,"
    assert refusal(tmp_path) == f"{CANNOT}{which} is in the hands of the host's driver snd_hda_intel {hint}"


def test_the_node_of_its_group_is_lent(tmp_path: Path) -> None:
    insert(tmp_path, NIC, "7", "vfio-pci")
    nodes = tmp_path / "vfio"
    with pytest.raises(StartFailed, match=f"cannot hand {nodes}/7 of PCI device {NIC} to the guest: No such file"):
        pci.lend(NIC, US, tmp_path, nodes)
    nodes.mkdir()
    (nodes / "7").touch()
    assert pci.lend(NIC, US, tmp_path, nodes) == nodes / "7"
    pci.take_back([NIC, "0000:ff:00.0"], tmp_path, nodes)
    assert (nodes / "7").stat().st_uid == 0 or os.getuid()
