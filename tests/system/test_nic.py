"""What a guest finds of its network interface: queues, MTU."""

from __future__ import annotations

from .guests import Guests


def test_a_queue_for_each_cpu(guests: Guests) -> None:
    guests.linux("wide", last=44, top="cpus = 2")
    guests.start("wide")
    queues = guests.host.run("ls", "/sys/class/net/kv-wide/queues").stdout.split()
    assert queues == ["rx-0", "rx-1", "tx-0", "tx-1"]
    guests.type("wide", "sh ls -d /sys/class/net/eth0/queues/tx-1", "queues/tx-1$")
    guests.host.run("ping", "-n", "-c", "2", "-W", "3", "192.0.2.44", netns="alice")
    assert guests.type("wide", "ping 192.0.2.20", "^guest: ping")["MESSAGE"] == "guest: ping 192.0.2.20 ok"


def test_a_tap_of_somebody_elses_has_the_queues_it_has(guests: Guests) -> None:
    guests.host.run("ip", "tuntap", "add", "own0", "mode", "tap", "vnet_hdr")
    try:
        network = '[[network]]\naddress = ["192.0.2.45"]\ntap = "own0"\n'
        words = "console=ttyS0 quiet kvmd.name=own kvmd.addr=192.0.2.45/24 kvmd.gw=192.0.2.1"
        boot = f'[boot]\nkernel = "vmlinuz"\ninitrd = "initrd.img"\ncmdline = "{words}"\n'
        guests.write("own", f'memory = "128M"\ncpus = 2\nstop_timeout = "20s"\n{boot}{network}')
        guests.start("own")
        guests.host.run("ping", "-n", "-c", "1", "-W", "3", "192.0.2.45", netns="alice")
        guests.host.run("systemctl", "stop", "kvmd@own")
    finally:
        guests.host.run("ip", "tuntap", "del", "own0", "mode", "tap")


def test_mtu_is_the_uplinks(guests: Guests) -> None:
    host = guests.host
    host.run("ip", "link", "set", "eth0", "mtu", "1400")
    try:
        guests.linux("small", last=46)
        guests.start("small")
        assert guests.type("small", "sh cat /sys/class/net/eth0/mtu", "^[0-9]+$")["MESSAGE"] == "1400"
        assert host.read("/sys/class/net/kv-small/mtu").strip() == "1400"
    finally:
        host.run("ip", "link", "set", "eth0", "mtu", "1500")
