"""A store has room for so many namespaces; the one that was put to longest ago makes way for another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from lmcache_sglang.errors import TierError
from lmcache_sglang.storage.base import NAMESPACE_BYTES, Lookup, Stored
from lmcache_sglang.storage.slab.opening import Place
from lmcache_sglang.storage.slab.tier import SlabTier
from lmcache_sglang.testing.tier_suite import ROOMY, EngineMemory, a_key, bytes_of, read, write

MOST = 256


@pytest.fixture
def tier(shared_memory: Path) -> Iterator[SlabTier]:
    with closing(SlabTier(Place(shared_memory, memory=True), ROOMY)) as opened:
        yield opened
        assert opened.check().ok


@pytest.fixture
def small_tier(shared_memory: Path) -> Iterator[SlabTier]:
    with closing(SlabTier(Place(shared_memory, memory=True), 2 << 20)) as opened:
        yield opened
        assert opened.check().ok


def keys_in(number: int) -> list[bytes]:
    namespace = number.to_bytes(NAMESPACE_BYTES, "big")
    return [a_key(page, namespace) for page in range(2)]


def test_the_oldest_namespace_makes_way_for_a_new_one(tier: SlabTier) -> None:
    for number in range(300):
        assert write(tier, keys_in(number), 4096) == [Stored.STORED] * 2
    for number in range(300):
        kept = number >= 300 - MOST
        assert read(tier, keys_in(number), 4096) == [Lookup.HIT if kept else Lookup.MISS] * 2
    assert tier.stats().pages == 2 * MOST
    assert tier.stats().evicted == 2 * (300 - MOST)


def test_a_namespace_with_a_quota_stays_and_one_too_many_is_told(tier: SlabTier) -> None:
    for number in range(MOST):
        tier.set_quota(keys_in(number)[0][:NAMESPACE_BYTES], 1 << 20)
    with pytest.raises(TierError, match="every namespace that the store has room for has a quota"):
        tier.set_quota(keys_in(MOST)[0][:NAMESPACE_BYTES], 1 << 20)
    assert write(tier, keys_in(MOST), 4096) == [Stored.REFUSED] * 2
    tier.set_quota(keys_in(0)[0][:NAMESPACE_BYTES], 0)
    assert write(tier, keys_in(MOST), 4096) == [Stored.STORED] * 2


def test_no_quota_for_an_unknown_namespace_changes_nothing(tier: SlabTier) -> None:
    for number in range(MOST):
        write(tier, keys_in(number), 4096)
    tier.set_quota(keys_in(MOST)[0][:NAMESPACE_BYTES], 0)
    assert tier.stats().pages == 2 * MOST


def test_a_namespace_that_was_read_or_has_a_pinned_page_does_not_make_way(tier: SlabTier) -> None:
    for number in range(MOST):
        write(tier, keys_in(number), 4096)
    tier.pin(keys_in(0)[:1], 600)
    read(tier, keys_in(1), 4096)
    for number in range(MOST, MOST + 2):
        assert write(tier, keys_in(number), 4096) == [Stored.STORED] * 2
    for number, here in ((0, True), (1, True), (2, False), (3, False), (4, True)):
        assert tier.exists(keys_in(number)) == [here] * 2
    tier.pin([keys_in(number)[0] for number in range(MOST + 2)], 600)
    assert write(tier, keys_in(MOST + 2), 4096) == [Stored.REFUSED] * 2  # all must stay
    tier.pin([keys_in(number)[0] for number in range(MOST + 2)], 0)


def test_room_for_another_size_takes_descendants_of_the_same_namespace_only(
    small_tier: SlabTier,
) -> None:
    """Ranks and models give the same text the same page hash."""
    small = small_tier.head.slab_bytes // 4096  # pages of a slab
    one, two = (number.to_bytes(NAMESPACE_BYTES, "big") for number in (1, 2))
    parents = {space: [a_key(n, space) for n in range(small)] for space in (one, two)}
    children = {space: [a_key(1000 + n, space) for n in range(small)] for space in (one, two)}
    for space in (one, two):
        for keys, before in ((parents[space], None), (children[space], parents[space])):
            memory = EngineMemory([bytes_of(key, 4096) for key in keys])
            alone = [b""] * small
            assert (
                small_tier.put(keys, memory.segments, None, before or alone)
                == [Stored.STORED] * small
            )
    others = [
        a_key(5000 + n, keys_in(3)[0][:NAMESPACE_BYTES])
        for n in range((small_tier.head.slabs - 4) * small)
    ]
    memory = EngineMemory([bytes_of(key, 4096) for key in others])
    small_tier.put(others, memory.segments, None, [b""] * len(others))
    for keys in (parents[two], children[two], others):
        read(small_tier, keys, 4096)
    assert write(small_tier, [a_key(9999)], small_tier.head.slab_bytes) == [Stored.STORED]
    assert not any(small_tier.exists(children[one])) or not any(small_tier.exists(parents[one]))
    assert small_tier.exists(parents[two]) == [True] * small
    assert small_tier.exists(children[two]) == [True] * small


@pytest.mark.parametrize("length", [2, 3, 7])
def test_pages_that_name_each_other_as_parents_can_go(small_tier: SlabTier, length: int) -> None:
    """No engine does; what a caller says must not fill the store for ever."""
    for start in range(0, 1500, length):
        keys = [a_key(start + number) for number in range(length)]
        memory = EngineMemory([bytes_of(key, 4096) for key in keys])
        circle = [keys[-1], *keys[:-1]]
        assert small_tier.put(keys, memory.segments, None, circle) == [Stored.STORED] * length
    assert small_tier.stats().evicted > 0
