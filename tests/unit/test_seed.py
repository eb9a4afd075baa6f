"""What a guest is told at its first boot: cloud-init's seed, systemd's credentials."""

from __future__ import annotations

import io
import json
import os
from dataclasses import replace
from ipaddress import ip_address, ip_interface
from pathlib import Path
from uuid import UUID

import pycdlib
import pytest

from kvmd.guest import CloudInit, Guest, Nic
from kvmd.network.model.settings import Settings, network_config, settings
from kvmd.qemu.seed import credential, meta_data, open_credentials, open_seed

from .test_dhcp import HOST, UPLINK

GUEST = Guest("web", Path("/etc/kvmd/web.toml"), UUID(int=1))
NIC = Nic("kv-web", "52:54:00:00:00:01", addresses=tuple(map(ip_address, ("192.0.2.42", "2001:db8:1::42"))))
SERVERS = [ip_address("192.0.2.1")]


def read(fd: int) -> dict[str, str]:
    """The files of a seed, and what its label is under "/"."""
    with os.fdopen(fd, "rb") as file:
        image = pycdlib.PyCdlib()
        image.open_fp(io.BytesIO(file.read()))
        found = {"/": image.pvd.volume_identifier.decode().strip()}
        for child in image.list_children(rr_path="/"):
            if child.is_file():
                text = io.BytesIO()
                name = child.rock_ridge.name().decode()
                image.get_file_from_iso_fp(text, rr_path=f"/{name}")
                found[name] = text.getvalue().decode()
        image.close()
    return found


def seed(cloud_init: CloudInit, config: dict[str, object]) -> dict[str, str]:
    return read(open_seed(GUEST, cloud_init, config, config))


def test_settings_are_those_of_the_lan() -> None:
    found = settings(NIC, UPLINK, HOST)
    assert found == Settings(
        NIC.mac,
        tuple(map(ip_interface, ("192.0.2.42/23", "2001:db8:1::42/64"))),
        (ip_address("192.0.2.1"), ip_address("fe80::1")),
        1400,
    )
    assert network_config([(NIC, found)], SERVERS) == {
        "version": 2,
        "ethernets": {
            "nic0": {
                "match": {"macaddress": "52:54:00:00:00:01"},
                "addresses": ["192.0.2.42/23", "2001:db8:1::42/64"],
                "routes": [{"to": "0.0.0.0/0", "via": "192.0.2.1"}, {"to": "::/0", "via": "fe80::1"}],
                "mtu": 1400,
                "nameservers": {"addresses": ["192.0.2.1"]},
            }
        },
    }


def test_an_address_alone_gets_a_prefix_with_its_gateway() -> None:
    """As a guest of a rented host is told by DHCP."""
    found = settings(replace(NIC, addresses=(ip_address("203.0.113.9"),)), UPLINK, HOST)
    assert found
    [own] = found.addresses
    [gateway] = found.gateways
    assert own.ip == ip_address("203.0.113.9")
    assert gateway in own.network


def test_what_is_told_by_dhcp_and_what_is_not_known() -> None:
    told = replace(NIC, configure=True, addresses=NIC.addresses[:1])
    config = network_config([(told, None), (NIC, None)], SERVERS)
    assert config["ethernets"] == {
        "nic0": {"match": {"macaddress": NIC.mac}, "dhcp4": True, "dhcp6": False},
    }
    assert network_config([(NIC, None)], SERVERS) == {}


def test_seed() -> None:
    config: dict[str, object] = {"version": 2, "ethernets": {}}
    found = seed(CloudInit(user_data="#cloud-config\nhostname: x\n"), config)
    assert found["/"] == "cidata"
    assert found["user-data"] == "#cloud-config\nhostname: x\n"
    assert json.loads(found["network-config"]) == config
    instance, host = found["meta-data"].splitlines()
    assert instance.startswith("instance-id: web-")
    assert host == "local-hostname: web"
    assert "network-config" not in seed(CloudInit(), {})
    assert seed(CloudInit(network_config="version: 1"), config)["network-config"] == "version: 1"


def test_another_instance_when_the_data_changes() -> None:
    def instance(cloud_init: CloudInit, network: dict[str, object], servers: dict[str, object]) -> str:
        return read(open_seed(GUEST, cloud_init, network, servers))["meta-data"].splitlines()[0]

    first = instance(CloudInit("#!/bin/sh"), {"version": 2}, {"version": 2, "nameservers": 1})
    assert instance(CloudInit("#!/bin/sh"), {"version": 2}, {"version": 2, "nameservers": 2}) == first
    assert instance(CloudInit("#!/bin/true"), {"version": 2}, {"version": 2, "nameservers": 1}) != first
    assert instance(CloudInit("#!/bin/sh"), {"version": 3}, {"version": 2, "nameservers": 1}) != first


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ("", "instance-id: web-1\nlocal-hostname: web\n"),
        ("instance-id: mine\n", "local-hostname: web\ninstance-id: mine\n"),
        ("local-hostname: mine\ninstance-id: mine\n", "local-hostname: mine\ninstance-id: mine\n"),
        ('{"local-hostname": "mine"}', '{"instance-id": "web-1", "local-hostname": "mine"}'),
    ],
)
def test_meta_data(given: str, made: str) -> None:
    assert meta_data(GUEST, CloudInit(meta_data=given), "1") == made


def test_credentials() -> None:
    assert credential("a.b", "plain text") == b"io.systemd.credential:a.b=plain text"
    assert credential("key", "two\nlines") == b"io.systemd.credential.binary:key=dHdvCmxpbmVz"
    [fd] = open_credentials(replace(GUEST, credentials={"a": "b"}))
    with os.fdopen(fd, "rb") as file:
        assert file.read() == b"io.systemd.credential:a=b"


def test_secrets_are_not_shown() -> None:
    guest = replace(GUEST, credentials={"a": "hunter2"}, cloud_init=CloudInit(user_data="hunter2"))
    assert "hunter2" not in repr(guest)
