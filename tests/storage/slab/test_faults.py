"""Storage that fails or is slow: each operation says so in time, nothing is lost, and all is well after."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from lmcache_sglang.errors import Reason, TierError
from lmcache_sglang.storage.base import NAMESPACE_BYTES, Lookup, Stored
from lmcache_sglang.storage.slab.settings import Engine, SlabSettings
from lmcache_sglang.storage.slab.tier import SlabTier
from lmcache_sglang.testing.injection import STEPS, Failing, Hook, Slow, injected
from lmcache_sglang.testing.small_store import SmallStore, get, here, key_of, put
from lmcache_sglang.testing.tier_suite import OTHER_NAMESPACE, at_once

CAPACITY = 2 << 20
OLD = range(20)  # pages that are there before
NEW = [40, 41, 42, 44, 46, 50]  # none of OTHER_NAMESPACE
OWN_OLD = [number for number in OLD if not key_of(number).startswith(OTHER_NAMESPACE)]
SLOW = 0.05

MEDIA = ["memory", "threads", "io_uring"]


@dataclass(frozen=True)
class Medium:
    """A store on one medium, with the pages `OLD`."""

    store: SmallStore

    def opened(self, seconds: float = 10.0) -> SlabTier:
        settings = SlabSettings(
            engine=self.store.settings.engine, seconds=seconds, queue_depth=2, threads=2
        )
        return SmallStore(self.store.directory, self.store.memory, CAPACITY, settings).open()


@pytest.fixture(params=MEDIA)
def medium(request: pytest.FixtureRequest, shared_memory: Path) -> Medium:
    in_memory = request.param == "memory"
    engine: Engine = "auto" if in_memory else request.param
    settings = SlabSettings(engine=engine)
    store = SmallStore(shared_memory / "store", in_memory, CAPACITY, settings)
    with store.opened() as tier:
        assert put(tier, OLD, [b""] * len(OLD)) == [Stored.STORED] * len(OLD)
    return Medium(store)


def all_is_well(tier: SlabTier, still_here: list[int]) -> None:
    """Nothing is lost or leaked, and what failed before works now."""
    report = tier.check()
    assert report.ok, report
    assert tier.counts()["reserved"] == 0
    assert get(tier, still_here) == [Lookup.HIT] * len(still_here)
    assert all(stored.kept for stored in put(tier, NEW, [b""] * len(NEW)))
    assert get(tier, NEW) == [Lookup.HIT] * len(NEW)
    assert tier.check().ok


def outcome_of(action: Callable[[], object]) -> object:
    """What was returned, or the reason of the `TierError` that was raised."""
    try:
        return action()
    except TierError as error:
        return error.reason


ERRORS = {errno.EIO: Reason.IO, errno.EROFS: Reason.IO, errno.ENOSPC: Reason.FULL}
FAILS_WRITING = {"write", "flush", "reserve", "publish", "index_begin", "index_commit"}


@pytest.mark.parametrize("error", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_fails_is_told_and_loses_nothing(medium: Medium, step: str, error: int) -> None:
    tier = medium.opened()
    reason = ERRORS[error]
    with injected(Failing(step, error)):
        stored = outcome_of(lambda: put(tier, NEW, [b""] * len(NEW)))
        removed = outcome_of(lambda: tier.remove([key_of(0)]))
        pinned = outcome_of(lambda: tier.pin([key_of(1)], 60))
        cleared = outcome_of(lambda: tier.clear(OTHER_NAMESPACE))
        found = outcome_of(lambda: get(tier, OWN_OLD[1:]))
        there = here(tier, NEW)
    hits = [Lookup.HIT] * len(OWN_OLD[1:])
    if step in ("index_begin", "index_commit"):
        assert (stored, removed, pinned, cleared, found) == (*[reason] * 4, hits)
    else:
        assert (removed, pinned, cleared) == (1, None, 5)
    match step:
        case "write":
            assert stored == [Stored.FAILED] * len(NEW)
        case "flush":
            written = Stored.STORED if medium.store.memory else Stored.FAILED
            assert stored == [written] * len(NEW)
        case "reserve" | "publish":
            assert stored in (Reason.IO, Reason.FULL)
        case "read":
            assert found == [Lookup.FAILED] * len(hits)
    kept = isinstance(stored, list) and stored == [Stored.STORED] * len(NEW)
    assert there == (set(NEW) if kept else set())
    all_is_well(tier, OWN_OLD[1:])
    tier.close()


@pytest.mark.parametrize("step", sorted(FAILS_WRITING - {"flush"}))
@pytest.mark.parametrize("first", range(3))
def test_a_full_store_loses_nothing_more_than_it_evicted(
    medium: Medium, step: str, first: int
) -> None:
    """The failure comes in the middle of making room: the first commit, or a later one, does not hold."""
    tier = medium.opened()
    fillers = range(100, 200)
    put(tier, fillers, [b""] * len(fillers))
    before = here(tier, fillers)
    with injected(Failing(step, errno.EIO, first=first, times=1)):
        for number in (48, 56, 53, 61):
            outcome_of(lambda number=number: put(tier, [number], [b""]))  # type: ignore[misc]
    evicted = tier.stats().evicted
    report = tier.check()
    assert report.ok, report
    left = sorted(here(tier, fillers) & before)
    assert get(tier, left) == [Lookup.HIT] * len(left)
    assert tier.counts()["reserved"] == 0
    assert len(before) - len(left) <= evicted
    assert all(stored.kept for stored in put(tier, [48, 53], [b""] * 2))
    assert tier.check().ok
    tier.close()


@pytest.mark.parametrize("step", ["index_commit", "reserve"])
def test_a_slab_whose_change_of_size_failed_keeps_its_slots_where_they_were(
    medium: Medium, step: str
) -> None:
    """Reserved slots of the small size that the slab never got must not end among the large ones."""
    tier = medium.opened()
    tier.clear(key_of(0)[:NAMESPACE_BYTES])
    tier.clear(OTHER_NAMESPACE)
    large = list(range(7, 2000, 8))  # 30,000 bytes, two to a slab of 64 KiB
    put(tier, large, [b""] * len(large))
    small = list(range(4000, 4160, 8))  # 100 bytes
    for first in range(3):
        with injected(Failing(step, errno.EIO, first=first, times=1)):
            outcome_of(lambda: put(tier, small, [b""] * len(small)))
        report = tier.check()
        assert report.ok, report
        for numbers in (large, small, large):
            stored = put(tier, numbers, [b""] * len(numbers))
            assert Stored.STORED in stored or Stored.PRESENT in stored
            assert set(get(tier, numbers)) <= {Lookup.HIT, Lookup.MISS}
        report = tier.check()
        assert report.ok, report
        assert tier.counts()["reserved"] == 0
    tier.close()


@dataclass
class BadBlocks:
    """The device fails wherever it touches these bytes, as one with a bad block does."""

    where: range
    name: str

    def __call__(self, name: str, offset: int, size: int) -> int:
        touches = offset < self.where.stop and self.where.start < offset + size
        return errno.EIO if name == self.name and touches else 0


def test_a_bad_block_fails_its_own_page_only(medium: Medium) -> None:
    tier = medium.opened()
    for name in ("write", "read"):
        with injected(BadBlocks(range(128 << 10), name)):
            stored = put(tier, NEW, [b""] * len(NEW))
            found = get(tier, list(OLD))
        if name == "read":
            assert set(found) == {Lookup.FAILED, Lookup.HIT}
        else:
            assert found == [Lookup.HIT] * len(OLD)
            assert set(stored) == {Stored.STORED, Stored.FAILED}
            assert [one is Stored.STORED for one in stored] == [
                lookup is Lookup.HIT for lookup in get(tier, NEW)
            ]
    all_is_well(tier, list(OLD))
    tier.close()


def test_a_slow_device_is_given_up_at_the_deadline(medium: Medium) -> None:
    tier = medium.opened(seconds=4 * SLOW)
    numbers = list(range(60, 100))
    with injected(Slow("write", SLOW)):
        started = time.monotonic()
        outcome = put(tier, numbers, [b""] * len(numbers))
        took = time.monotonic() - started
    assert set(outcome) == {Stored.STORED, Stored.LATE}
    assert took < 20 * SLOW
    kept = {number for number, one in zip(numbers, outcome, strict=True) if one.kept}
    assert kept == here(tier, numbers)
    with injected(Slow("read", SLOW)):
        started = time.monotonic()
        found = get(tier, [*OLD] * 4)
        took = time.monotonic() - started
    assert set(found) == {Lookup.HIT, Lookup.LATE}
    assert took < 20 * SLOW
    all_is_well(tier, list(OLD))
    tier.close()


@pytest.mark.parametrize("step", ["flush", "publish", "index_commit", "index_committed", "reserve"])
def test_what_is_slow_but_works_is_stored(medium: Medium, step: str) -> None:
    """Even when the deadline passes meanwhile: the pages are written, and nobody is in the way."""
    tier = medium.opened(seconds=SLOW / 2)
    with injected(Slow(step, SLOW)):
        outcome = put(tier, [40], [b""])
    late = step == "reserve"  # the deadline has passed before anything was written
    assert outcome == [Stored.LATE if late else Stored.STORED]
    tier.close()
    with medium.store.opened() as again:
        all_is_well(again, list(OLD))


def test_a_thread_that_waits_for_a_slow_commit_gives_up_and_readers_do_not_wait(
    medium: Medium,
) -> None:
    tier = medium.opened(seconds=0.2)
    slow: Hook = Slow("index_commit", 1.0)

    def change() -> None:
        assert put(tier, [40], [b""]) == [Stored.STORED]

    def use() -> None:
        time.sleep(0.1)
        started = time.monotonic()
        assert get(tier, list(OLD)) == [Lookup.HIT] * len(OLD)
        assert time.monotonic() - started < 0.5
        with pytest.raises(TierError) as caught:
            put(tier, [41], [b""])
        assert caught.value.reason is Reason.BUSY
        assert time.monotonic() - started < 0.8

    with injected(slow):
        at_once(change, use)
    all_is_well(tier, list(OLD))
    tier.close()
