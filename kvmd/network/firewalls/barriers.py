"""Others' firewalls: which of them drops what is forwarded to and from a guest. Pure.

There is no asking the kernel what would become of a packet. So one is led through the rules by thought: the first of a
connection, between a tap and its uplink, with nothing special about it. A rule counts for it only if all its
conditions are known to be met: one about ports, addresses or marks lets special traffic pass, or holds it up, but
not this packet. That errs on the side of a warning too many, which is why people are told "probably".

Rules are read as libnftables-json(5) has them; iptables' are among them, unless they are those of iptables-legacy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, Literal, NamedTuple

MARK = "kvmd"  # the comment of our rules
OWN = "kvmd"  # our own table holds no barriers

Expression = Mapping[str, Any]
Verdict = Literal["accept", "drop", "return"] | None  # None: goes on with the next rule

FAMILIES = {"ip": (4,), "ip6": (6,), "inet": (4, 6)}
# Where these tools want the rules of others, the first that a packet comes through.
PLACES = {"DOCKER-USER": "Docker", "ufw-user-forward": "ufw", "ufw6-user-forward": "ufw"}
PASSIVE = {"counter", "log", "mangle", "notrack", "ct helper", "secmark", "flow"}
UNKNOWN = object()


class Chain(NamedTuple):
    """Address of a chain."""

    family: str
    table: str
    name: str

    def __str__(self) -> str:
        return f"chain {self.name} of table {self.family} {self.table}"


@dataclass(frozen=True, slots=True)
class Passage:
    """What is to be forwarded: between ``tap`` and ``uplink`` ("" if there is none), of these IP versions."""

    tap: str
    uplink: str
    versions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Barrier:
    """``base`` drops a packet that should pass; ``place`` is where a rule of ours helps; ``owner`` is whose it is."""

    base: Chain
    place: Chain
    owner: str


@dataclass(frozen=True, slots=True)
class Opening:
    """A rule of ours: what comes from (iifname) or goes to (oifname) a tap is accepted."""

    chain: Chain
    key: str
    tap: str


@dataclass(frozen=True)
class Ruleset:
    """``bases``: chains on the forward hook, and their policies. ``ours``: rules marked as ours, and their handles."""

    chains: Mapping[Chain, Sequence[Sequence[Expression]]] = field(default_factory=dict)
    bases: Mapping[Chain, str] = field(default_factory=dict)
    ours: Mapping[Opening, Sequence[int]] = field(default_factory=dict)
    words: frozenset[str] = frozenset()  # all that the rules speak of, names of interfaces among them
    found: dict[Passage, list[Barrier]] = field(default_factory=dict, compare=False)

    def like(self, passage: Passage) -> Passage:
        """One for all taps that no rule knows by name: of 500 guests, most are treated alike."""
        named = passage.tap in self.words or any(fnmatchcase(passage.tap, pattern) for pattern in self._patterns)
        return passage if named else replace(passage, tap="")

    @cached_property
    def _patterns(self) -> list[str]:
        return [word for word in self.words if word.endswith("*")]

    def has(self, family: str, table: str) -> bool:
        return any((base.family, base.table) == (family, table) for base in self.bases)


class _Packet(NamedTuple):
    version: int
    iifname: str
    oifname: str


def tables(listing: Iterable[Mapping[str, Any]]) -> list[str]:
    """``family table`` of others' base chains on the forward hook, from ``list chains``."""
    found = {f"{base.family} {base.table}" for base, _policy in _bases(listing)}
    return sorted(found)


def _bases(listing: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Chain, str]]:
    for item in listing:
        chain = item.get("chain", {})
        if chain.get("hook") == "forward" and chain["family"] in FAMILIES and chain["table"] != OWN:
            yield Chain(chain["family"], chain["table"], chain["name"]), chain.get("policy", "accept")


def parse(listing: Sequence[Mapping[str, Any]]) -> Ruleset:
    """Of ``list table`` for each of ``tables``. A rule of ours counts for nothing, else it would seem not needed."""
    chains: dict[Chain, list[list[Expression]]] = {}
    ours: dict[Opening, list[int]] = {}
    for item in listing:
        if chain := item.get("chain"):
            chains.setdefault(Chain(chain["family"], chain["table"], chain["name"]), [])
        elif rule := item.get("rule"):
            where = Chain(rule["family"], rule["table"], rule["chain"])
            expressions = rule.get("expr", [])
            if rule.get("comment") == MARK and (own := _opening(where, expressions)):
                ours.setdefault(own, []).append(rule["handle"])
            else:
                chains.setdefault(where, []).append(expressions)
    words = frozenset(_words([rule for rules in chains.values() for rule in rules]))
    return Ruleset(chains, dict(_bases(listing)), ours, words)


def _words(item: object) -> Iterator[str]:
    if isinstance(item, str):
        yield item
    elif isinstance(item, dict | list):
        for inner in item.values() if isinstance(item, dict) else item:
            yield from _words(inner)


def _opening(chain: Chain, expressions: Sequence[Expression]) -> Opening | None:
    for expression in expressions:
        match expression:
            case {"match": {"left": {"meta": {"key": "iifname" | "oifname" as key}}, "right": str(tap)}}:
                return Opening(chain, key, tap)
    return None


def barriers(rules: Ruleset, passage: Passage) -> list[Barrier]:
    """All base chains that drop, in either direction and any of the IP versions."""
    alike = rules.like(passage)
    if alike not in rules.found:
        rules.found[alike] = _find(rules, alike)
    return rules.found[alike]


def _find(rules: Ruleset, passage: Passage) -> list[Barrier]:
    found: dict[Chain, Barrier] = {}
    for base, policy in rules.bases.items():
        for version in set(FAMILIES[base.family]) & set(passage.versions):
            for ends in ((passage.uplink, passage.tap), (passage.tap, passage.uplink)):
                visited: list[Chain] = []
                verdict = _walk(rules, base, _Packet(version, *ends), visited)
                if verdict == "drop" or (verdict != "accept" and policy == "drop"):
                    place = next((chain for chain in visited if chain.name in PLACES), base)
                    found[base] = Barrier(base, place, _owner(base, place, visited))
    return list(found.values())


def _owner(base: Chain, place: Chain, visited: Iterable[Chain]) -> str:
    if base.table == "firewalld":
        return "firewalld"
    if owner := PLACES.get(place.name):
        return owner
    return next((name for chain in visited for word, name in _SIGNS if chain.name.startswith(word)), "")


_SIGNS = (("DOCKER", "Docker"), ("ufw", "ufw"))


def _walk(rules: Ruleset, chain: Chain, packet: _Packet, visited: list[Chain]) -> Verdict:
    """What becomes of the packet in this chain; ``visited`` gets all that it comes through, in order."""
    visited.append(chain)
    for expressions in rules.chains.get(chain, ()):
        for expression in expressions:
            verdict, applies = _step(rules, chain, expression, packet, visited)
            if verdict == "return":
                return None
            if verdict:
                return verdict
            if not applies:
                break
    return None


def _step(
    rules: Ruleset, chain: Chain, expression: Expression, packet: _Packet, visited: list[Chain]
) -> tuple[Verdict, bool]:
    """What one expression of a rule decides, and whether the rule goes on to its next."""
    match expression:
        case {"accept": _} | {"queue": _}:
            return "accept", True
        case {"drop": _} | {"reject": _} | {"xt": {"type": "target", "name": "REJECT" | "DROP"}}:
            return "drop", True
        case {"return": _}:
            return "return", True
        case {"jump": {"target": target}}:
            return _walk(rules, chain._replace(name=target), packet, visited), True
        case {"goto": {"target": target}}:
            return _walk(rules, chain._replace(name=target), packet, visited) or "return", True
        case {"vmap": {"key": key, "data": {"set": items}}}:
            value = _value(key, packet)
            for pattern, verdict in (item for item in items if isinstance(item, list)):
                if value is not UNKNOWN and _equals(value, pattern):
                    return _step(rules, chain, verdict, packet, visited)
            return None, True
        case {"match": {"op": op, "left": left, "right": right}}:
            value, named_set = _value(left, packet), isinstance(right, str) and right.startswith("@")
            if value is UNKNOWN or named_set or op not in ("==", "!=", "in"):
                return None, False
            return None, _equals(value, right) == (op != "!=")
        case {"xt": {"type": "match", "name": name}}:
            return None, name == "comment"
        case {"xt": {"type": "target"}}:
            return None, True
    return None, not PASSIVE.isdisjoint(expression)


def _value(left: object, packet: _Packet) -> object:
    """What the packet has where a rule looks, or UNKNOWN."""
    match left:
        case {"meta": {"key": "iifname" | "iif"}}:
            return packet.iifname
        case {"meta": {"key": "oifname" | "oif"}}:
            return packet.oifname
        case {"meta": {"key": "nfproto"}}:
            return f"ipv{packet.version}"
        case {"meta": {"key": "protocol"}}:
            return "ip" if packet.version == 4 else "ip6"
        case {"ct": {"key": "state"}}:
            return "new"
    return UNKNOWN


def _equals(value: object, pattern: object) -> bool:
    match pattern:
        case {"set": [*items]} | [*items]:
            return any(_equals(value, item) for item in items)
        case str():
            return value == pattern or (pattern.endswith("*") and fnmatchcase(str(value), pattern))
    return False


# --- what is to be done -----------------------------------------------------------------------------------------------


def changes(rules: Ruleset, wanted: Iterable[Opening]) -> str:
    """Commands for nft(8) that make ``ours`` what is wanted; plain matches, which iptables can show and delete too."""
    lines = []
    missing = set(wanted)
    for opening, handles in rules.ours.items():
        surplus = handles[1:] if opening in missing else handles
        missing.discard(opening)
        lines += [f"delete rule {_where(opening.chain)} handle {handle}\n" for handle in surplus]
    for opening in sorted(missing, key=lambda opening: (opening.chain, opening.tap, opening.key)):
        condition = f'{opening.key} "{opening.tap}" counter accept comment "{MARK}"'
        lines.append(f"insert rule {_where(opening.chain)} {condition}\n")
    return "".join(lines)


def _where(chain: Chain) -> str:
    return " ".join(chain)


def openings(found: Iterable[Barrier], tap: str) -> set[Opening]:
    """The rules that let a guest through; firewalld takes none in its table, and is asked otherwise."""
    places = {barrier.place for barrier in found if barrier.owner != "firewalld"}
    return {Opening(place, key, tap) for place in places for key in ("iifname", "oifname")}


def sentence(found: Sequence[Barrier], tap: str, allowed: bool, trouble: str) -> str:
    """What a person is told: who drops, and what to do. ``trouble``: why it could not be opened, or ""."""
    owners = sorted({barrier.owner for barrier in found if barrier.owner})
    by = f" ({' and '.join(owners)})" if owners else ""
    names = " and ".join(sorted({str(barrier.base) for barrier in found}))
    what = f"{tap} is probably cut off from the LAN: {names}{by} drops what is forwarded"
    if trouble:
        return f"{what}, and could not be opened: {trouble}"
    if allowed:
        return what
    return f"{what} (set open = true under [firewall] in /etc/kvmd/kvmd.conf, or accept {tap} there yourself)"
