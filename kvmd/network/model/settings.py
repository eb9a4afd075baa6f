"""What a guest without ``configure`` has to be set up with inside, where cloud-init does it: network-config, version 2.

cloud-init.io, "Networking config Version 2".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Interface, ip_interface

from kvmd.guest import Address, Nic
from kvmd.network.model.dhcp import default_gateways, with_gateway
from kvmd.network.model.host import Host, Interface, Link


@dataclass(frozen=True, slots=True)
class Settings:
    """Of one NIC: its addresses with the prefix lengths of the LAN, the LAN's gateways, and its MTU in bytes."""

    mac: str
    addresses: tuple[Interface, ...]
    gateways: tuple[Address, ...]
    mtu: int


def settings(nic: Nic, uplink: Link, host: Host) -> Settings | None:
    """None where there is nothing to set up, or the LAN is not known yet."""
    families = {prefix.version for prefix in host.prefixes(uplink)}
    if not {address.version for address in nic.addresses} & families:
        return None
    four, six = default_gateways(uplink, host)
    found: list[Interface] = []
    gateways: dict[int, Address] = {}
    for address in nic.addresses:
        prefix = host.prefix(uplink, address)
        interface = ip_interface((address, prefix.prefixlen if prefix else 32 if address.version == 4 else 64))
        if isinstance(interface, IPv4Interface):
            if four and 4 not in gateways:
                interface, gateways[4] = with_gateway(interface, four)
        elif six:
            gateways[6] = six
        found.append(interface)
    return Settings(nic.mac, tuple(found), tuple(gateways.values()), uplink.mtu)


def network_config(found: Sequence[tuple[Nic, Settings | None]], servers: Iterable[Address]) -> Mapping[str, object]:
    """Of a guest's NICs, in their order; a NIC of which nothing is known is left out, unless it is told by DHCP."""
    names = [str(server) for server in servers]
    nics: dict[str, object] = {}
    for position, (nic, known) in enumerate(found):
        match: dict[str, object] = {"match": {"macaddress": nic.mac}}
        if nic.configure:
            families = nic.families
            nics[f"nic{position}"] = match | {"dhcp4": 4 in families, "dhcp6": 6 in families}
        elif known:
            of = {address.version for address in known.addresses}
            usable = [name for name in names if (6 if ":" in name else 4) in of]
            nics[f"nic{position}"] = match | {
                "addresses": [str(address) for address in known.addresses],
                "routes": [
                    {"to": "::/0" if gateway.version == 6 else "0.0.0.0/0", "via": str(gateway)}
                    for gateway in known.gateways
                ],
                "mtu": known.mtu,
                **({"nameservers": {"addresses": usable}} if usable else {}),
            }
    return {"version": 2, "ethernets": nics} if nics else {}
