"""What a guest may not send: packets from another MAC, IPv4 or IPv6 address, router advertisements, DHCP offers; and
packets to hundreds of LAN addresses a second, each of which would cost the host an entry of its neighbour table.

One nftables table, ``inet kvmd``, checked before routing: the same rules for all, over sets of who may be what. Frames
that are no IP end at the host anyway, as do IPv6 packets from link-local addresses: nothing is bridged. The table is
there while guests run, and made anew if somebody else flushes it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from ipaddress import IPv4Network, IPv6Network, collapse_addresses

from kvmd.guest import Network, Nic
from kvmd.network.kernel.nftables import DELETIONS, GENERATION, Changes, Nftables

NAME = "kvmd"
TABLE = f"inet {NAME}"

# Added before it is deleted: so it is no error where there is none.
NOTHING = f"add table {TABLE}\ndelete table {TABLE}\n"

# An entry nobody answers for stays incomplete for 3 s and cannot be reclaimed for 5 (net/core/neighbour.c,
# neigh_forced_gc); gc_thresh3 is 1,024 by default. One guest gets at most 200 of them.
PACE = "update @pace { iifname limit rate 20/second burst 100 packets }"

_TABLE = f"""{NOTHING}table {TABLE} {{
  set guests {{ type ifname; }}
  set macs {{ type ifname . ether_addr; }}
  set own4 {{ type ifname . ipv4_addr; }}
  set own6 {{ type ifname . ipv6_addr; }}
  set behind4 {{ type ifname . ipv4_addr; flags interval; }}
  set behind6 {{ type ifname . ipv6_addr; flags interval; }}
  set lan4 {{ type ipv4_addr; flags interval; }}
  set lan6 {{ type ipv6_addr; flags interval; }}
  set talks4 {{ type ifname . ipv4_addr; flags dynamic, timeout; timeout 10s; size 65535; }}
  set talks6 {{ type ifname . ipv6_addr; flags dynamic, timeout; timeout 10s; size 65535; }}
  set pace {{ type ifname; flags dynamic, timeout; timeout 1m; size 65535; }}
  chain guest {{
    iifname . ether saddr != @macs drop
    udp sport {{ 67, 547 }} drop
    icmpv6 type {{ nd-router-advert, nd-redirect }} drop
    iifname . ip saddr @own4 goto talk
    iifname . ip6 saddr @own6 goto talk
    iifname . ip saddr @behind4 goto talk
    iifname . ip6 saddr @behind6 goto talk
    ip saddr 0.0.0.0 ip daddr 255.255.255.255 udp sport 68 udp dport 67 accept
    ip6 saddr :: icmpv6 type {{ nd-router-solicit, nd-neighbor-solicit }} accept
    ip6 saddr :: icmpv6 type {{ mld-listener-report, mld2-listener-report }} accept
    iifname . ip6 saddr @talks6 accept
    ip6 saddr fe80::/10 {PACE} add @talks6 {{ iifname . ip6 saddr }} accept
    counter drop
  }}
  chain talk {{
    iifname . ip daddr @talks4 accept
    iifname . ip6 daddr @talks6 accept
    ip daddr @lan4 {PACE} add @talks4 {{ iifname . ip daddr }} accept
    ip6 daddr @lan6 {PACE} add @talks6 {{ iifname . ip6 daddr }} accept
    ip daddr != @lan4 accept
    ip6 daddr != @lan6 accept
    counter drop
  }}
  chain prerouting {{
    type filter hook prerouting priority raw - 10; policy accept;
    iifname @guests goto guest
  }}
  chain forward {{
    type filter hook forward priority filter; policy accept;
    oifname @guests ip saddr @lan4 update @talks4 {{ oifname . ip saddr }}
    oifname @guests ip6 saddr @lan6 update @talks6 {{ oifname . ip6 saddr }}
  }}
}}
"""


def elements(action: str, nic: Nic) -> str:
    """Commands for nft(8): ``add`` or ``delete`` what ``nic`` may send as.

    Prefixes are apart from addresses: the more a set of intervals holds, the longer takes each change of it.
    """
    four = collapse_addresses(item for item in nic.routes if isinstance(item, IPv4Network))
    six = collapse_addresses(item for item in nic.routes if isinstance(item, IPv6Network))
    sets: dict[str, Iterable[object]] = {
        "macs": [nic.mac],
        "own4": [address for address in nic.addresses if address.version == 4],
        "own6": [address for address in nic.addresses if address.version == 6],
        "behind4": four,  # collapsed: nft refuses one that another one holds
        "behind6": six,
    }
    text = f'{action} element {TABLE} guests {{ "{nic.tap}" }}\n'
    for name, items in sets.items():
        if listed := ", ".join(f'"{nic.tap}" . {item}' for item in items):
            text += f"{action} element {TABLE} {name} {{ {listed} }}\n"
    return text


def neighbourhood(prefixes: Collection[Network]) -> str:
    """Commands for nft(8): these are the LANs' prefixes now."""
    four = collapse_addresses(prefix for prefix in prefixes if isinstance(prefix, IPv4Network))
    six = collapse_addresses(prefix for prefix in prefixes if isinstance(prefix, IPv6Network))
    text = ""
    for name, lan in (("lan4", ", ".join(map(str, four))), ("lan6", ", ".join(map(str, six)))):
        text += f"flush set {TABLE} {name}\n" + (f"add element {TABLE} {name} {{ {lan} }}\n" if lan else "")
    return text


def _others(nics: Mapping[str, Nic], known: Mapping[str, Nic]) -> list[Nic]:
    """Those that are not the same among ``known``; to compare a thousand that are would take 2 ms."""
    return [nic for tap, nic in nics.items() if known.get(tap) is not nic and known.get(tap) != nic]


def transactions(changes: Iterable[tuple[int, str]]) -> int:
    """How many changed something of ours."""
    count, ours = 0, False
    for kind, table in changes:
        if kind == GENERATION:
            count, ours = count + ours, False
        else:
            ours = ours or table == NAME
    return count


class Firewall:
    """Keeps the table as the running guests need it."""

    def __init__(self, lost: Callable[[], None]) -> None:
        """``lost()``: somebody else removed a piece; ask again for what is wanted. Needs a running loop.

        Raises OSError: no libnftables, no CAP_NET_ADMIN.
        """
        self._lost = lost
        self.restored = False  # by the last call of ``apply``: a piece that somebody had removed
        self._missing = False
        self._applied: dict[str, Nic] | None = None  # by tap; None: not known
        self._lans: frozenset[Network] = frozenset()
        self._nft = Nftables()
        self._changes = Changes(self._heard)

    def close(self) -> None:
        """Leaves the table as it is."""
        self._changes.close()

    def apply(self, nics: Iterable[Nic], lans: frozenset[Network]) -> str:
        """These run, and no others, on LANs with these prefixes; all or nothing. Returns why not, in words, or "".

        A NIC without addresses is the administrator's to filter. Blocks for 0.2 ms per guest that comes or goes.
        """
        wanted = {nic.tap: nic for nic in nics if nic.addresses}
        self._look()
        self.restored = False
        if wanted == self._applied and (lans == self._lans or not wanted):
            return ""
        if not wanted:
            text = NOTHING
        elif not self._applied:
            text = _TABLE + "".join(elements("add", nic) for nic in wanted.values()) + neighbourhood(lans)
        else:
            text = "".join(elements("delete", nic) for nic in _others(self._applied, wanted))
            text += "".join(elements("add", nic) for nic in _others(wanted, self._applied))
            text += neighbourhood(lans) if lans != self._lans else ""
        error = self._nft.run(text)
        self._applied, self._lans = None if error else wanted, lans
        self.restored, self._missing = self._missing and not error, self._missing and bool(error)
        if transactions(self._changes.read() or ()) > 1:  # one of them is what we have just done ourselves
            self._applied, self._missing = None, True
            self._lost()
        return error

    def _heard(self) -> None:
        if self._look():
            self._lost()

    def _look(self) -> bool:
        """Whether something of ours has been deleted, by others."""
        changes = self._changes.read()
        lost = changes is None or any(kind in DELETIONS and table == NAME for kind, table in changes)
        if lost and self._applied:
            self._applied, self._missing = None, True
            return True
        return False
