"""Others' rules, as libnftables prints them, and what they do to the first packet of a connection."""

from __future__ import annotations

from typing import Any

import pytest

from kvmd.network.firewalls.barriers import (
    Barrier,
    Chain,
    Opening,
    Passage,
    barriers,
    changes,
    openings,
    parse,
    sentence,
    tables,
)

BASE = Chain("inet", "filter", "forward")
PASSAGE = Passage("kv-web", "eth0", (4, 6))
ACCEPT, DROP, RETURN, COUNTER = {"accept": None}, {"drop": None}, {"return": None}, {"counter": {"packets": 0}}
NEW, IIFNAME = {"ct": {"key": "state"}}, {"meta": {"key": "iifname"}}


def meta(key: str, right: object, op: str = "==") -> dict[str, Any]:
    return {"match": {"op": op, "left": {"meta": {"key": key}}, "right": right}}


def jump(target: str, verb: str = "jump") -> dict[str, Any]:
    return {verb: {"target": target}}


def chain(name: str, family: str = "inet", table: str = "filter", **more: Any) -> dict[str, Any]:
    return {"chain": {"family": family, "table": table, "name": name, **more}}


def rule(where: str, *expressions: dict[str, Any], handle: int = 1, **more: Any) -> dict[str, Any]:
    fields = {"family": "inet", "table": "filter", "chain": where, "handle": handle, "expr": list(expressions), **more}
    return {"rule": fields}


def listing(*rules: dict[str, Any], policy: str = "accept") -> list[dict[str, Any]]:
    base = chain("forward", type="filter", hook="forward", prio=0, policy=policy)
    return [{"metainfo": {}}, {"table": {"family": "inet", "name": "filter"}}, base, chain("sub"), *rules]


def dropped(*rules: dict[str, Any], policy: str = "accept") -> bool:
    return bool(barriers(parse(listing(*rules, policy=policy)), PASSAGE))


@pytest.mark.parametrize(
    "rules",
    [
        [],
        [rule("forward", COUNTER, ACCEPT), rule("forward", DROP)],
        [rule("forward", meta("iifname", "docker0"), DROP)],
        [rule("forward", meta("iifname", {"set": ["a", "b"]}), DROP)],
        [rule("forward", meta("oifname", "@vpn"), DROP)],
        [rule("forward", meta("iifname", ["eth0", "kv-web"], "!="), DROP)],
        [rule("forward", {"match": {"op": "in", "left": NEW, "right": ["established", "related"]}}, DROP)],
        [rule("forward", {"match": {"op": "==", "left": {"payload": {"field": "daddr"}}, "right": "192.0.2.1"}}, DROP)],
        [rule("forward", {"limit": {"rate": 1}}, DROP)],
        [rule("forward", {"xt": {"type": "match", "name": "conntrack"}}, DROP)],
        [rule("forward", jump("sub")), rule("sub", RETURN), rule("sub", DROP)],
        [rule("forward", jump("sub", "goto")), rule("forward", DROP)],
        [rule("forward", {"vmap": {"key": NEW, "data": {"set": [["established", ACCEPT], ["invalid", DROP]]}}})],
        [rule("forward", {"vmap": {"key": NEW, "data": {"set": [["new", ACCEPT]]}}}), rule("forward", DROP)],
        [rule("forward", jump("nowhere"))],
    ],
)
def test_passes(rules: list[dict[str, Any]]) -> None:
    assert not dropped(*rules)


@pytest.mark.parametrize(
    "rules",
    [
        [rule("forward", COUNTER, DROP)],
        [rule("forward", {"log": {}}, {"reject": {"type": "icmpx"}})],
        [rule("forward", {"xt": {"type": "match", "name": "comment"}}, {"xt": {"type": "target", "name": "REJECT"}})],
        [rule("forward", meta("iifname", "kv-*"), ACCEPT), rule("forward", DROP)],
        [rule("forward", meta("iif", "eth0"), meta("oif", "kv-web"), DROP)],
        [rule("forward", meta("nfproto", "ipv6"), DROP)],
        [rule("forward", meta("protocol", "ip"), DROP)],
        [rule("forward", meta("oifname", "docker0", "!="), DROP)],
        [rule("forward", jump("sub")), rule("sub", DROP)],
        [rule("forward", {"vmap": {"key": IIFNAME, "data": {"set": [["eth0", jump("sub")]]}}}), rule("sub", DROP)],
    ],
)
def test_is_dropped(rules: list[dict[str, Any]]) -> None:
    assert dropped(*rules)


def test_policy() -> None:
    assert dropped(policy="drop")
    both = [rule("forward", meta(key, "kv-*"), ACCEPT) for key in ("iifname", "oifname")]
    assert not dropped(*both, policy="drop")
    assert dropped(both[0], policy="drop")


def test_only_forward_chains_of_ip_and_of_others() -> None:
    found = [
        chain("a", "ip", hook="forward", policy="drop"),
        chain("b", "ip6", hook="input", policy="drop"),
        chain("c", "bridge", hook="forward", policy="drop"),
        chain("d", "inet", "kvmd", hook="forward", policy="drop"),
        chain("e", "ip", "docker"),
    ]
    assert tables(found) == ["ip filter"]
    assert [barrier.base.name for barrier in barriers(parse(found), PASSAGE)] == ["a"]
    assert barriers(parse(found), Passage("kv-web", "eth0", (6,))) == []


def test_the_place_is_one_the_packet_comes_to() -> None:
    docker = [chain("DOCKER-USER"), rule("DOCKER-USER", RETURN)]
    (barrier,) = barriers(parse(listing(*docker, policy="drop")), PASSAGE)
    assert barrier == Barrier(BASE, BASE, "")
    (barrier,) = barriers(parse(listing(*docker, rule("forward", jump("DOCKER-USER")), policy="drop")), PASSAGE)
    assert barrier == Barrier(BASE, BASE._replace(name="DOCKER-USER"), "Docker")


def test_our_rules() -> None:
    """What is there stays, what is missing is added, what is over or there twice goes; and none hides the barrier."""
    iifname, oifname = (Opening(BASE, key, "kv-web") for key in ("iifname", "oifname"))
    rules = parse(
        listing(
            rule("forward", meta("iifname", "kv-web"), COUNTER, ACCEPT, handle=7, comment="kvmd"),
            rule("forward", meta("iifname", "kv-web"), COUNTER, ACCEPT, handle=8, comment="kvmd"),
            rule("forward", meta("oifname", "kv-old"), COUNTER, ACCEPT, handle=9, comment="kvmd"),
            policy="drop",
        )
    )
    found = barriers(rules, PASSAGE)
    assert openings(found, "kv-web") == {iifname, oifname}
    assert changes(rules, openings(found, "kv-web")).splitlines() == [
        "delete rule inet filter forward handle 8",
        "delete rule inet filter forward handle 9",
        'insert rule inet filter forward oifname "kv-web" counter accept comment "kvmd"',
    ]
    assert changes(rules, [iifname, Opening(BASE, "oifname", "kv-old")]) == "delete rule inet filter forward handle 8\n"


def test_firewalld_takes_no_rules_in_its_table() -> None:
    found = barriers(parse([chain("filter_FORWARD", "inet", "firewalld", hook="forward", policy="drop")]), PASSAGE)
    assert openings(found, "kv-web") == set()
    assert sentence(found, "kv-web", False, "") == (
        "kv-web is probably cut off from the LAN: chain filter_FORWARD of table inet firewalld (firewalld) drops"
        " what is forwarded (set open = true under [firewall] in /etc/kvmd/kvmd.conf, or accept kv-web there yourself)"
    )
