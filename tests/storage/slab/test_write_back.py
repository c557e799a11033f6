"""Write-back, when the tier below does not take pages, and when they are forgotten on their way there."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from threading import Event, Thread, get_ident

import pytest

from lmcache_sglang.errors import TierError
from lmcache_sglang.storage.base import NAMESPACE_BYTES, Below, Limits, Lookup, Stored
from lmcache_sglang.storage.slab.opening import Place
from lmcache_sglang.storage.slab.tier import SlabTier
from lmcache_sglang.testing.injection import injected
from lmcache_sglang.testing.tier_suite import EngineMemory, a_key, bytes_of, read

SMALL = 1 << 20
SOON = 30.0
OWN = b"\0" * NAMESPACE_BYTES


@pytest.fixture
def upper(shared_memory: Path) -> Iterator[SlabTier]:
    with closing(
        SlabTier(Place(shared_memory / "upper", True), SMALL, below=Below.ON_EVICT)
    ) as tier:
        yield tier
        assert tier.check().ok


@pytest.fixture
def lower(shared_memory: Path) -> Iterator[SlabTier]:
    with closing(SlabTier(Place(shared_memory / "lower", True), SMALL)) as tier:
        yield tier
        assert tier.check().ok


def put(tier: SlabTier, numbers: range, size: int, below: Below | None = None) -> list[Stored]:
    """Pages that have nothing to do with each other."""
    keys = [a_key(number) for number in numbers]
    memory = EngineMemory([bytes_of(key, size) for key in keys])
    alone = [b""] * len(keys)
    return tier.put(keys, memory.segments, None, alone, Limits.within(SOON), below)


def spill(upper: SlabTier, lower: SlabTier) -> dict[str, int]:
    with upper.native() as above, lower.native() as below:
        return above.spill(below, 1 << 30, SOON)


@pytest.mark.parametrize("size", [4096, 12_288])  # pages bound the store, or slots
def test_a_tier_below_that_is_stuck_costs_pages_there_and_no_new_ones_here(
    upper: SlabTier, size: int
) -> None:
    """Nobody writes below. The first to find no room waits for it, once."""
    for start in range(0, 600, 20):
        assert put(upper, range(start, start + 20), size) == [Stored.STORED] * 20
    assert upper.counts()["lost"] > 0


def test_within_a_quota_too(upper: SlabTier) -> None:
    upper.set_quota(OWN, 40 * 4096)
    for start in range(0, 200, 20):
        assert put(upper, range(start, start + 20), 4096) == [Stored.STORED] * 20
    assert upper.counts()["lost"] > 0
    assert upper.stats().bytes <= 40 * 4096


def test_what_the_tier_below_refuses_makes_room_here(upper: SlabTier, lower: SlabTier) -> None:
    """It is full of pages that must stay, and would refuse again however often it were asked."""
    taken = range(10_000, 10_000 + 600)
    put(lower, taken, 4096)
    lower.pin([a_key(number) for number in taken], 600)
    stop = Event()

    def keep_spilling() -> None:
        while not stop.is_set():
            spill(upper, lower)
            with upper.native() as store:
                store.wait_for_work(store.work_seen(), 0.05)

    keeper = Thread(target=keep_spilling)
    keeper.start()
    try:
        for start in range(0, 600, 20):
            assert put(upper, range(start, start + 20), 4096) == [Stored.STORED] * 20
    finally:
        stop.set()
        keeper.join()
    counts = upper.counts()
    assert counts["lost"] > 0
    assert lower.exists([a_key(number) for number in range(600)]) == [False] * 600


@pytest.mark.parametrize("made_anew", [False, True])
def test_a_page_forgotten_while_it_is_written_below_is_forgotten_there(
    upper: SlabTier, lower: SlabTier, made_anew: bool
) -> None:
    """Also when a change failed meanwhile, and who held what was worked out anew."""
    put(upper, range(1), 4096, Below.NOW)
    here, go = Event(), Event()

    def hook(name: str, offset: int, size: int) -> int:
        if name == "publish" and get_ident() == keeper.ident:
            here.set()
            go.wait(SOON)
        return (
            errno.EIO if name == "index_commit" and failing and get_ident() != keeper.ident else 0
        )

    failing = False
    keeper = Thread(target=spill, args=(upper, lower))
    with injected(hook):
        keeper.start()
        assert here.wait(SOON)
        assert upper.clear(OWN) == 1
        failing = made_anew
        if made_anew:
            with pytest.raises(TierError):
                put(upper, range(5, 6), 4096)
        failing = False
        assert put(upper, range(6, 7), 4096) == [Stored.STORED]
        go.set()
        keeper.join()
    assert lower.exists([a_key(0)]) == [False]
    assert read(upper, [a_key(6)], 4096) == [Lookup.HIT]
