"""The keys of a guest file, one row each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvmd.config.limits import LIMITS
from kvmd.config.values import (
    Parse,
    address,
    arguments,
    boot_order,
    choice,
    count,
    endpoint,
    flag,
    host_directory,
    host_file,
    image,
    interface,
    line,
    list_of,
    mac,
    machine,
    memory,
    network,
    pattern,
    pci_device,
    secret,
    size,
    tag,
    timeout,
    uplink,
    usb_device,
    uuid,
    word,
)
from kvmd.guest import BUSES, FORMATS, MODELS
from kvmd.profile import PROFILES


@dataclass(frozen=True)
class Key:
    """How to read a key; ``host``: it may also stand in kvmd.conf."""

    parse: Parse
    host: bool = True
    required: bool = False


@dataclass(frozen=True)
class Table:
    """``[name]``; with ``entries`` ``[[name]]``. ``other`` reads keys of any other name."""

    keys: Mapping[str, Key | Table]
    entries: bool = False
    other: Key | None = None


GUEST = Table(
    {
        "description": Key(line, host=False),
        "memory": Key(memory),
        "cpus": Key(count(1, 1024)),
        "accelerator": Key(choice("auto", "kvm", "tcg")),
        "machine": Key(machine),
        "cpu": Key(word),
        "firmware": Key(choice("bios", "uefi")),
        "secure_boot": Key(flag),
        "profile": Key(choice(*PROFILES)),
        "autostart": Key(flag, host=False),
        "restart": Key(choice("no", "on-failure", "always")),
        "stop_timeout": Key(timeout),
        "uuid": Key(uuid, host=False),
        "boot": Table(
            {
                "order": Key(boot_order),
                "kernel": Key(image),
                "initrd": Key(image),
                "cmdline": Key(line),
            }
        ),
        "disk": Table(
            {
                "path": Key(image, host=False, required=True),
                "size": Key(size),
                "format": Key(choice(*FORMATS)),
                "base": Key(image),
                "base_format": Key(choice(*FORMATS)),
                "backing": Key(list_of(image)),
                "bus": Key(choice(*BUSES)),
                "readonly": Key(flag),
            },
            entries=True,
        ),
        "cdrom": Table({"path": Key(image, host=False)}, entries=True),
        "network": Table(
            {
                "uplink": Key(uplink),
                "address": Key(list_of(address), host=False),
                "route": Key(list_of(network), host=False),
                "mac": Key(mac, host=False),
                "model": Key(choice(*MODELS)),
                "tap": Key(interface, host=False),
                "configure": Key(flag),
            },
            entries=True,
        ),
        "serial": Table({"log": Key(flag), "screen": Key(flag), "ready": Key(pattern), "ready_timeout": Key(timeout)}),
        "vsock": Table({"ready": Key(flag), "ready_timeout": Key(timeout)}),
        "limits": Table({name: Key(parse) for name, parse in LIMITS.items()}),
        "credentials": Table({}, other=Key(secret)),
        "cloud_init": Table({"user_data": Key(secret), "meta_data": Key(secret), "network_config": Key(secret)}),
        "display": Table({"vnc": Key(flag), "address": Key(endpoint, host=False), "password_file": Key(host_file)}),
        "share": Table(
            {
                "path": Key(host_directory, host=False, required=True),
                "tag": Key(tag, host=False, required=True),
                "readonly": Key(flag),
                "user": Key(word),
            },
            entries=True,
        ),
        "usb": Table({"device": Key(usb_device, host=False, required=True)}, entries=True),
        "pci": Table({"address": Key(pci_device, host=False, required=True)}, entries=True),
        "agent": Table({"enabled": Key(flag)}),
        "tpm": Table({"enabled": Key(flag)}),
        "qemu": Table({"args": Key(arguments)}),
    }
)

# What kvmd.conf may say beyond defaults for guests.
HOST = Table(
    {
        "firewall": Table({"open": Key(flag)}),
        "group": Table({"identity": Key(word), "hosts": Key(list_of(word))}),
    }
)
