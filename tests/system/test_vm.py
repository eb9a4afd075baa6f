"""What only a whole machine shows: boot and poweroff, KVM, resource limits, a CPU that cannot virtualise."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import lab
import pytest

from .guests import Guests

DISK = '[[disk]]\npath = "{}.qcow2"\nsize = "16M"\n'
# Comes up late, as storage of the network does, and by nobody's wish but its guests'.
STORAGE = """[Unit]
After=slow.service
Requires=slow.service
[Mount]
What=/srv/storage.img
Where=/srv/storage
Options=loop
"""
SLOW = "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/sleep 2\n"
OUT_OF_MEMORY = "6f1c0a1f6d5d4c0e9d5f0b6f8f3c2a0e"


def manager(host: lab.Machine, prop: str) -> object:
    command = ("busctl", "--json=short", "get-property", "org.kvmd1", "/org/kvmd1", "org.kvmd1.Manager", prop)
    return json.loads(host.run(*command).stdout)["data"]


@pytest.mark.xdist_group("vm")
def test_guests_come_up_at_boot_and_go_down_in_order(vm: lab.VM) -> None:
    guests = Guests(vm)
    assert vm.units()["kvmd.service"] == "active/running"
    vm.run("sh", "-c", "truncate -s 64M /srv/storage.img && mkfs.ext4 -q /srv/storage.img && modprobe loop")
    vm.write("/etc/systemd/system/srv-storage.mount", STORAGE)
    vm.write("/etc/systemd/system/slow.service", SLOW)
    vm.run("systemctl", "daemon-reload")
    guests.linux("auto", top="autostart = true", cmdline="kvmd.disk=1", extra=DISK.format("/srv/storage/auto"))
    guests.linux("enabled", cmdline="kvmd.disk=1", extra=DISK.format("enabled"))
    guests.linux("manual")
    vm.run("systemctl", "enable", "kvmd@enabled")
    vm.run("systemctl", "start", "kvmd@auto", "kvmd@enabled")
    for name in ("auto", "enabled"):
        assert guests.wait(name, "guest: disk boots=1 stops=0", timeout=90)
        guests.wait(name, "guest: ready", timeout=90)
    pid = guests.get("auto", "PID")
    vm.run("systemctl", "restart", "kvmd")  # a guest that this daemon has not started is shut down no less gracefully
    assert guests.get("auto", "PID") == pid
    since = vm.cursor()
    vm.reboot()
    for name in ("auto", "enabled"):
        assert guests.wait(name, "guest: disk boots=2", since, 90)["MESSAGE"] == "guest: disk boots=2 stops=1"
        guests.wait(name, "guest: ready", since, 90)
        assert guests.active(name) == "active"
        assert guests.get(name, "Accelerator") == "kvm"
    assert guests.active("manual") == "inactive"
    assert manager(vm, "Accelerator") == "kvm"
    assert vm.run("findmnt", "-n", "-o", "TARGET", "-T", "/srv/storage/auto.qcow2").stdout == "/srv/storage\n"
    vm.run("systemctl", "stop", "kvmd@auto", "kvmd@enabled")


@pytest.mark.xdist_group("vm")
def test_storage_that_does_not_answer(vm: lab.VM) -> None:
    """It keeps one guest waiting, whose start can be given up, and nobody else."""
    guests = Guests(vm)
    vm.run("sh", "-c", "truncate -s 64M /srv/frozen.img && mkfs.ext4 -q /srv/frozen.img && modprobe loop")
    vm.run("sh", "-c", "mkdir -p /srv/frozen && mount -o loop /srv/frozen.img /srv/frozen")
    guests.linux("stuck", extra=DISK.format("/srv/frozen/stuck"))
    guests.linux("free")
    vm.run("fsfreeze", "--freeze", "/srv/frozen")
    try:
        since = vm.cursor()
        starting = vm.popen("systemctl", "start", "kvmd@stuck")
        vm.wait_journal("KVMD_GUEST=stuck", message="waits for its storage: /srv/frozen/stuck.qcow2", since=since)
        guests.start("free", ready=False)
        guests.guest_off("free")
        vm.run("systemctl", "stop", "kvmd@stuck")
        assert starting.wait(20)
        assert guests.get("stuck", "State") == "stopped"
    finally:
        vm.run("fsfreeze", "--unfreeze", "/srv/frozen")
    guests.start("stuck", ready=False)
    guests.clear()
    vm.run("umount", "/srv/frozen")


@pytest.fixture
def spared(deb: Path) -> Iterator[lab.VM]:
    with lab.VM("bookworm", deb, name="spared", spare=True) as vm:
        yield vm


@pytest.mark.skipif(not os.environ.get("KVMD_ALL"), reason="a machine of its own for two minutes: with KVMD_ALL=1")
@pytest.mark.xdist_group("vm")
def test_a_pci_device_of_the_host(spared: lab.VM) -> None:
    """A guest reads and writes the machine's spare disk by a driver of its own; what is in the way before is said."""
    vm = spared
    guests, spare = Guests(vm), lab.vm.SPARE
    guests.linux("driver", cmdline="kvmd.disk=1", extra=f'[[pci]]\naddress = "{spare[5:]}"\n')

    def refusal() -> str:
        return str(guests.call("StartGuest", "s", "driver", check=False).stderr)

    vm.run("modprobe", "nvme")
    vm.run("modprobe", "vfio-pci")
    hint = f"(driverctl set-override {spare} vfio-pci)"
    assert f"PCI device {spare} cannot be handed over: it is in the hands of the host's driver nvme {hint}" in refusal()
    device = f"/sys/bus/pci/devices/{spare}"
    vm.run("sh", "-ec", f"echo vfio-pci >{device}/driver_override; echo {spare} >{device}/driver/unbind")
    assert f"PCI device {spare} cannot be handed over: it is not bound to vfio-pci {hint}" in refusal()
    vm.run("sh", "-ec", f"echo {spare} >/sys/bus/pci/drivers_probe")
    node = f"/dev/vfio/{vm.run('readlink', f'{device}/iommu_group').stdout.strip().rpartition('/')[2]}"
    for boots in (1, 2):
        since = vm.cursor()
        guests.start("driver")
        guests.wait("driver", f"^guest: disk boots={boots} stops={boots - 1}$", since)
        assert vm.run("stat", "-c", "%U", node).stdout != "root\n"
        vm.run("systemctl", "restart", "kvmd")
        vm.run("systemctl", "stop", "kvmd@driver")
        assert vm.run("stat", "-c", "%U", node).stdout == "root\n"
    guests.clear()


# Two more LANs: behind a VLAN of a trunk, and behind a bond whose two cables end at one switch.
UPLINKS = """set -e
ip netns add farm
ip link add trunk type veth peer name trunk netns farm
ip netns add barn
ip link add bond0 type bond mode active-backup miimon 20
ip -n barn link add br0 type bridge mcast_snooping 0 forward_delay 0
for cable in a b; do
    ip link add cable$cable type veth peer name cable$cable netns barn
    ip link set cable$cable master bond0
    ip -n barn link set cable$cable master br0 up
done
sysctl -qw net.ipv6.conf.trunk.disable_ipv6=1 net.ipv6.conf.bond0.accept_dad=0
for netns in farm barn; do ip netns exec $netns sysctl -qw net.ipv6.conf.default.accept_dad=0; done
ip link add link trunk name vlan7 type vlan id 7
ip -n farm link add link trunk name eth0 type vlan id 7
ip -n farm link set trunk up
ip link set trunk up
sysctl -qw net.ipv6.conf.vlan7.accept_dad=0
for words in "farm eth0 vlan7 198.18.7" "barn br0 bond0 198.18.8"; do
    set -- $words
    ip -n $1 link set $2 up
    ip -n $1 addr add $4.20/24 dev $2
    ip -n $1 addr add 2001:db8:${4##*.}::20/64 dev $2
    ip link set $3 up
    ip addr add $4.10/24 dev $3
    ip addr add 2001:db8:${4##*.}::10/64 dev $3
done
while ip addr show | grep -q tentative; do sleep 0.1; done
"""
SHAPES = """[[network]]
uplink = "vlan7"
address = ["198.18.7.42", "2001:db8:7::42"]
[[network]]
uplink = "bond0"
address = ["198.18.8.42", "2001:db8:8::42"]
"""


@pytest.mark.xdist_group("vm")
def test_main_job_on_the_kernel_of_the_release(vm: lab.VM) -> None:
    """In a container the kernel is the machine's, whatever that is; here it is Debian's own, and KVM runs the guest."""
    vm.make_lan(docker0=True)
    vm.lan.neighbour("alice", "192.0.2.20", "2001:db8:1::20")
    vm.run("sh", "-c", UPLINKS)
    guests, before = Guests(vm), vm.state()
    words = " ".join(f"kvmd.addr.{n}=198.18.{n + 6}.42/24 kvmd.addr6.{n}=2001:db8:{n + 6}::42/64" for n in (1, 2))
    guests.linux("web", last=42, cmdline=words, extra=SHAPES)
    guests.start("web")
    assert "/dev/vhost-net" in vm.run("sh", "-c", f"ls -l /proc/{guests.get('web', 'PID')}/fd").stdout
    for netns, addresses in (
        ("alice", ("192.0.2.42", "2001:db8:1::42")),
        ("farm", ("198.18.7.42", "2001:db8:7::42")),
        ("barn", ("198.18.8.42", "2001:db8:8::42")),
    ):
        for address in addresses:
            vm.run("ping", "-n", "-c", "2", "-W", "3", address, netns=netns)
    active = vm.read("/sys/class/net/bond0/bonding/active_slave").strip()
    vm.run("ip", "link", "set", active, "down")
    for address in ("198.18.8.42", "2001:db8:8::42"):
        vm.run("ping", "-n", "-c", "3", "-W", "3", address, netns="barn")
    vm.run("sh", "-ec", f"ip link set {active} up; echo {active} > /sys/class/net/bond0/bonding/active_slave")
    for address in ("192.0.2.20", "2001:db8:1::20", "192.0.2.10", "2001:db8:1::10", "198.51.100.1", "2001:db8:ffff::1"):
        assert guests.type("web", f"ping {address}", "^guest: ping")["MESSAGE"] == f"guest: ping {address} ok"
    for address in ("198.18.7.20", "2001:db8:7::20", "198.18.8.20", "2001:db8:8::20"):
        assert guests.type("web", f"ping {address}", "^guest: ping")["MESSAGE"] == f"guest: ping {address} ok"
    vm.run("systemctl", "stop", "kvmd@web")
    guests.clear()
    changed = list(difflib.unified_diff(before, vm.state(), n=0, lineterm=""))
    assert not changed, "\n".join(changed)


@pytest.mark.xdist_group("vm")
def test_the_module_of_kvm_is_loaded(vm: lab.VM) -> None:
    module = next(line.split()[0] for line in vm.read("/proc/modules").splitlines() if line.startswith("kvm_"))
    vm.run("modprobe", "-r", module)
    vm.run("systemctl", "restart", "kvmd")
    assert manager(vm, "Accelerator") == "kvm"


@pytest.mark.xdist_group("vm")
def test_a_disk_may_be_a_block_device(vm: lab.VM) -> None:
    guests = Guests(vm)
    vm.run("truncate", "-s", "16M", "/var/tmp/disk")
    device = vm.run("losetup", "--find", "--show", "/var/tmp/disk").stdout.strip()
    disk = f'[[disk]]\npath = "{device}"\nformat = "raw"\n'
    guests.linux("block", last=43, cmdline="kvmd.disk=1", extra=disk)  # with a NIC: vhost-net must open, too
    guests.start("block", ready=False)
    assert guests.wait("block", "guest: disk", timeout=90)["MESSAGE"] == "guest: disk boots=1 stops=0"
    assert "/dev/vhost-net" in vm.run("ls", "-l", f"/proc/{guests.get('block', 'PID')}/fd").stdout
    guests.clear()
    vm.run("losetup", "-d", device)
    vm.run("rm", "/var/tmp/disk")


@pytest.mark.xdist_group("vm")
def test_limits_hold(vm: lab.VM) -> None:
    guests = Guests(vm)
    limits = '[limits]\nCPUQuota = "50%"\nTasksMax = 64\nMemoryMax = '
    guests.linux("limited", extra=f'{limits}"400M"\n')
    vm.write("/etc/systemd/system/kvmd-.scope.d/weight.conf", "[Scope]\nCPUWeight=50\n")
    vm.run("systemctl", "daemon-reload")
    guests.start("limited", ready=False)
    cgroup = Path("/sys/fs/cgroup/machine.slice/kvmd-limited.scope")

    def read(*names: str) -> list[str]:
        return [vm.read(cgroup / name).strip() for name in names]

    assert read("memory.max", "cpu.max", "pids.max", "cpu.weight") == [str(400 << 20), "50000 100000", "64", "50"]
    # New limits hold at once, and a guest that needs more memory than it may have is told from one that crashed.
    more = 'MemoryLow = "1M"\nAllowedCPUs = 0\nIOWeight = 30\nIOReadBandwidthMax = "/dev/vda 2M"\n'
    guests.linux("limited", extra=f'{limits}"300M"\n{more}')
    device = vm.run("lsblk", "-dno", "MAJ:MIN", "/dev/vda").stdout.strip()
    assert read("memory.max", "memory.low", "cpuset.cpus", "io.weight") == [
        str(300 << 20),
        str(1 << 20),
        "0",
        "default 30",
    ]
    assert read("io.max") == [f"{device} rbps=2000000 wbps=max riops=max wiops=max"]
    guests.linux("limited", extra=f'{limits}"40M"\n{more}')
    vm.wait_journal(
        f"MESSAGE_ID={OUT_OF_MEMORY}", "KVMD_GUEST=limited", message="killed for lack of memory", timeout=60
    )
    assert guests.get("limited", "Result") == "oom-kill"
    assert guests.active("limited") == "failed"
    guests.clear()


@pytest.fixture(scope="module")
def plain(deb: Path) -> Iterator[lab.VM]:
    """Debian 13, on a CPU that cannot virtualise."""
    with lab.VM("trixie", deb, name="plain", cpu="qemu64,-svm") as vm:
        yield vm


@pytest.mark.xdist_group("plain")
def test_a_machine_of_the_lab(plain: lab.VM) -> None:
    assert plain.run("systemctl", "is-system-running").stdout == "running\n"
    assert plain.run("test", "-c", "/dev/kvm", check=False).returncode
    assert {"cpu", "memory", "pids"} < set(plain.read("/sys/fs/cgroup/cgroup.controllers").split())
    assert plain.run("cat", input="through\n").stdout == "through\n"
    plain.lan.neighbour("alice", "192.0.2.20", "2001:db8:1::20").ping("2001:db8:1::10")


@pytest.mark.xdist_group("plain")
def test_a_cpu_without_virtualisation_is_named(plain: lab.VM) -> None:
    guests = Guests(plain)
    assert manager(plain, "Accelerator") == "tcg"
    guests.linux("strict", top='accelerator = "kvm"')
    failed = guests.call("StartGuest", "s", "strict", check=False)
    assert "the CPU has neither vmx nor svm" in failed.stderr
