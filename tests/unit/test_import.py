"""import: what another tool has, each file of imports/, gives exactly the .toml beside it, with the .missed lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmd.config.agreement import ROOM
from kvmd.config.guestfile import HostIds, parse
from kvmd.ctl import imports
from kvmd.ctl.foreign import draft, libvirt
from kvmd.ctl.foreign.borrowed import add_share
from kvmd.ctl.foreign.borrowed import number as c_number
from kvmd.ctl.foreign.draft import Draft, NotReadable, backing_of, format_of, name_of, render, settle
from kvmd.ctl.foreign.options import key_values, size
from kvmd.ctl.foreign.shell import read as read_shell
from kvmd.guest import BOARD_BUSES, FORMATS, MODELS, NAME

SOURCES = Path(__file__).parent / "imports"
HOST = HostIds("0123456789abcdef0123456789abcdef")


def carried(file: Path) -> tuple[str, list[str]]:
    got, origin = imports.understand(file.read_text(), "/home/anna", "/home/anna/vms", is_command=file.suffix == ".sh")
    got.name = name_of(got.name or file.stem, got)
    imports.look_at_images(got)
    settle(got)
    return render(got, origin), got.missed


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/anna")
    monkeypatch.setenv("USER", "Anna")


@pytest.mark.parametrize("file", sorted(SOURCES.glob("*.[xsc]*")), ids=lambda file: file.name)
def test_golden(file: Path) -> None:
    text, missed = carried(file)
    assert text == file.with_suffix(".toml").read_text()
    assert missed == file.with_suffix(".missed").read_text().splitlines()
    name = text.split(",")[0].removeprefix("# ")
    parse(text, Path(f"/etc/kvmd/{name}.toml"), HOST)  # what kvmd --check does


def test_limits_are_those_of_the_daemon() -> None:
    assert {board: BOARD_BUSES[board] for board in draft.BUSES} == draft.BUSES  # type: ignore[index]
    assert (draft.ROOM, draft.MODELS, draft.FORMATS) == (ROOM, MODELS, FORMATS)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('<!DOCTYPE d [<!ENTITY a "b">]><domain><name>&a;</name></domain>', "DOCTYPE"),
        ("<domain><name>x</domain>", "not XML: mismatched tag"),
        ("<domain>\0</domain>", "not XML"),
        ("<network><name>default</name></network>", "XML of a network, not of a domain"),
        ("hello", "neither libvirt XML"),
        ("", "neither libvirt XML"),
        ("modprobe kvm\n", "nor a command line"),
        ("kvm -name 'x\n", "a quotation does not end"),
    ],
)
def test_refused(text: str, why: str) -> None:
    with pytest.raises(NotReadable, match=why):
        imports.understand(text, "/", "/", is_command=text.startswith("kvm"))


@pytest.mark.parametrize(
    "text",
    [
        "<domain/>",
        "<domain type='xen'><memory unit='ly'>x</memory><uuid>-</uuid><vcpu>many</vcpu><os><type/></os></domain>",
        "<domain><devices><disk/><interface/><graphics/><tpm/><hostdev/><filesystem/><channel/></devices></domain>",
        "<domain>" + "<a>" * 20000 + "</a>" * 20000 + "</domain>",
        "kvm -m lots -smp 0 -cpu '' -boot x -net -netdev -drive -device -blockdev {]",
        "kvm -hda ../../etc/passwd/.. -cdrom 'a\x07b' -vnc 300.1:99999 -uuid 1 -device ide-hd,drive=b",
        "ostype: \nnet0: \nscsi0: \nide0: ,media=cdrom\ncores: x\nmemory: y\nboot: order=\n",
        "kvm -m 1 -kernel a/../.. -append x -machine microvm -net nic -net tap,ifname=all -cpu 'a b'",
        "kvm -cdrom 0 -cdrom 1 -cdrom 2 -cdrom 3 -cdrom 4 -hda 5 -m 0 -net nic -net tap,ifname=a/b",
        "kvm -m 3K -kernel /k -append " + "x" * 3000,
        "<domain><memory unit='TiB'>999999999999999</memory><cpu><model>a b</model></cpu></domain>",
        "<domain><os><kernel>/a/../b</kernel><initrd>c</initrd></os><devices><interface type='direct'>"
        "<source dev='..'/></interface></devices></domain>",
        "<domain><devices><hostdev type='pci'><source><address bus='0xfffff' slot='x'/></source></hostdev>"
        "<hostdev type='usb'><source><vendor id='09'/></source></hostdev><interface type='hostdev'/>"
        "<filesystem><source dir='/'/><target dir='\u00e4'/></filesystem></devices></domain>",
        "kvm -device usb-host -device vfio-pci -device virtio-9p-pci,fsdev=x -fsdev -pcidevice -usbdevice host:",
        "kvm -virtfs local,path=/,mount_tag=a -virtfs local,path=x -virtfs -runas 0 -device usb-host,vendorid=-1",
        "ostype: \nhostpci0: \nusb0: \nvirtiofs0: \nagent: \nhostpci1: ;;,mdev\nusb1: mapping=\nhostpci2: 00:1f;zz\n",
        'guest_os=x\ndisk_img=y\npublic_dir=/\nusb_devices=(1 2:3:4 "" )\n',
        "guest_os=\ndisk_img=\nram=-1\ncpu_cores=x\n",
        "guest_os=${guest_os}${disk_img}\ndisk_img=$(rm -rf /)\n",
    ],
)
def test_nonsense_is_a_guest_all_the_same(text: str) -> None:
    got, origin = imports.understand(text, "/home/anna", "/")
    got.name = name_of(got.name or "x", got)
    imports.look_at_images(got)
    settle(got)
    parse(render(got, origin), Path("/etc/kvmd/x.toml"), HOST)
    assert all(line.isprintable() for line in got.missed)


def test_more_drives_than_a_bus_takes() -> None:
    got = Draft(cdroms=[{}])
    got.set_machine("pc")
    for number in range(4):
        got.add_disk("disk", f"/srv/{number}.raw", "ide", "raw")
    settle(got)
    assert [disk["bus"] for disk in got.disks] == ["ide", "ide", "ide", "scsi"]
    assert got.missed == ["/srv/3.raw: bus ide: pc takes 4 drives on it (it is on scsi here)"]
    parse(render(got, "x"), Path("/etc/kvmd/x.toml"), HOST)


def test_images_are_looked_at(tmp_path: Path) -> None:
    """A format that is not said is that of the beginning; a backing file is not believed, but named."""
    overlay = tmp_path / "over.img"
    overlay.write_bytes(
        b"QFI\xfb\0\0\0\3" + (104).to_bytes(8, "big") + (10).to_bytes(4, "big") + bytes(84) + b"/etc/group"
    )
    got = Draft()
    got.add_disk("-hda", str(overlay), "sata")
    got.add_disk("-hdb", str(tmp_path), "sata", "raw")
    imports.look_at_images(got)
    assert got.disks[0] == {"path": str(overlay), "bus": "sata", "format": "qcow2"}
    assert got.missed == [
        f"{overlay}: format: it is not said; qcow2 here, as it begins as one (qemu-img info {overlay})",
        f'{overlay}: backing file /etc/group: only the image says so (if you trust it: backing = ["/etc/group"])',
        f"{tmp_path}: this host does not show it: not an image (bring the image there, or change path)",
    ]


def test_formats_by_their_beginnings() -> None:
    beginnings = {
        b"QFI\xfb\0\0\0\1": "qcow",
        b"QFI\xfb\0\0\0\2": "qcow2",
        b"KDMV\1": "vmdk",
        b"vhdxfile": "vhdx",
        b"conectix": "vpc",
        bytes(64) + b"\x7f\x10\xda\xbe": "vdi",
        b"\xeb\x63\x90": "raw",
    }
    assert {beginning: format_of(beginning) for beginning in beginnings} == beginnings
    assert backing_of(b"QFI\xfb\0\0\0\2" + bytes(12)) == ""


def test_options_and_words() -> None:
    assert key_values("a,,b=c,d=e,nof,g", "x") == {"a,b": "c", "d": "e", "f": "off", "g": "on"}
    assert key_values("2G,slots=2", "size") == {"size": "2G", "slots": "2"}
    assert (size("2", 1 << 20), size("2GiB", 1), size("2x", 1)) == (2 << 20, 2 << 30, None)
    commands, own = read_shell("A=1; B=\"$A b\" # c\nrun '$A' ${B} ~/x && next > y\n", {"HOME": "/h"})
    assert (commands, own) == ([["run", "1", "1 b", "/h/x"], ["next", ">", "y"]], {"A": "1", "B": "1 b"})


@pytest.mark.parametrize("said", ["kvmd", "", "ä ö", "-x", "a" * 80, "Büro 2", "ok.name_1"])
def test_names(said: str) -> None:
    got = Draft()
    name = name_of(said, got)
    assert NAME.fullmatch(name)
    assert name != "kvmd"
    assert bool(got.missed) is (said not in ("", name))


def test_memory_in_all_of_libvirts_units() -> None:
    for said, meant in (("<memory>1048576</memory>", "1G"), ("<memory unit='b'>1073741824</memory>", "1G")):
        assert libvirt.read(f"<domain>{said}</domain>").top["memory"] == meant


def of_the_host(text: str) -> Draft:
    got, origin = imports.understand(text, "/home/anna", "/")
    got.name = "x"
    settle(got)
    parse(render(got, origin), Path("/etc/kvmd/x.toml"), HOST)
    return got


def test_numbers_are_read_as_c_reads_them() -> None:
    assert [c_number(said) for said in ("0x1F", "017", "31", "0")] == [31, 15, 31, 0]
    assert [c_number(said) for said in ("", "09", "x", "-1", "1f", "0x")] == [None] * 6


def test_devices_of_the_host_as_qemu_has_named_them() -> None:
    got = of_the_host(
        "kvm -usbdevice host:46d:c52b -usbdevice host:1.4 -device usb-host,hostbus=1,hostport=1.2 "
        "-device usb-host,vendorid=1321,productid=1 -device usb-host,hostbus=1,hostaddr=4 -usbdevice host:046d:c52b "
        "-pcidevice host=06:00.0 -device pci-assign,host=06:00.1 -device vfio-pci,host=0001:06:00.2,x-vga=on "
        "-device vfio-pci-nohotplug,sysfsdev=/sys/bus/pci/devices/0000:07:00.0"
    )
    assert got.usb == ["046d:c52b", "1-1.2", "0529:0001"]
    assert got.pci == ["0000:06:00.0", "0000:06:00.1", "0001:06:00.2", "0000:07:00.0"]
    assert [line.split(":")[0] for line in got.missed if not line.startswith("network")] == [
        "-usbdevice host",
        "-device usb-host,hostbus=1,hostaddr=4",
        "-usbdevice host",
        "the driver of 0000",
        "the driver of 0000",
        "-device vfio-pci,host=0001",
    ]


def test_a_directory_is_written_to_only_in_the_name_of_a_user() -> None:
    line = "kvm -fsdev local,id=f,path=share,security_model=none -device virtio-9p-pci,fsdev=f,mount_tag=s"
    assert of_the_host(f"{line} -runas anna").shares == [
        {"path": "/home/anna/share", "tag": "s", "readonly": False, "user": "anna"}
    ]
    for user in ("root", "1000:1000"):
        got = of_the_host(f"{line} -runas {user}")
        assert got.shares == [{"path": "/home/anna/share", "tag": "s", "readonly": True}]
        assert any(said.startswith("writing to /home/anna/share: it is not known who") for said in got.missed)


def test_tags_are_made_to_fit_and_differ() -> None:
    got = Draft()
    for tag in ("www", "www", "/mnt/a b", "x" * 40, "x" * 40, "ä"):
        add_share(got, "/srv/www", tag, "virtiofs", readonly=True)
    tags = [str(share["tag"]) for share in got.shares]
    assert tags == ["www", "www-2", "mnt-a-b", "x" * 36, "x" * 32 + "-2", "share"]
    assert len(got.missed) == 5
    parse(render(got, "x"), Path("/etc/kvmd/x.toml"), HOST)


def test_what_several_words_of_an_array_say() -> None:
    got = of_the_host('guest_os=linux\ndisk_img=x\npublic_dir=none\nusb_devices=("046d:82d" "1d6b:0002")\n')
    assert (got.usb, got.shares) == (["046d:082d", "1d6b:0002"], [])
