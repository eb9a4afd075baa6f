"""What a guest may be told about its IPv6 neighbours: pure judgement of what it asks on its tap."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from enum import Enum
from ipaddress import IPv6Address, IPv6Network

from kvmd.guest import Address, Nic
from kvmd.network.model.host import Host, Link
from kvmd.network.model.plan import tap_proxies


class Verdict(Enum):
    """Of a neighbour solicitation heard on a tap."""

    SILENT = "not ours to answer"
    ANSWER = "solicited advertisement with the tap's MAC"
    TAKEN = "duplicate address detection: somebody has it"
    ASK = "duplicate address detection: only the LAN knows"


@dataclass(frozen=True, slots=True, eq=False)
class Vicinity:
    """What one guest may ask for: like IPv4's proxy_arp, any address on its LAN, whether it exists or not."""

    known: frozenset[IPv6Address]  # the guest's own, and those the kernel answers for on its tap
    on_link: tuple[IPv6Network, ...]
    local: Set[Address]  # addresses on this host: its own, other guests'; of all views the same object
    uplink: int = 0  # where to ask; 0: nowhere

    def judge(self, source: IPv6Address, target: IPv6Address) -> Verdict:
        """RFC 4861 section 7.2.3 and 4862 section 5.4.3, for a proxy that must not disturb the guest's own DAD."""
        if target in self.known or target.is_multicast:
            return Verdict.SILENT
        if source.is_unspecified:
            if target in self.local:
                return Verdict.TAKEN
            return Verdict.ASK if self._reachable(target) else Verdict.SILENT
        return Verdict.ANSWER if target in self.local or self._reachable(target) else Verdict.SILENT

    def _reachable(self, target: IPv6Address) -> bool:
        return any(target in prefix for prefix in self.on_link)


def vicinity(nic: Nic, tap: Link, uplink: Link | None, host: Host, local: Set[Address]) -> Vicinity:
    """The view of one guest; ``local`` as of the host."""
    known = {*nic.addresses, *(proxy.address for proxy in tap_proxies(nic, tap, uplink, host))}
    return Vicinity(
        frozenset(address for address in known if isinstance(address, IPv6Address)),
        tuple(prefix for prefix in (host.on_link(uplink) if uplink else ()) if isinstance(prefix, IPv6Network)),
        local,
        uplink.index if uplink else 0,
    )


def own_addresses(host: Host) -> frozenset[Address]:
    """Those of the host itself that a guest may ask for."""
    own = [interface.ip for interfaces in host.addresses.values() for interface in interfaces]
    return frozenset(item for item in own if not item.is_link_local)
