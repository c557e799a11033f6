"""A namespace with a quota gives up its own pages for its new ones, those used least first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from lmcache_sglang.storage.base import NAMESPACE_BYTES, Below, Limits, Lookup, Stored
from lmcache_sglang.storage.slab.opening import Place
from lmcache_sglang.storage.slab.settings import SlabSettings
from lmcache_sglang.storage.slab.tier import SlabTier
from lmcache_sglang.testing.tier_suite import ROOMY, EngineMemory, a_key, bytes_of, read, write

PAGE = 4096
QUOTA = 10  # pages
LIMITED = b"limited".ljust(NAMESPACE_BYTES, b"-")
OTHER = b"other".ljust(NAMESPACE_BYTES, b"-")


@pytest.fixture
def tier(shared_memory: Path) -> Iterator[SlabTier]:
    with closing(SlabTier(Place(shared_memory, memory=True), ROOMY)) as opened:
        opened.set_quota(LIMITED, QUOTA * PAGE)
        yield opened
        assert opened.check().ok


def pages(count: int, namespace: bytes = LIMITED, start: int = 0) -> list[bytes]:
    return [a_key(number, namespace) for number in range(start, start + count)]


def write_apart(tier: SlabTier, keys: list[bytes]) -> list[Stored]:
    """Pages that have nothing to do with each other."""
    memory = EngineMemory([bytes_of(key, PAGE) for key in keys])
    return tier.put(keys, memory.segments, None, [b""] * len(keys), Limits.within(0.3))


def test_pages_that_were_read_outlive_those_that_were_not(tier: SlabTier) -> None:
    old, new = pages(QUOTA), pages(7, start=100)
    others = pages(20, OTHER)
    assert write_apart(tier, old + others) == [Stored.STORED] * (QUOTA + 20)
    assert read(tier, old[:3], PAGE) == [Lookup.HIT] * 3
    assert write_apart(tier, new) == [Stored.STORED] * 7
    assert tier.exists(old) == [True] * 3 + [False] * 7
    assert tier.exists(new + others) == [True] * 27
    assert write_apart(tier, pages(4, start=200)) == [Stored.STORED] * 4  # they had their chance
    assert sum(tier.exists(old + new + pages(4, start=200))) == QUOTA


def test_a_page_larger_than_the_quota_is_refused_and_costs_nothing(tier: SlabTier) -> None:
    old = pages(QUOTA)
    assert write_apart(tier, old) == [Stored.STORED] * QUOTA
    assert write(tier, pages(1, start=50), (QUOTA + 1) * PAGE) == [Stored.REFUSED]
    assert tier.exists(old) == [True] * QUOTA


def test_a_pinned_page_stays_within_a_quota_too(tier: SlabTier) -> None:
    old = pages(QUOTA)
    assert write_apart(tier, old) == [Stored.STORED] * QUOTA
    tier.pin(old[:2], 60)
    assert write_apart(tier, pages(QUOTA, start=100)) == [Stored.STORED] * 8 + [Stored.REFUSED] * 2
    assert tier.exists(old) == [True] * 2 + [False] * 8


def test_a_batch_frees_its_room_in_few_walks(tier: SlabTier) -> None:
    """Each walk frees a sixteenth of the quota: a walk a page would be felt among a million pages."""
    tier.set_quota(LIMITED, 160 * PAGE)
    write_apart(tier, pages(160))
    before = tier.stats().evicted
    write_apart(tier, pages(1, start=1000))
    assert tier.stats().evicted - before == 11
    write_apart(tier, pages(10, start=2000))
    assert tier.stats().evicted - before == 11


def test_written_back_pages_go_below_before_they_make_room(shared_memory: Path) -> None:
    upper = SlabTier(Place(shared_memory / "upper", memory=True), ROOMY, below=Below.ON_EVICT)
    lower = SlabTier(Place(shared_memory / "lower", memory=True), ROOMY)
    with closing(upper), closing(lower):
        upper.set_quota(LIMITED, QUOTA * PAGE)
        old, new = pages(QUOTA), pages(QUOTA, start=100)
        assert write_apart(upper, old) == [Stored.STORED] * QUOTA
        assert write_apart(upper, new) == [Stored.REFUSED] * QUOTA  # nobody writes below
        assert upper.exists(old) == [True] * QUOTA
        assert upper.counts()["dirty_pages"] == QUOTA
        with upper.native() as above, lower.native() as below:
            assert above.spill(below, 1 << 20, 5.0)["pages"] == QUOTA
        assert write_apart(upper, new) == [Stored.STORED] * QUOTA
        assert read(lower, old, PAGE) == [Lookup.HIT] * QUOTA
        assert upper.check().ok


def test_a_lower_quota_holds_at_once(tier: SlabTier) -> None:
    tier.set_quota(LIMITED, 0)
    assert write(tier, pages(300), PAGE) == [Stored.STORED] * 300  # a chain
    tier.set_quota(LIMITED, 20 * PAGE)
    assert tier.exists(pages(300)) == [True] * 20 + [False] * 280


def test_a_chain_gives_up_its_end_in_one_walk(tier: SlabTier) -> None:
    tier.set_quota(LIMITED, 160 * PAGE)
    assert write(tier, pages(160), PAGE) == [Stored.STORED] * 160
    assert write_apart(tier, pages(1, start=1000)) == [Stored.STORED]
    assert tier.exists(pages(160)) == [True] * 149 + [False] * 11


def test_s3_fifo_finds_what_it_spared(shared_memory: Path) -> None:
    """A page that was used goes from the main queue to the small one, which a walk has passed by then."""
    settings = SlabSettings(eviction="s3-fifo")
    with closing(SlabTier(Place(shared_memory, memory=True), 2 << 20, settings)) as tier:
        old = pages(40)
        write_apart(tier, old)
        for _ in range(3):
            read(tier, old, PAGE)
        for start in range(0, 3000, 100):  # so that they move to the main queue
            write_apart(tier, pages(100, OTHER, start))
        left = [key for key, here in zip(old, tier.exists(old), strict=True) if here]
        assert left, "they were to outlive the others"
        tier.set_quota(LIMITED, len(left) * PAGE)
        read(tier, left, PAGE)
        for number in range(4):
            assert write_apart(tier, pages(1, start=500 + number)) == [Stored.STORED]
        assert tier.check().ok
