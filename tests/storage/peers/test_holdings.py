"""What a node says that it holds: the pages of its tiers, no others, and what changed since the last look."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pytest

from lmcache_sglang.errors import Reason, TierError
from lmcache_sglang.storage.peers import tags as sets
from lmcache_sglang.storage.peers.holdings import NOTHING, Change, Holdings
from lmcache_sglang.storage.slab.tier import SlabTier
from lmcache_sglang.testing import hammer
from lmcache_sglang.testing.small_store import OWN_NAMESPACE, SmallStore, key_of, put
from lmcache_sglang.testing.store_process import run
from lmcache_sglang.testing.tier_suite import (
    OTHER_NAMESPACE,
    EngineMemory,
    a_key,
    bytes_of,
    some_keys,
)

ROOMY = 4 << 20


@pytest.fixture
def store(shared_memory: Path) -> SmallStore:
    return SmallStore(shared_memory / "store", True, ROOMY)


@pytest.fixture
def tier(store: SmallStore) -> Iterator[SlabTier]:
    with store.opened() as opened:
        yield opened


def set_of(keys: Iterable[bytes]) -> bytes:
    return sets.sort(sets.tags_of(keys))


def put_keys(tier: SlabTier, keys: Sequence[bytes], parents: Sequence[bytes] | None = None) -> None:
    memory = EngineMemory([bytes_of(key, 100) for key in keys])
    stored = tier.put(keys, memory.segments, None, parents)
    assert all(each.kept for each in stored)


def test_sets_of_tags_are_sorted_and_have_each_once() -> None:
    rng = random.Random(1)
    numbers = [rng.randrange(2**64) for _ in range(1000)]
    shuffled = b"".join(number.to_bytes(8, "little") for number in [*numbers, *numbers[::3]])
    whole = b"".join(number.to_bytes(8, "little") for number in sorted(numbers))
    assert sets.sort(shuffled) == whole
    assert sets.count(whole) == 1000
    some, rest = whole[:4000], whole[3200:]
    assert sets.merge(some, rest) == whole
    assert sets.without(whole, some) == whole[4000:]
    assert sets.without(some, whole) == b""
    assert sets.merge(b"", b"") == sets.sort(b"") == b""
    with pytest.raises(ValueError, match="8 bytes"):
        sets.sort(b"seven b")


def test_a_look_finds_what_came_and_what_went(tier: SlabTier) -> None:
    holdings = Holdings([tier])
    assert holdings.look() == NOTHING
    put(tier, range(40), [b""] * 40)
    keys = [key_of(number) for number in range(60)]
    assert holdings.look() == Change(set_of(keys[:40]), b"")
    assert holdings.tags == set_of(keys[:40])
    assert holdings.seconds > 0
    tier.remove(keys[:10])
    put(tier, range(40, 60), [b""] * 20)
    assert holdings.look() == Change(set_of(keys[40:]), set_of(keys[:10]))
    assert holdings.look() == NOTHING
    tier.clear(OTHER_NAMESPACE)
    gone = [key for key in keys[10:] if key.startswith(OTHER_NAMESPACE)]
    assert holdings.look() == Change(b"", set_of(gone))
    assert sets.count(holdings.tags) == tier.stats().pages


def test_a_look_where_nothing_changed_walks_nothing(tier: SlabTier) -> None:
    holdings = Holdings([tier])
    put(tier, range(40), [b""] * 40)
    holdings.look()
    holdings.seconds = -1.0
    assert not holdings.look()
    tier.exists([key_of(0)])
    assert not holdings.look()
    assert holdings.seconds == -1.0, "it walked"


def test_pages_of_other_processes_are_found(store: SmallStore, tier: SlabTier) -> None:
    holdings = Holdings([tier])
    holdings.look()
    run(hammer.put_all, store, list(range(20)))
    assert holdings.look().added == set_of(key_of(number) for number in range(20))


def test_evicted_pages_are_said_to_be_gone(tier: SlabTier) -> None:
    holdings = Holdings([tier])
    told = b""
    for first in range(0, 1000, 50):
        put(tier, range(first, first + 50), [b""] * 50)
        change = holdings.look()
        told = sets.merge(sets.without(told, change.removed), change.added)
        assert told == holdings.tags
    assert tier.stats().evicted > 0
    keys = [key_of(number) for number in range(1000)]
    here = [key for key, found in zip(keys, tier.exists(keys), strict=True) if found]
    assert holdings.tags == set_of(here)


def test_two_tiers_are_told_as_one(tier: SlabTier, tmp_path: Path) -> None:
    with SmallStore(tmp_path / "disk", False, ROOMY).opened() as lower:
        holdings = Holdings([tier, lower])
        put(tier, range(10), [b""] * 10)
        put(lower, range(5, 20), [b""] * 15)
        keys = [key_of(number) for number in range(20)]
        assert holdings.look().added == set_of(keys)
        tier.remove(keys)
        assert holdings.look() == Change(b"", set_of(keys[:5]))
        lower.remove(keys[:8])
        assert holdings.look() == Change(b"", set_of(keys[5:8]))


@pytest.mark.parametrize("minimum", [0, 2])
def test_namespaces_are_told_apart(tier: SlabTier, minimum: int) -> None:
    spaces = [OWN_NAMESPACE, OTHER_NAMESPACE, b"\1" * 15 + b"\2", b"\xff" * 16, b"\0" * 15 + b"\1"]
    keys = {space: [a_key(number, space) for number in range(20)] for space in spaces}
    for its in keys.values():
        put_keys(tier, its)
    for space in spaces:
        assert Holdings([tier], [space], minimum).look().added == set_of(keys[space])
    two = Holdings([tier], [spaces[3], spaces[0], spaces[3]], minimum)
    assert two.look().added == set_of(keys[spaces[3]] + keys[spaces[0]])
    everything = Holdings([tier], None, minimum).look().added
    assert everything == set_of(key for its in keys.values() for key in its)
    assert Holdings([tier], [], minimum).look() == NOTHING
    assert Holdings([tier], [b"\x07" * 16], minimum).look() == NOTHING
    with pytest.raises(ValueError, match="16 bytes"):
        Holdings([tier], [b"short"]).look()


def test_only_pages_of_chains_that_are_long_enough_are_told(tier: SlabTier) -> None:
    """A trunk of 3 pages with branches of 2 and 5, and a chain of 4 whose begin is not here."""
    keys = some_keys(30)
    trunk, short, long, headless, alone = keys[:3], keys[3:5], keys[5:10], keys[10:14], keys[20:22]
    put_keys(tier, trunk)
    put_keys(tier, short, [trunk[-1], short[0]])
    put_keys(tier, long, [trunk[-1], *long[:-1]])
    put_keys(tier, headless, [keys[29], *headless[:-1]])
    put_keys(tier, alone, [b"", b""])
    told = {
        1: trunk + short + long + headless + alone,
        2: trunk + short + long + headless,
        4: trunk + short + long + headless,
        5: trunk + short + long,
        6: trunk + long,
        8: trunk + long,
        9: [],
    }
    for minimum, wanted in told.items():
        assert Holdings([tier], None, minimum).look().added == set_of(wanted), minimum


def test_a_chain_is_of_one_namespace(tier: SlabTier) -> None:
    """Though pages of two have equal hashes, and each names the other's as its parent."""
    mine, other = (
        [a_key(number, space) for number in (1, 2)] for space in (OWN_NAMESPACE, OTHER_NAMESPACE)
    )
    put_keys(tier, mine[:1])
    put_keys(tier, other[1:], [other[0]])
    assert Holdings([tier], None, 2).look() == NOTHING
    put_keys(tier, mine[1:], [mine[0]])
    assert Holdings([tier], None, 2).look().added == set_of(mine)


def test_pages_whose_parents_go_round_in_a_circle_end_nothing(tier: SlabTier) -> None:
    keys = some_keys(6)
    put_keys(tier, keys[:3], [keys[2], keys[0], keys[1]])
    put_keys(tier, keys[3:5])
    put_keys(tier, keys[5:], [keys[5]])
    assert Holdings([tier], None, 2).look().added == set_of(keys[3:5])
    assert Holdings([tier], None, 1).look().added == set_of(keys)


def test_a_long_chain_is_walked_in_pieces(shared_memory: Path) -> None:
    """In any order of its hashes, and with more pages than one snapshot is kept for."""
    with SmallStore(shared_memory / "large", True, 96 << 20).opened() as tier:
        keys, parent = some_keys(5000), b""
        for first in range(0, len(keys), 500):
            some = keys[first : first + 500]
            put_keys(tier, some, [parent, *some[:-1]])
            parent = some[-1]
        assert Holdings([tier], None, 5000).look().added == set_of(keys)
        assert Holdings([tier], None, 5001).look() == NOTHING
        tier.remove(keys[2000:2001])
        assert Holdings([tier], None, 2500).look().added == set_of(keys[2001:])


def test_pages_that_a_writer_tells_of_are_there_at_once(tier: SlabTier) -> None:
    holdings = Holdings([tier])
    keys = [key_of(number) for number in range(20)]
    put(tier, range(10), [b""] * 10)
    assert holdings.told(keys) == holdings.tags == set_of(keys[:10]), "of the others it is not so"
    assert holdings.told(keys) == b""
    assert holdings.look() == NOTHING, "they were told"
    tier.remove(keys[:3])
    assert holdings.look().removed == set_of(keys[:3])
    assert holdings.told([]) == b""


def test_a_writer_tells_of_what_is_to_be_told_only(tier: SlabTier) -> None:
    keys = [*some_keys(10), a_key(1, OTHER_NAMESPACE)]
    put_keys(tier, keys)
    assert Holdings([tier], [OTHER_NAMESPACE]).told(keys) == set_of(keys[10:])
    assert Holdings([tier], None, 5).told(keys[:4]) == b""
    assert Holdings([tier], None, 5).told(keys[4:8], position=4) == set_of(keys[4:8])


def test_a_tier_that_cannot_be_asked_changes_nothing(store: SmallStore) -> None:
    with store.opened() as tier:
        put(tier, range(10), [b""] * 10)
        holdings = Holdings([tier])
        holdings.look()
    before = holdings.tags
    for ask in (holdings.look, lambda: holdings.told([key_of(11)])):
        with pytest.raises(TierError) as caught:
            ask()
        assert caught.value.reason is Reason.CLOSED
    assert holdings.tags == before != b""
