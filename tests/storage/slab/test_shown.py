"""Pages that are read where they lie: they stay, whole and unchanged, for as long as somebody does."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import closing
from ctypes import string_at
from pathlib import Path

import pytest

from lmcache_sglang.errors import TierError
from lmcache_sglang.kernels.pages import checksums
from lmcache_sglang.storage.base import NAMESPACE_BYTES, Below, Limits, Lookup, Stored
from lmcache_sglang.storage.slab.opening import Place
from lmcache_sglang.storage.slab.settings import Eviction, SlabSettings
from lmcache_sglang.storage.slab.tier import Shown, SlabTier
from lmcache_sglang.testing.injection import injected
from lmcache_sglang.testing.small_store import SmallStore
from lmcache_sglang.testing.store_process import Job, run
from lmcache_sglang.testing.tier_suite import EngineMemory, a_key, bytes_of, read
from lmcache_sglang.testing.waiting import wait_until

SMALL = 1 << 20
SIZE = 4096
MANY = range(1000, 1600)  # more pages than fit
SOON = 30.0
OWN = b"\0" * NAMESPACE_BYTES


@pytest.fixture(params=["sieve", "s3-fifo", "lru"])
def tier(request: pytest.FixtureRequest, shared_memory: Path) -> Iterator[SlabTier]:
    eviction: Eviction = request.param
    settings = SlabSettings(eviction=eviction)
    with closing(SlabTier(Place(shared_memory / "upper", True), SMALL, settings)) as made:
        yield made
        assert made.check().ok


@pytest.fixture
def upper(shared_memory: Path) -> Iterator[SlabTier]:
    """One with a tier below that gets what would go."""
    place = Place(shared_memory / "upper", True)
    with closing(SlabTier(place, SMALL, below=Below.ON_EVICT)) as made:
        yield made
        assert made.check().ok


def put(
    tier: SlabTier, numbers: range, size: int = SIZE, below: Below | None = None
) -> list[Stored]:
    """Pages that have nothing to do with each other."""
    keys = [a_key(number) for number in numbers]
    memory = EngineMemory([bytes_of(key, size) for key in keys])
    return tier.put(keys, memory.segments, None, [b""] * len(keys), Limits.within(SOON), below)


def show(tier: SlabTier, numbers: range, size: int = SIZE) -> Shown:
    keys = [a_key(number) for number in numbers]
    return tier.show(keys, [size] * len(keys))


def places(shown: Shown) -> list[int]:
    return [place for place, _, _ in shown.pages]


def contents(shown: Shown, size: int = SIZE) -> list[bytes]:
    return [string_at(address, size) for _, address, _ in shown.pages]


def expected(numbers: range) -> list[bytes]:
    return [bytes_of(a_key(number), SIZE) for number in numbers]


def test_it_is_the_page_and_its_checksum(tier: SlabTier) -> None:
    put(tier, range(3))
    shown = show(tier, range(3))
    assert contents(shown) == expected(range(3))
    keys = [a_key(number) for number in range(3)]
    assert [checksum for _, _, checksum in shown.pages] == checksums(keys, expected(range(3)))
    tier.unshow(shown)


def test_it_stays_while_others_come_and_goes_after(tier: SlabTier) -> None:
    put(tier, range(8))
    shown = show(tier, range(8))
    for start in MANY[::20]:
        put(tier, range(start, start + 20))
    assert contents(shown) == expected(range(8))
    assert all(tier.exists([a_key(number) for number in range(8)]))
    assert tier.check().ok
    tier.set_quota(OWN, SIZE)
    assert sum(tier.exists([a_key(number) for number in range(8)])) == 8
    tier.unshow(shown)
    tier.set_quota(OWN, SIZE)
    assert sum(tier.exists([a_key(number) for number in range(8)])) <= 1


def test_slabs_of_another_size_go_around_it(tier: SlabTier) -> None:
    put(tier, range(1))
    shown = show(tier, range(1))
    for number in range(100, 140):
        put(tier, range(number, number + 1), 60_000)
    assert contents(shown) == expected(range(1))
    tier.unshow(shown)


@pytest.mark.parametrize("clears", [False, True])
def test_removed_it_is_gone_and_its_bytes_stay(tier: SlabTier, clears: bool) -> None:
    put(tier, range(4))
    shown = show(tier, range(4))
    if clears:
        assert tier.clear(OWN) == 4
    else:
        assert tier.remove([a_key(number) for number in range(4)]) == 4
    assert read(tier, [a_key(0)], SIZE) == [Lookup.MISS]
    for start in MANY[::20]:
        put(tier, range(start, start + 20))
    assert put(tier, range(4)) == [Stored.STORED] * 4
    assert contents(shown) == expected(range(4))
    assert tier.check().ok
    tier.unshow(shown)


def test_only_what_is_here_whole_and_free_is_shown(upper: SlabTier) -> None:
    put(upper, range(4), below=Below.NEVER)
    put(upper, range(4, 5), below=Below.NOW)  # waits to be written
    first = show(upper, range(1))
    assert places(show(upper, range(6))) == [1, 2, 3]
    assert places(show(upper, range(4), SIZE - 1)) == []
    upper.unshow(first)
    assert places(show(upper, range(1))) == [0]


def test_a_disk_shows_nothing(tmp_path: Path) -> None:
    with closing(SlabTier(Place(tmp_path / "disk", False), 64 << 20)) as disk:
        put(disk, range(2))
        shown = show(disk, range(2))
        assert shown.pages == []
        disk.unshow(shown)


def test_it_counts_as_a_use(tier: SlabTier) -> None:
    put(tier, range(2))
    for _ in range(2):
        tier.unshow(show(tier, range(1)))
    assert tier.used_again([a_key(0), a_key(1)]) == [True, False]


@pytest.mark.parametrize("how", ["put again", "queued"])
def test_what_is_asked_for_below_meanwhile_is_written_after(upper: SlabTier, how: str) -> None:
    put(upper, range(2), below=Below.ON_EVICT)
    shown = show(upper, range(2))
    if how == "put again":
        put(upper, range(2), below=Below.NOW)
    else:
        with upper.native() as store:
            assert store.queue_unspilled(False, 1 << 30, SOON) == 2
    assert upper.counts()["dirty_pages"] == 0
    with upper.native() as store:  # or the keeper would ask again and again
        assert store.queue_unspilled(False, 1 << 30, SOON) == 0
    assert upper.counts()["spilling_bytes"] == 0
    assert upper.counts()["asked_pages"] == 2
    assert upper.check().ok
    upper.unshow(shown)
    assert upper.counts()["dirty_pages"] == 2
    assert upper.counts()["asked_pages"] == 0


def test_what_is_removed_is_asked_for_no_more(upper: SlabTier) -> None:
    put(upper, range(2), below=Below.ON_EVICT)
    shown = show(upper, range(2))
    put(upper, range(2), below=Below.NOW)
    upper.remove([a_key(0)])
    assert upper.counts()["asked_pages"] == 1
    upper.unshow(shown)
    assert upper.counts()["asked_pages"] == 0


def test_what_the_tier_below_lacks_is_still_known_after(upper: SlabTier) -> None:
    put(upper, range(1), below=Below.ON_EVICT)
    upper.unshow(show(upper, range(1)))
    with upper.native() as store:
        assert store.queue_unspilled(False, 1 << 30, SOON) == 1


def test_a_store_full_of_what_is_shown_refuses_and_recovers(upper: SlabTier) -> None:
    """Nothing waits for those who read."""
    for start in MANY[::20]:
        put(upper, range(start, start + 20), below=Below.NEVER)
    shown = show(upper, MANY)
    assert len(shown.pages) > 100
    assert put(upper, range(3), below=Below.NEVER) == [Stored.REFUSED] * 3
    upper.unshow(shown)
    assert put(upper, range(3), below=Below.NEVER) == [Stored.STORED] * 3


def test_memory_stays_after_the_store_is_closed(shared_memory: Path) -> None:
    tier = SlabTier(Place(shared_memory / "store", True), SMALL)
    put(tier, range(3))
    shown = show(tier, range(3))
    tier.close()
    assert contents(shown) == expected(range(3))


def test_a_change_that_fails_does_not_end_it(tier: SlabTier) -> None:
    """All is made anew from the index then, but for what somebody has in hand."""
    put(tier, range(4))
    shown = show(tier, range(4))
    tier.remove([a_key(0)])
    failing = injected(lambda name, _offset, _size: errno.EIO if name == "index_commit" else 0)
    with failing, pytest.raises(TierError):
        tier.remove([a_key(1)])
    for start in MANY[::20]:
        put(tier, range(start, start + 20))
    assert contents(shown) == expected(range(4))
    assert tier.exists([a_key(number) for number in range(4)]) == [False, True, True, True]
    assert tier.check().ok
    tier.unshow(shown)
    assert tier.counts()["held"] == 0


def show_for_ever(store: SmallStore) -> None:
    with store.opened() as tier:
        shown = show(tier, range(4))
        assert len(shown.pages) == 4
        tier.remove([a_key(3)])
        (store.directory.parent / "shows").touch()
        while contents(shown) == expected(range(4)):
            pass


def test_who_dies_shows_nothing_any_more(shared_memory: Path) -> None:
    store = SmallStore(shared_memory / "store", True, SMALL)
    with store.opened() as tier:
        put(tier, range(4))
        job = Job(show_for_ever, store)
        wait_until((shared_memory / "shows").exists)
        assert show(tier, range(4)).pages == []
        job.kill()
        assert tier.sweep() == 4
        assert tier.check().ok
        shown = show(tier, range(4))
        assert places(shown) == [0, 1, 2]
        tier.unshow(shown)


def show_and_end(store: SmallStore) -> int:
    with store.opened() as tier:
        return len(show(tier, range(4)).pages)


def test_who_ends_without_a_word_shows_nothing_any_more(shared_memory: Path) -> None:
    store = SmallStore(shared_memory / "store", True, SMALL)
    with store.opened() as tier:
        put(tier, range(4))
        assert run(show_and_end, store) == 4
        assert tier.sweep() == 4
        assert tier.check().ok
