"""What a guest may not send: packets from another MAC, IPv4 or IPv6 address, router advertisements, DHCP offers; and
packets to hundreds of LAN addresses a second, each of which would cost the host an entry of its neighbour table.
From which MACs and addresses it tried is kept for a minute, some few of each guest.

And what nobody else may: packets from a guest's address that come in by another way than its own tap reach neither this
host nor other guests. They do reach that guest, which may have sent them by one of its uplinks to another.

One nftables table, ``inet kvmd``, the same rules for all, over sets of who may be what: guests are checked before
routing, others once it is known where they go. Frames that are no IP end at the host anyway, as do IPv6 packets from
link-local addresses: nothing is bridged. The table is there while guests run, made anew if somebody else flushes it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from ipaddress import IPv4Network, IPv6Network, collapse_addresses, ip_address

from kvmd.guest import Address, Network, Nic
from kvmd.network.kernel.nftables import DELETIONS, GENERATION, Changes, Elements, Nftables

NAME = "kvmd"
IFNAMSIZ = 16  # linux/if.h
TABLE = f"inet {NAME}"

# Added before it is deleted: so it is no error where there is none.
NOTHING = f"add table {TABLE}\ndelete table {TABLE}\n"

# Within a guest's prefix the host may know others by a longer one: what comes in by the way that leads back is theirs.
ASTRAY = "fib saddr . iif oif missing"

# An entry nobody answers for stays incomplete for 3 s and cannot be reclaimed for 5 (net/core/neighbour.c,
# neigh_forced_gc); gc_thresh3 is 1,024 by default. One guest gets at most 200 of them.
PACE = "update @pace { iifname limit rate 20/second burst 100 packets }"

# What a guest is told by: so many others' addresses of it are noted, of a flood of forged ones, too.
NOTE = "update @noted { iifname limit rate 4/minute burst 8 packets }"

_TABLE = f"""{NOTHING}table {TABLE} {{
  set guests {{ type ifname; }}
  set macs {{ type ifname . ether_addr; }}
  set own4 {{ type ifname . ipv4_addr; }}
  set own6 {{ type ifname . ipv6_addr; }}
  set behind4 {{ type ifname . ipv4_addr; flags interval; }}
  set behind6 {{ type ifname . ipv6_addr; flags interval; }}
  set kin4 {{ type ifname . ipv4_addr; }}
  set kin6 {{ type ifname . ipv6_addr; }}
  set behindkin4 {{ type ifname . ipv4_addr; flags interval; }}
  set behindkin6 {{ type ifname . ipv6_addr; flags interval; }}
  set taken4 {{ type ipv4_addr; }}
  set taken6 {{ type ipv6_addr; }}
  set routed4 {{ type ipv4_addr; flags interval; }}
  set routed6 {{ type ipv6_addr; flags interval; }}
  set lan4 {{ type ipv4_addr; flags interval; }}
  set lan6 {{ type ipv6_addr; flags interval; }}
  set talks4 {{ type ifname . ipv4_addr; flags dynamic, timeout; timeout 10s; size 65535; }}
  set talks6 {{ type ifname . ipv6_addr; flags dynamic, timeout; timeout 10s; size 65535; }}
  set pace {{ type ifname; flags dynamic, timeout; timeout 1m; size 65535; }}
  set noted {{ type ifname; flags dynamic, timeout; timeout 5m; size 65535; }}
  set strange_macs {{ type ifname . ether_addr; flags dynamic, timeout; timeout 1m; size 65535; }}
  set strange4 {{ type ifname . ipv4_addr; flags dynamic, timeout; timeout 1m; size 65535; }}
  set strange6 {{ type ifname . ipv6_addr; flags dynamic, timeout; timeout 1m; size 65535; }}
  chain guest {{
    iifname . ether saddr != @macs goto strange
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
    goto strange
  }}
  chain strange {{
    iifname . ether saddr @strange_macs counter drop
    iifname . ether saddr != @macs {NOTE} add @strange_macs {{ iifname . ether saddr }}
    iifname . ether saddr != @macs counter drop
    ip saddr {{ 0.0.0.0/8, 127.0.0.0/8, 169.254.0.0/16, 224.0.0.0/3 }} counter drop
    ip6 saddr {{ ::/127, fe80::/10, ff00::/8 }} counter drop
    iifname . ip saddr @strange4 counter drop
    iifname . ip6 saddr @strange6 counter drop
    meta nfproto ipv4 {NOTE} add @strange4 {{ iifname . ip saddr }}
    meta nfproto ipv6 {NOTE} add @strange6 {{ iifname . ip6 saddr }}
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
  chain stranger {{
    ip saddr @taken4 goto pretender
    ip6 saddr @taken6 goto pretender
    ip saddr @routed4 {ASTRAY} goto pretender
    ip6 saddr @routed6 {ASTRAY} goto pretender
  }}
  chain pretender {{
    oifname . ip saddr @own4 return
    oifname . ip6 saddr @own6 return
    oifname . ip saddr @behind4 return
    oifname . ip6 saddr @behind6 return
    oifname . ip saddr @kin4 return
    oifname . ip6 saddr @kin6 return
    oifname . ip saddr @behindkin4 return
    oifname . ip6 saddr @behindkin6 return
    counter drop
  }}
  chain prerouting {{
    type filter hook prerouting priority raw - 10; policy accept;
    iifname @guests goto guest
  }}
  chain input {{
    type filter hook input priority filter; policy accept;
    iifname != @guests goto stranger
  }}
  chain forward {{
    type filter hook forward priority filter; policy accept;
    iifname != @guests jump stranger
    oifname @guests ip saddr @lan4 update @talks4 {{ oifname . ip saddr }}
    oifname @guests ip6 saddr @lan6 update @talks6 {{ oifname . ip6 saddr }}
  }}
}}
"""


def elements(action: str, nic: Nic) -> str:
    """Commands for nft(8): ``add`` or ``delete`` what ``nic`` may send as, and what it may get back by another way.

    Prefixes are apart from addresses: the more a set of intervals holds, the longer takes each change of it.
    """
    sets: dict[str, Iterable[object]] = {
        "macs": [nic.mac],
        **_by_version("own", nic.addresses),
        **_by_version("behind", _outermost(nic.routes)),
        **_by_version("kin", (item for item in nic.kin if isinstance(item, Address))),
        **_by_version("behindkin", _outermost(item for item in nic.kin if isinstance(item, Network))),
    }
    text = f'{action} element {TABLE} guests {{ "{nic.tap}" }}\n'
    for name, items in sets.items():
        if listed := ", ".join(f'"{nic.tap}" . {item}' for item in items):
            text += f"{action} element {TABLE} {name} {{ {listed} }}\n"
    return text


def _by_version(name: str, items: Iterable[Address | Network]) -> dict[str, list[Address | Network]]:
    given = list(items)
    return {f"{name}{version}": [item for item in given if item.version == version] for version in (4, 6)}


def _outermost(prefixes: Iterable[Network]) -> list[Network]:
    """Without those that another one holds, which nft refuses; neighbours are not merged, so that one can go alone."""
    found: list[Network] = []
    for prefix in sorted(prefixes, key=_place):
        if not found or prefix.network_address not in found[-1]:
            found.append(prefix)
    return found


def _place(prefix: Network) -> tuple[int, int, int]:
    """Where it stands among others: what holds it comes before it."""
    return prefix.version, int(prefix.network_address), prefix.prefixlen


class _Taken:
    """The addresses and prefixes of all guests, counted: while files change, two that run may have the same."""

    def __init__(self) -> None:
        self._addresses: Counter[Address] = Counter()
        self._prefixes: Counter[Network] = Counter()

    def change(self, gone: Iterable[Nic], new: Iterable[Nic]) -> str:
        """Commands for nft(8) of what is no longer taken, and what is now."""
        addresses: Counter[Address] = Counter(address for nic in new for address in nic.addresses)
        addresses.subtract(address for nic in gone for address in nic.addresses)
        prefixes: Counter[Network] = Counter(prefix for nic in new for prefix in nic.routes)
        prefixes.subtract(prefix for nic in gone for prefix in nic.routes)
        before = self._among(addresses, prefixes)
        self._addresses.update(addresses)
        self._prefixes.update(prefixes)
        after = self._among(addresses, prefixes)
        text = ""
        for action, items in (("delete", before - after), ("add", after - before)):
            sets = {
                **_by_version("taken", (item for item in items if isinstance(item, Address))),
                **_by_version("routed", (item for item in items if isinstance(item, Network))),
            }
            for name, each in sets.items():
                if listed := ", ".join(map(str, each)):
                    text += f"{action} element {TABLE} {name} {{ {listed} }}\n"
        return text

    def _among(self, addresses: Iterable[Address], prefixes: Collection[Network]) -> set[Address | Network]:
        """What is taken of these addresses; and of all prefixes, where there is one of these."""
        return {
            *(address for address in addresses if self._addresses[address]),
            *_outermost(prefix for prefix, count in self._prefixes.items() if count and prefixes),
        }


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
        self._taken = _Taken()
        self._nft = Nftables()
        self._elements = Elements()
        self._changes = Changes(self._heard)

    def close(self) -> None:
        """Leaves the table as it is."""
        self._elements.close()
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
            self._taken = _Taken()
            text = _TABLE + "".join(elements("add", nic) for nic in wanted.values()) + neighbourhood(lans)
            text += self._taken.change((), wanted.values())
        else:
            gone, new = _others(self._applied, wanted), _others(wanted, self._applied)
            text = "".join(elements("delete", nic) for nic in gone) + "".join(elements("add", nic) for nic in new)
            text += self._taken.change(gone, new)
            text += neighbourhood(lans) if lans != self._lans else ""
        error = self._nft.run(text)
        self._applied, self._lans = None if error else wanted, lans
        self.restored, self._missing = self._missing and not error, self._missing and bool(error)
        if transactions(self._changes.read() or ()) > 1:  # one of them is what we have just done ourselves
            self._applied, self._missing = None, True
            self._lost()
        return error

    def strangers(self) -> list[tuple[str, str | Address]]:
        """What guests, by tap, have sent from lately that is not theirs: MACs and addresses. Takes below 1 ms."""
        found: list[tuple[str, str | Address]] = []
        for name in ("strange_macs", "strange4", "strange6"):
            for key in self._elements.of(NAME, name):
                tap, source = key[:IFNAMSIZ].rstrip(b"\0").decode(errors="replace"), key[IFNAMSIZ:]
                found.append((tap, source[:6].hex(":") if name == "strange_macs" else ip_address(source)))
        return found

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
