"""Whom a node knows, and what liars may make of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache_sglang.storage.peers.membership import (
    HEARSAY_SECONDS,
    SKIPPED_MOST,
    TRIED_SECONDS,
    Known,
    Membership,
    is_address,
    records,
)
from lmcache_sglang.storage.peers.messages import NODES_MOST, NodeRecord

OWN = "tcp://here:1"


def key_of(letter: str) -> str:
    return letter * 40


OURS, LIAR, HONEST, STRANGER = (key_of(letter) for letter in "olhs")
ALLOWED = frozenset({OURS, LIAR, HONEST})


@pytest.fixture
def plain() -> Membership:
    return Membership([OWN], "", frozenset(), 4)


@pytest.fixture
def encrypted() -> Membership:
    return Membership([OWN], OURS, ALLOWED, 4)


def addresses(membership: Membership) -> list[str]:
    return [each.address for each in membership]


def test_the_file_and_hearsay_are_linked_to(plain: Membership) -> None:
    plain.configure([Known("tcp://a:1"), Known(OWN)], frozenset(), 4)
    plain.told("b", "tcp://b:1", "", 0.0)
    assert addresses(plain) == ["tcp://a:1", "tcp://b:1"]


def test_nobody_links_to_itself_or_to_nowhere(plain: Membership) -> None:
    plain.told("me", OWN, "", 0.0)
    plain.told("hidden", "", "", 0.0)
    assert addresses(plain) == []


def test_only_allowed_keys_are_linked_to(encrypted: Membership) -> None:
    encrypted.told("s", "tcp://s:1", STRANGER, 0.0)
    encrypted.told("p", "tcp://p:1", "", 0.0)
    encrypted.told("h", "tcp://h:1", HONEST, 0.0)
    assert addresses(encrypted) == ["tcp://h:1"]
    assert encrypted.turned_away == 2


def test_without_encryption_a_key_leads_nowhere(plain: Membership) -> None:
    plain.told("h", "tcp://h:1", HONEST, 0.0)
    assert addresses(plain) == []


def test_a_key_that_is_no_longer_allowed_is_forgotten(encrypted: Membership) -> None:
    encrypted.told("h", "tcp://h:1", HONEST, 0.0)
    encrypted.configure([], frozenset({OURS}), 4)
    assert addresses(encrypted) == []
    assert not encrypted.allows(HONEST)


@pytest.mark.parametrize(
    "address",
    ["tcp://a:1", "tcp://10.0.0.1:65535", "tcp://[fe80::1]:7700", "tcp://peer-0.peers.svc:7700"],
)
def test_addresses(address: str) -> None:
    assert is_address(address)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "a:1",
        "tcp://a",
        "tcp://a:0",
        "tcp://a:65536",
        "tcp://a:*",
        "tcp://*:1",
        "tcp://a:1\n",
        "tcp://a\n:1",
        "tcp://a;b:1",
        "ipc:///etc/passwd",
        "inproc://x",
        "tcp://a:99999999999999999999",
        "tcp://a:\u0661",
    ],
)
def test_no_addresses(plain: Membership, address: str) -> None:
    assert not is_address(address)
    plain.told("x", address, "", 0.0)
    assert addresses(plain) == []


@given(st.text(max_size=80))
def test_any_text_is_an_address_or_not(address: str) -> None:
    assert not is_address(address) or address.startswith("tcp://")


def test_hearsay_that_nobody_confirms_is_forgotten(plain: Membership) -> None:
    plain.told("b", "tcp://b:1", "", 0.0)
    plain.told("c", "tcp://c:1", "", 0.0)
    plain.seen("tcp://c:1", HEARSAY_SECONDS)
    plain.told("b", "tcp://b:1", "", HEARSAY_SECONDS)  # to be told of it again confirms nothing
    plain.expire(HEARSAY_SECONDS + 1)
    assert addresses(plain) == ["tcp://c:1"]


def test_what_the_file_says_is_never_forgotten(plain: Membership) -> None:
    plain.configure([Known("tcp://a:1")], frozenset(), 4)
    plain.expire(1e9)
    assert addresses(plain) == ["tcp://a:1"]


def test_a_liar_cannot_change_the_key_of_who_is_reached(encrypted: Membership) -> None:
    encrypted.told("h", "tcp://h:1", HONEST, 0.0)
    encrypted.seen("tcp://h:1", 1000.0)
    encrypted.told("h", "tcp://h:1", LIAR, 1001.0)
    assert [each.key for each in encrypted] == [HONEST]


def test_a_lie_about_an_address_yields_to_its_owner_in_time(encrypted: Membership) -> None:
    encrypted.told("h", "tcp://h:1", LIAR, 0.0)
    encrypted.told("h", "tcp://h:1", HONEST, 1.0)
    assert [each.key for each in encrypted] == [LIAR]
    encrypted.told("h", "tcp://h:1", HONEST, TRIED_SECONDS + 1)
    assert [each.key for each in encrypted] == [HONEST]


def test_many_fake_nodes_leave_room_for_others(encrypted: Membership) -> None:
    for port in range(1, 1000):
        encrypted.told("fake", f"tcp://fake:{port}", LIAR, 0.0)
    assert len(encrypted) == 4
    encrypted.told("h", "tcp://h:1", HONEST, 1.0)
    encrypted.told("fake", "tcp://fake:5", LIAR, 2.0)
    assert "tcp://h:1" in addresses(encrypted)
    assert len(encrypted) == 4


def test_who_is_reached_keeps_its_place(encrypted: Membership) -> None:
    for port in range(1, 5):
        encrypted.told("h", f"tcp://h:{port}", HONEST, 0.0)
        encrypted.seen(f"tcp://h:{port}", 1.0)
    encrypted.told("l", "tcp://l:1", LIAR, 2.0)
    assert "tcp://l:1" not in addresses(encrypted)


def test_without_encryption_the_longest_away_goes_first(plain: Membership) -> None:
    for port in range(1, 5):
        plain.told("b", f"tcp://b:{port}", "", 0.0)
    plain.seen("tcp://b:1", TRIED_SECONDS)
    plain.told("c", "tcp://c:1", "", TRIED_SECONDS)
    assert "tcp://c:1" not in addresses(plain)
    plain.told("c", "tcp://c:1", "", TRIED_SECONDS + 1)
    assert addresses(plain) == ["tcp://b:1", "tcp://b:3", "tcp://b:4", "tcp://c:1"]


def test_another_name_of_a_known_node_is_passed_for_a_while(plain: Membership) -> None:
    plain.configure([Known("tcp://seed:1")], frozenset(), 4)
    plain.told("b", "tcp://b:1", "", 0.0)
    for address in ("tcp://seed:1", "tcp://b:1"):
        plain.skip(address, 0.0)
    plain.told("b", "tcp://b:1", "", 1.0)
    assert addresses(plain) == []
    plain.expire(HEARSAY_SECONDS + 1)
    assert addresses(plain) == ["tcp://seed:1"]


def test_what_is_passed_is_bounded(plain: Membership) -> None:
    for port in range(1, 1000):
        plain.skip(f"tcp://b:{port}", float(port))
    assert len(plain._skipped) == SKIPPED_MOST
    assert "tcp://b:999" in plain._skipped


def test_no_more_than_wanted_are_linked_to(plain: Membership) -> None:
    plain.configure([Known(f"tcp://a:{port}") for port in range(1, 10)], frozenset(), 4)
    plain.told("b", "tcp://b:1", "", 0.0)
    assert addresses(plain) == [f"tcp://a:{port}" for port in range(1, 5)]


def test_others_are_told_of_who_has_a_name() -> None:
    known = [Known("tcp://a:1", node="a"), Known("tcp://b:1")]
    assert records(known, NodeRecord("me", OWN, "")) == [
        NodeRecord("me", OWN, ""),
        NodeRecord("a", "tcp://a:1", ""),
    ]
    assert records([], NodeRecord("me", "", "")) == []
    many = [Known(f"tcp://a:{port}", node="a") for port in range(100)]
    assert len(records(many, NodeRecord("me", OWN, ""))) == NODES_MOST
