"""The tiers as one store: what is where, what heals, and that no tier's failure comes through."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from threading import Thread, current_thread
from types import SimpleNamespace
from typing import cast

import pytest

from lmcache_sglang.errors import Reason, TierError
from lmcache_sglang.storage import base, seldom
from lmcache_sglang.storage import keeper as keeper_module
from lmcache_sglang.storage.admission import Admission, All, MinimumPrefix, SecondTouch
from lmcache_sglang.storage.base import NO_LIMITS, Below, Cancel, Limits, Lookup, Stored
from lmcache_sglang.storage.breaker import FAILURES, MOST_SECONDS
from lmcache_sglang.storage.chain import Chain, Promotion
from lmcache_sglang.storage.memory import MemoryTier
from lmcache_sglang.storage.slab.tier import SlabTier
from lmcache_sglang.testing.damage import flip
from lmcache_sglang.testing.faulty_tier import FaultyTier
from lmcache_sglang.testing.injection import Failing, Recorded, injected
from lmcache_sglang.testing.small_store import OWN_NAMESPACE
from lmcache_sglang.testing.tier_suite import (
    OTHER_NAMESPACE,
    PAGE,
    ROOMY,
    EngineMemory,
    a_key,
    at_once,
    bytes_of,
    some_keys,
)
from lmcache_sglang.testing.two_tiers import SOON, Held, TwoTiers, get, put

EIO = 5


def upper(chain: Chain) -> SlabTier:
    return cast("SlabTier", chain.tiers[0])


def lower(chain: Chain) -> SlabTier:
    return cast("SlabTier", chain.tiers[-1])


def put_and_flush(chain: Chain, keys: Sequence[bytes]) -> None:
    assert put(chain, keys) == [True] * len(keys)
    assert chain.flush(SOON)


def forget_above(chain: Chain, keys: Sequence[bytes]) -> None:
    upper(chain).remove(keys)
    assert not any(upper(chain).exists(keys))


@pytest.fixture
def chain(tiers: TwoTiers) -> Iterator[Chain]:
    with closing(tiers.open()) as opened:
        yield opened


# One store, whatever the tiers.


@pytest.fixture(params=["cpu+disk", "disk", "cpu"])
def some_tiers(request: pytest.FixtureRequest, tiers: TwoTiers) -> TwoTiers:
    kinds = str(request.param).split("+")
    gone = {"memory": None} if "cpu" not in kinds else {"disk": None} if "disk" not in kinds else {}
    return tiers.but(**gone)


def test_pages_come_back_and_others_miss(some_tiers: TwoTiers) -> None:
    a, b, c, d = some_keys(4)
    with closing(some_tiers.open()) as chain:
        assert put(chain, [a, c]) == [True, True]
        assert chain.exists([a, b, c, d]) == [True, False, True, False]
        assert get(chain, [d, c, b, a]) == [False, True, False, True]
        assert put(chain, [a, b]) == [True, True]
        assert chain.faults.counts() == {}


def test_a_gap_is_seen_where_it_is(some_tiers: TwoTiers) -> None:
    keys = some_keys(6)
    with closing(some_tiers.open()) as chain:
        assert not any(chain.exists(keys))
        put(chain, keys[:3] + keys[4:])
        assert chain.exists(keys) == [True, True, True, False, True, True]
        assert chain.exists([]) == []


def test_what_was_put_outlives_close_and_reopen(some_tiers: TwoTiers) -> None:
    """Without a flush; the tier in memory outlives its process, too."""
    keys = some_keys(40)
    with closing(some_tiers.open()) as chain:
        put(chain, keys)
    with closing(some_tiers.open()) as chain:
        assert chain.exists(keys) == [True] * 40
        assert get(chain, keys) == [True] * 40
        assert all(report.ok for report in chain.check().values())


def test_closing_writes_what_still_waits(tiers: TwoTiers) -> None:
    keys = some_keys(40)
    with closing(tiers.open()) as chain:
        put(chain, keys)
    assert tiers.memory is not None
    shutil.rmtree(tiers.memory)
    with closing(tiers.open()) as chain:
        assert get(chain, keys) == [True] * 40


def test_clear_forgets_one_namespace_in_every_tier(some_tiers: TwoTiers) -> None:
    ours, theirs = some_keys(4), [a_key(number, OTHER_NAMESPACE) for number in range(3)]
    with closing(some_tiers.open()) as chain:
        put(chain, ours + theirs)
        assert chain.flush(SOON)
        assert chain.clear(OTHER_NAMESPACE) == 3
        assert get(chain, ours + theirs) == [True] * 4 + [False] * 3
    with closing(some_tiers.open()) as chain:
        assert not any(chain.exists(theirs))
        assert all(chain.exists(ours))


def test_a_closed_chain_misses_and_clears_nothing(some_tiers: TwoTiers) -> None:
    chain = some_tiers.open()
    put(chain, some_keys(2))
    chain.close()
    chain.close()
    assert get(chain, some_keys(2)) == [False, False]
    assert put(chain, some_keys(2)) == [False, False]
    with pytest.raises(TierError):
        chain.clear(OTHER_NAMESPACE)
    assert chain.stats() == []
    assert chain.waiting() == (0, 0)
    assert chain.faults.counts()[f"{chain.tiers[0].name}.closed"] >= 3


def test_unequal_counts_are_the_callers_mistake(some_tiers: TwoTiers) -> None:
    one = EngineMemory([bytes_of(a_key(0))])
    with closing(some_tiers.open()) as chain:
        with pytest.raises(ValueError, match="2 keys but 1 pages"):
            chain.put(some_keys(2), one.segments)
        with pytest.raises(ValueError, match="2 keys but 1 pages"):
            chain.get(some_keys(2), one.segments)


def test_a_chain_of_nothing_is_the_callers_mistake() -> None:
    with pytest.raises(ValueError, match="needs a tier"):
        Chain(None)


# Down.


def test_every_page_reaches_the_lower_tier(chain: Chain) -> None:
    keys = some_keys(10)
    put_and_flush(chain, keys)
    assert lower(chain).exists(keys) == [True] * 10
    assert chain.waiting() == (0, 0)


def test_pages_that_wait_go_down_together_with_one_flush(chain: Chain) -> None:
    keys = some_keys(60)
    recorded, held = Recorded(), Held()
    with injected(lambda *step: recorded(*step) or held(*step)):
        put(chain, keys[:1])
        assert held.reached.wait(SOON)  # the first is being written, and the others come
        for key in keys[1:]:
            put(chain, [key])
        held.may_pass.set()
        assert chain.flush(SOON)
    assert recorded.names.count("flush") == 2
    assert lower(chain).exists(keys) == [True] * 60


def test_a_batch_larger_than_the_upper_tier_reaches_the_lower_one(tiers: TwoTiers) -> None:
    keys = some_keys(100)
    with closing(tiers.but(upper_bytes=2 << 20).open()) as chain:
        memory = EngineMemory([bytes_of(key) for key in keys])
        assert chain.put(keys, memory.segments) == [True] * 100
        assert chain.flush(SOON)
        assert lower(chain).exists(keys) == [True] * 100
        assert get(chain, keys) == [True] * 100


def test_a_chain_that_outgrows_the_upper_tier_is_kept_whole_below(tiers: TwoTiers) -> None:
    """The upper one keeps its start, and never gives that way to its end."""
    keys = some_keys(100)
    with closing(tiers.but(upper_bytes=2 << 20).open()) as chain:
        for start in range(0, 100, 10):
            parent = keys[start - 1] if start else b""
            put(chain, keys[start : start + 10], parent=parent, position=start)
        assert "cpu.refused" not in chain.faults.counts()
    with closing(tiers.but(memory=None).open()) as chain:
        assert get(chain, keys) == [True] * 100


@pytest.mark.parametrize("admission", [SecondTouch(), MinimumPrefix(1000, All())], ids=str)
def test_what_is_held_back_is_not_written_for_lack_of_room(
    tiers: TwoTiers, admission: Admission
) -> None:
    keys = some_keys(100)
    with closing(tiers.but(upper_bytes=2 << 20, admission=admission).open()) as chain:
        memory = EngineMemory([bytes_of(key) for key in keys])
        assert not all(chain.put(keys, memory.segments))
        assert lower(chain).stats().pages == 0
        assert chain.faults.counts()["cpu.refused"] > 0


def test_a_page_on_its_way_down_is_a_hit(chain: Chain) -> None:
    keys = some_keys(3)
    held = Held()
    with injected(held):
        put(chain, keys[:1])
        assert held.reached.wait(SOON)  # the first is being written, two wait
        put(chain, keys[1:])
        pages, size = chain.waiting()
        assert (pages, size) == (2, 3 * PAGE)
        assert chain.exists(keys) == [True] * 3
        assert get(chain, keys) == [True] * 3
        assert not chain.flush(0.0)
        held.may_pass.set()
        assert chain.flush(SOON)
    assert lower(chain).exists(keys) == [True] * 3


def test_the_callers_memory_is_free_once_put_returns(chain: Chain) -> None:
    (key,) = some_keys(1)
    memory = EngineMemory([bytes_of(key)])
    held = Held()
    with injected(held):
        chain.put([key], memory.segments)
        memory.reuse()
        held.may_pass.set()
        assert chain.flush(SOON)
    forget_above(chain, [key])
    assert get(chain, [key]) == [True]


def test_parents_go_down_with_their_pages(tiers: TwoTiers) -> None:
    """So the tier below, too, gives up the end of a chain before its start; across batches."""
    chain_of_pages = some_keys(8)
    with closing(tiers.but(lower_bytes=2 << 20).open()) as chain:
        put(chain, chain_of_pages[4:], parent=chain_of_pages[3], position=4)
        put_and_flush(chain, chain_of_pages[:4])
        start = 1000
        while all(lower(chain).exists(chain_of_pages)):
            put_and_flush(chain, [a_key(start)])
            start += 1
        here = lower(chain).exists(chain_of_pages)
        assert here == sorted(here, reverse=True)


# What goes down, and when.


def test_write_back_writes_when_a_page_would_go(tiers: TwoTiers) -> None:
    keys = some_keys(80)
    lazily = tiers.but(admission=All("write-back"), upper_bytes=2 << 20)
    with closing(lazily.open()) as chain:
        put(chain, keys[:5])
        assert not chain.waiting()[0]
        assert lower(chain).stats().pages == 0
        for key in keys[5:]:  # more than the upper tier holds
            put(chain, [key])
        above = chain.stats()[0].pages
        assert (
            80 - above <= lower(chain).stats().pages <= 80 - above + 4
        )  # those that went, a few ahead
        assert get(chain, keys) == [True] * 80
    with closing(lazily.but(memory=None).open()) as chain:  # the close wrote the others
        assert get(chain, keys) == [True] * 80


def test_write_back_makes_room_for_pages_of_another_size(tiers: TwoTiers) -> None:
    small, large = some_keys(80), some_keys(6, start=500)
    lazily = tiers.but(admission=All("write-back"), upper_bytes=4 << 20)
    with closing(lazily.open()) as chain:
        for key in small:
            put(chain, [key])
        memory = EngineMemory([bytes_of(key, 2 * PAGE) for key in large])
        assert chain.put(large, memory.segments) == [True] * 6
        assert all(chain.tiers[0].exists(large)), "they did not get into the upper tier"
        assert get(chain, small) == [True] * 80
        assert all(report.ok for report in chain.check().values())


def test_a_second_touch_is_what_sends_a_page_down(tiers: TwoTiers) -> None:
    once, read_again, put_again = some_keys(3)
    with closing(tiers.but(admission=SecondTouch()).open()) as chain:
        for key in (once, read_again, put_again):
            put(chain, [key])
        get(chain, [read_again])
        put(chain, [put_again])
        until(lambda: lower(chain).exists([read_again, put_again]) == [True, True])
        assert lower(chain).exists([once]) == [False]
    with closing(tiers.but(memory=None).open()) as chain:  # nor did the close send it
        assert chain.exists([once, read_again, put_again]) == [False, True, True]


def test_what_was_touched_just_before_the_close_goes_down_with_it(
    tiers: TwoTiers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The background thread looks at touches now and then; here it never comes to it."""
    monkeypatch.setattr(keeper_module, "LOOK_SECONDS", SOON)
    keys = some_keys(2)
    with closing(tiers.but(admission=SecondTouch()).open()) as chain:
        put(chain, keys)
        get(chain, keys[:1])
    with closing(tiers.but(memory=None).open()) as chain:
        assert chain.exists(keys) == [True, False]


def test_an_explicit_flush_sends_what_was_held_back(tiers: TwoTiers) -> None:
    with closing(tiers.but(admission=SecondTouch()).open()) as chain:
        put_and_flush(chain, some_keys(3))
        assert lower(chain).exists(some_keys(3)) == [True] * 3


def test_a_short_chain_is_not_written_until_it_has_grown(tiers: TwoTiers) -> None:
    keys, other = some_keys(6), some_keys(3, start=100)
    with closing(tiers.but(admission=MinimumPrefix(6, All())).open()) as chain:
        put(chain, other)
        put(chain, keys[:3])
        assert chain.waiting() == (0, 0)
        put(chain, keys[3:], parent=keys[2], position=3)
        until(lambda: lower(chain).exists(keys) == [True] * 6)  # its start comes with it
        assert lower(chain).exists(other) == [False] * 3
    with closing(tiers.but(memory=None).open()) as chain:
        assert chain.exists(keys + other) == [True] * 6 + [False] * 3


@pytest.mark.parametrize("then", [All(), All("write-back"), SecondTouch()], ids=str)
def test_a_short_chain_is_written_neither_when_it_goes_nor_when_it_is_used(
    tiers: TwoTiers, then: Admission
) -> None:
    few = tiers.but(admission=MinimumPrefix(6, then), upper_bytes=2 << 20)
    with closing(few.open()) as chain:
        for key in some_keys(60):  # more than the upper tier holds
            put(chain, [key])
            assert get(chain, [key]) == [True]
        time.sleep(2.5)  # the background thread has looked
        assert lower(chain).stats().pages == 0
        long = some_keys(8, start=1000)
        put(chain, long[:4])
        put(chain, long[4:], parent=long[3], position=4)
        get(chain, long)
        assert chain.flush(SOON)
        assert lower(chain).exists(long) == [True] * 8  # its start comes with it


def until(what: Callable[[], bool]) -> None:
    """Wait for the background thread."""
    from lmcache_sglang.testing.engine import until as wait

    wait(what, SOON)


# Up again.


def test_a_hit_below_goes_up_and_not_down_again(chain: Chain) -> None:
    keys = some_keys(3)
    put_and_flush(chain, keys)
    forget_above(chain, keys)
    assert get(chain, keys) == [True] * 3
    assert upper(chain).exists(keys) == [True] * 3
    recorded = Recorded()
    with injected(recorded):
        put_and_flush(chain, keys)
    assert "write" not in recorded.names
    assert "flush" not in recorded.names


@pytest.mark.parametrize(
    ("promotion", "goes_up_after"), [("always", 1), ("second-hit", 2), ("never", None)]
)
def test_a_page_goes_up_by_the_policy(
    tiers: TwoTiers, promotion: Promotion, goes_up_after: int | None
) -> None:
    keys = some_keys(2)
    with closing(tiers.but(promotion=promotion).open()) as chain:
        put_and_flush(chain, keys)
        forget_above(chain, keys)
        for hits in range(1, 4):
            assert get(chain, keys) == [True, True]
            above = goes_up_after is not None and hits >= goes_up_after
            assert upper(chain).exists(keys) == [above] * 2


def test_what_goes_up_is_told_its_parents() -> None:
    inner = FaultyTier(MemoryTier(ROOMY, "cpu"))
    keys = some_keys(5)
    chain = Chain(inner, MemoryTier(ROOMY))
    memory = EngineMemory([bytes_of(key) for key in keys])
    chain.tiers[1].put(keys, memory.segments)
    inner.put(keys[1:2], memory.segments.select([1]))
    inner.parents.clear()
    assert get(chain, keys, parent=a_key(99)) == [True] * 5
    assert inner.parents == [[a_key(99), keys[1], keys[2], keys[3]]]  # of all but keys[1]
    assert inner.below[-1] is Below.NEVER  # it came from there


def test_a_put_is_told_its_parents_in_every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = FaultyTier(MemoryTier(4 * PAGE, "cpu"))
    keys = some_keys(4)
    put(Chain(inner), keys, parent=a_key(99), position=7)
    assert inner.parents == [[a_key(99), keys[0]], [keys[1], keys[2]]]


# Tiers that fail.


class Faulty:
    """Both tiers plain, and each of them to be told to fail."""

    def __init__(self) -> None:
        self.upper = FaultyTier(MemoryTier(ROOMY), "cpu")
        self.lower = FaultyTier(MemoryTier(ROOMY), "disk")
        self.chain = Chain(self.upper, self.lower)
        self.now = 1000.0
        for breaker in self.chain._breakers.values():
            breaker._clock = lambda: self.now

    def put_below(self, keys: Sequence[bytes]) -> None:
        memory = EngineMemory([bytes_of(key) for key in keys])
        self.lower.inner.put(keys, memory.segments)

    def get(self, keys: Sequence[bytes]) -> list[bool]:
        """As if nothing had gone up before."""
        self.upper.inner.remove(keys)
        return get(self.chain, keys)


@pytest.fixture
def faulty() -> Faulty:
    return Faulty()


@pytest.mark.parametrize("reason", Reason)
def test_a_failing_lower_tier_is_misses_and_a_count(faulty: Faulty, reason: Reason) -> None:
    below, new = some_keys(2), some_keys(2, start=10)
    faulty.put_below(below)
    faulty.lower.failing = reason
    assert faulty.get(below) == [False, False]
    assert faulty.chain.exists(below) == [False, False]
    assert put(faulty.chain, new) == [True, True]
    assert get(faulty.chain, new) == [True, True]
    with pytest.raises(TierError):  # its pages are still there
        faulty.chain.clear(OTHER_NAMESPACE)
    assert [stats.name for stats in faulty.chain.stats()] == ["memory"]
    counts = faulty.chain.faults.counts()
    assert {name for name in counts if name != "disk.bypassed"} == {f"disk.{reason.value}"}
    faulty.lower.failing = None
    faulty.now += MOST_SECONDS
    assert faulty.get(below) == [True, True]


@pytest.mark.parametrize("call", ["exists", "get", "put", "remove", "clear", "stats"])
def test_a_failing_upper_tier_is_misses_and_a_count(faulty: Faulty, call: str) -> None:
    keys = some_keys(2)
    faulty.put_below(keys)
    faulty.upper.reads = Lookup.CORRUPT  # so that there is something to remove
    put(faulty.chain, keys[:1])
    faulty.upper.refusing = {call}
    assert faulty.chain.exists(keys) == [True, True]
    assert get(faulty.chain, keys) == [True, True]
    new = EngineMemory([bytes_of(a_key(9))])
    assert faulty.chain.put([a_key(9)], new.segments) == [True]  # a broken one is gone around
    assert faulty.lower.inner.exists([a_key(9)]) == [call == "put"]
    with pytest.raises(TierError) if call == "clear" else nullcontext():
        faulty.chain.clear(OTHER_NAMESPACE)
    faulty.chain.stats()
    counts = faulty.chain.faults.counts()
    assert counts["cpu.io"] >= 1
    assert "cpu.refused" not in counts  # it was not room that was lacking


def test_a_tier_that_keeps_failing_is_left_alone_and_tried_again(faulty: Faulty) -> None:
    keys = some_keys(1)
    faulty.put_below(keys)
    faulty.lower.failing = Reason.BUSY
    for _ in range(20):
        assert faulty.get(keys) == [False]
    assert faulty.lower.asked["get"] == FAILURES
    assert faulty.chain.faults.counts() == {"disk.busy": FAILURES, "disk.bypassed": 20 - FAILURES}
    faulty.lower.failing = None
    assert faulty.get(keys) == [False]  # nobody knows yet
    faulty.now += MOST_SECONDS
    assert faulty.get(keys) == [True]
    assert faulty.get(keys) == [True]


@pytest.mark.parametrize("outcome", [Lookup.FAILED, Lookup.LATE])
def test_a_tier_that_finds_pages_and_cannot_read_them_promises_none(
    faulty: Faulty, outcome: Lookup
) -> None:
    """Its index answers, or SGLang would begin a prefetch, and wait for it, each time."""
    keys = some_keys(3)
    faulty.put_below(keys)
    faulty.lower.reads = outcome
    for _ in range(FAILURES):
        assert faulty.chain.exists(keys) == [True] * 3
        assert faulty.get(keys) == [False] * 3
    assert faulty.chain.exists(keys) == [False] * 3
    assert faulty.get(keys) == [False] * 3
    assert faulty.lower.asked["get"] == FAILURES
    what = "io" if outcome is Lookup.FAILED else "busy"
    assert faulty.chain.faults.counts() == {f"disk.{what}": 9, "disk.bypassed": 2}
    faulty.lower.reads = None
    faulty.now += MOST_SECONDS
    assert faulty.chain.exists(keys) == [True] * 3
    assert faulty.get(keys) == [True] * 3


def test_a_page_that_cannot_be_read_does_not_cost_the_others(faulty: Faulty) -> None:
    keys = some_keys(2)
    faulty.put_below(keys[:1])
    for _ in range(2 * FAILURES):
        faulty.lower.reads = Lookup.FAILED
        assert faulty.get(keys) == [False, False]
        faulty.lower.reads = None
        assert faulty.get(keys) == [True, False]  # a success begins the count anew
    assert "disk.bypassed" not in faulty.chain.faults.counts()


def test_a_callers_own_haste_is_no_failure_of_the_tier(faulty: Faulty) -> None:
    keys = some_keys(2)
    faulty.put_below(keys)
    faulty.lower.reads = Lookup.LATE
    memory = EngineMemory.blank([PAGE] * 2)
    for _ in range(2 * FAILURES):
        assert not any(faulty.chain.get(keys, memory.segments, limits=Limits.within(0.001)))
    assert faulty.lower.asked["get"] == 2 * FAILURES
    faulty.lower.reads = Lookup.FAILED  # but this one is
    for _ in range(2 * FAILURES):
        assert not any(faulty.chain.get(keys, memory.segments, limits=Limits.within(0.001)))
    assert faulty.lower.asked["get"] == 3 * FAILURES


@pytest.mark.parametrize("broken", ["upper", "lower"])
def test_the_other_tier_forgets_what_one_cannot(faulty: Faulty, broken: str) -> None:
    keys = [a_key(number, OTHER_NAMESPACE) for number in range(2)]
    faulty.put_below(keys)
    put(faulty.chain, keys)
    tiers = {"upper": faulty.upper, "lower": faulty.lower}
    tiers[broken].refusing = {"clear"}
    with pytest.raises(TierError, match="told to fail to clear"):
        faulty.chain.clear(OTHER_NAMESPACE)
    assert {name: any(tier.inner.exists(keys)) for name, tier in tiers.items()} == {
        "upper": broken == "upper",
        "lower": broken == "lower",
    }


def test_a_call_has_one_deadline_for_all_tiers(faulty: Faulty) -> None:
    keys = some_keys(2)
    faulty.put_below(keys)
    memory = EngineMemory.blank([PAGE] * 2)
    limits = Limits.within(60.0)
    assert all(faulty.chain.get(keys, memory.segments, limits=limits))
    assert faulty.upper.limits == faulty.lower.limits == [limits]


def test_time_runs_from_when_the_limits_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(base, "time", SimpleNamespace(monotonic=lambda: now[0]))
    limits = Limits.within(3.0)
    assert NO_LIMITS.left(own=10.0) == 10.0
    assert limits.left(own=10.0) == 3.0
    assert limits.left(own=1.0) == 1.0
    now[0] += 2.0
    assert limits.left(own=10.0) == 1.0
    now[0] += 2.0
    assert limits.left(own=10.0) == 0.0


def test_misses_are_no_failures(faulty: Faulty) -> None:
    for _ in range(2 * FAILURES):
        assert faulty.get(some_keys(2)) == [False, False]
    assert faulty.chain.faults.counts() == {}


@pytest.mark.parametrize("outcome", [Stored.FAILED, Stored.LATE])
def test_a_tier_that_takes_no_pages_is_not_waited_for_each_time(outcome: Stored) -> None:
    tier = FaultyTier(MemoryTier(ROOMY), "disk")
    tier.writes = outcome
    chain = Chain(None, tier)
    for _ in range(2 * FAILURES):
        assert put(chain, some_keys(2)) == [False, False]
    assert tier.asked["put"] == FAILURES
    what = "io" if outcome is Stored.FAILED else "busy"
    assert chain.faults.counts() == {f"disk.{what}": 2 * FAILURES, "disk.bypassed": FAILURES}


def test_a_failing_tier_logs_one_line_a_minute(
    faulty: Faulty, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty.lower.reads = Lookup.CORRUPT
    faulty.put_below(some_keys(1))

    def read() -> None:
        faulty.put_below(some_keys(1))
        faulty.get(some_keys(1))

    with caplog.at_level(logging.DEBUG):
        for _ in range(50):
            read()
        (line,) = caplog.messages
        assert "disk tier: corrupt: a page's bytes did not match its checksum" in line
        assert "(1 since the last message, 1 in all)" in line
        caplog.clear()
        monkeypatch.setattr(seldom, "EVERY_SECONDS", 0.0)
        read()
        (line,) = caplog.messages
        assert "(50 since the last message, 51 in all)" in line
        caplog.clear()
        monkeypatch.setattr(seldom, "EVERY_SECONDS", 60.0)
        faulty.lower.failing = Reason.BUSY  # another kind has a line of its own
        faulty.get(some_keys(1))
        assert len(caplog.messages) == 1


def test_a_check_that_fails_is_not_a_miss(faulty: Faulty) -> None:
    faulty.lower.failing = Reason.CORRUPT
    with pytest.raises(TierError):
        faulty.chain.check()


def test_no_room_for_a_page_is_counted_by_tier(tiers: TwoTiers) -> None:
    with closing(tiers.but(lower_bytes=2 << 20).open()) as chain:
        assert lower(chain).fits(PAGE)
        assert not lower(chain).fits(1 << 20)
        assert chain.fits(PAGE) == []
        assert chain.fits(1 << 20) == [chain.tiers[1]]
        assert chain.fits(1 << 30) == chain.tiers
        large = EngineMemory([bytes(1 << 20)])
        assert chain.put([a_key(1)], large.segments) == [True]
        assert not chain.flush(SOON)  # it would be a lie: the page is not below
        assert chain.faults.counts()["disk.refused"] >= 1
        too_large = EngineMemory([bytes(32 << 20)])
        assert chain.put([a_key(2)], too_large.segments) == [False]
        assert chain.faults.counts()["cpu.refused"] == 1


def test_a_disk_that_takes_nothing_is_misses_and_a_count_and_heals(chain: Chain) -> None:
    keys = some_keys(6)
    with injected(Failing("flush", EIO)):
        assert put(chain, keys) == [True] * 6
        assert not chain.flush(SOON)  # nothing was written
        assert chain.exists(keys) == [True] * 6
        assert not any(lower(chain).exists(keys))
    assert chain.faults.counts().keys() == {"disk.io"}
    assert chain.flush(SOON)
    assert lower(chain).exists(keys) == [True] * 6
    assert lower(chain).check().ok


# Damage.


def test_damage_below_is_a_miss_that_the_next_put_heals(chain: Chain) -> None:
    keys = some_keys(3)
    put_and_flush(chain, keys)
    forget_above(chain, keys)
    flip(lower(chain), bytes_of(keys[1]))
    assert get(chain, keys) == [True, False, True]
    assert chain.faults.counts() == {"disk.corrupt": 1}
    assert lower(chain).exists(keys) == [True, False, True]
    put_and_flush(chain, keys)
    forget_above(chain, keys)
    assert get(chain, keys) == [True] * 3
    assert lower(chain).check().ok


def test_damage_above_is_served_from_below_and_healed(chain: Chain) -> None:
    keys = some_keys(3)
    put_and_flush(chain, keys)
    flip(upper(chain), bytes_of(keys[1]))
    assert get(chain, keys) == [True] * 3
    assert chain.faults.counts() == {"cpu.corrupt": 1}
    assert upper(chain).check().ok
    assert upper(chain).exists(keys) == [True] * 3


def test_damage_in_memory_gets_no_fresh_checksum_on_the_way_down(chain: Chain) -> None:
    """Of three pages one is in the writer's hands; the other two wait, one of them damaged."""
    keys = some_keys(3)
    held = Held()
    with injected(held):
        put(chain, keys[:1])
        assert held.reached.wait(SOON)
        put(chain, keys[1:])
        flip(upper(chain), bytes_of(keys[1]))
        held.may_pass.set()
        assert chain.flush(SOON)
    assert lower(chain).exists(keys) == [True, False, True]
    assert lower(chain).check().ok
    assert upper(chain).check().ok
    assert get(chain, keys) == [True, False, True]
    assert chain.faults.counts() == {"cpu.corrupt": 1}
    put_and_flush(chain, keys)
    assert get(chain, keys) == [True] * 3


def test_check_speaks_for_each_tier(chain: Chain) -> None:
    keys = some_keys(3)
    put_and_flush(chain, keys)
    flip(upper(chain), bytes_of(keys[0]))
    flip(lower(chain), bytes_of(keys[1]))
    reports = chain.check(repair=True)
    assert {name: report.corrupt for name, report in reports.items()} == {
        "cpu": [keys[0]],
        "disk": [keys[1]],
    }
    assert all(report.ok for report in chain.check().values())
    assert get(chain, keys) == [True] * 3


# Clearing and closing while pages are on their way.


def test_cleared_pages_do_not_come_back_from_the_way_down(chain: Chain) -> None:
    ours, theirs = some_keys(2), [a_key(number, OTHER_NAMESPACE) for number in range(2)]
    held = Held()
    with injected(held):
        put(chain, theirs[:1])
        assert held.reached.wait(SOON)  # this one is being written while it is cleared
        put(chain, ours + theirs[1:])
        assert chain.clear(OTHER_NAMESPACE) == 2
        assert get(chain, ours + theirs) == [True, True, False, False]
        held.may_pass.set()
        assert chain.flush(SOON)
    assert lower(chain).exists(ours + theirs) == [True, True, False, False]
    assert get(chain, ours + theirs) == [True, True, False, False]
    put_and_flush(chain, theirs)  # and they can be put again
    assert lower(chain).exists(theirs) == [True, True]


def test_a_clear_waits_for_what_is_on_its_way_down(chain: Chain) -> None:
    """Or a read of the lower tier, just after it, would bring back what it forgot."""
    keys, held = some_keys(2), Held()
    with injected(held):
        put(chain, keys)
        assert held.reached.wait(SOON)
        clearing = Thread(target=chain.clear, args=(OWN_NAMESPACE,))
        clearing.start()
        until(lambda: upper(chain).exists(keys) == [False] * 2)
        clearing.join(0.2)
        assert clearing.is_alive()
        held.may_pass.set()
        clearing.join(SOON)
    assert lower(chain).exists(keys) == get(chain, keys) == [False] * 2


def test_what_came_up_from_below_just_before_it_was_to_go_there_is_written_again(
    chain: Chain,
) -> None:
    """A disk hangs for longer than a clear waits for it, and is read before it forgets."""
    keys, held, forgets = some_keys(1), Held("flush"), Held("index_begin")

    def hook(name: str, offset: int, size: int) -> int:
        held(name, offset, size)
        if held.may_pass.is_set() and current_thread().name == "lmcache-keeper" and commits:
            forgets(name, offset, size)
        if name == "index_committed" and current_thread().name == "lmcache-keeper":
            commits.append(name)
        return 0

    commits: list[str] = []
    with injected(hook):
        put(chain, keys)
        assert held.reached.wait(SOON)
        chain.clear(OWN_NAMESPACE)
        held.may_pass.set()
        assert forgets.reached.wait(SOON)
        assert get(chain, keys) == [True]
        assert upper(chain).exists(keys) == [True]
        forgets.may_pass.set()
        assert chain.flush(SOON)
    assert upper(chain).exists(keys) == lower(chain).exists(keys) == [True]


def test_close_does_not_wait_for_ever_and_memory_keeps_what_waits(
    tiers: TwoTiers, caplog: pytest.LogCaptureFixture
) -> None:
    chain = tiers.open()
    keys = some_keys(5)
    held = Held()
    with injected(held):
        put(chain, keys[:1])
        assert held.reached.wait(SOON)
        put(chain, keys[1:])
        closing_it = Thread(target=chain.close, args=(0.01,))
        closing_it.start()
        until(lambda: "pages still wait to be written" in caplog.text)
        held.may_pass.set()
        closing_it.join(SOON)
    with closing(tiers.open()) as again:
        assert get(again, keys) == [True] * 5
        assert again.flush(SOON)
        assert lower(again).exists(keys) == [True] * 5


def test_threads_over_a_chain_never_see_wrong_bytes(tiers: TwoTiers) -> None:
    """With tiers so small that most reads are promotions, and pages give way in both."""
    keys = some_keys(60)
    with closing(tiers.but(upper_bytes=2 << 20, lower_bytes=3 << 20).open()) as chain:

        def run() -> None:
            for start in range(0, 60, 3):
                some = keys[start : start + 6]
                chain.put(some, EngineMemory([bytes_of(key) for key in some]).segments)
                get(chain, keys[:start:2])

        at_once(*[run] * 4)
        chain.flush(SOON)
        assert all(report.ok for report in chain.check().values())
        assert not any(what.endswith("corrupt") for what in chain.faults.counts())


def test_a_tier_that_delivers_nothing_in_a_fair_time_has_failed_whoever_hurries(
    faulty: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang gives a hanging read up: that is no haste of its."""
    monkeypatch.setattr("lmcache_sglang.storage.chain.FAIR_SECONDS", 0.0)
    keys = some_keys(2)
    faulty.put_below(keys)
    faulty.lower.reads = Lookup.LATE
    memory = EngineMemory.blank([PAGE] * 2)
    cancel = Cancel()
    cancel.set()
    for _ in range(2 * FAILURES):
        limits = Limits.within(1.0, cancel)
        assert not any(faulty.chain.get(keys, memory.segments, limits=limits))
    assert faulty.lower.asked["get"] == FAILURES
    assert faulty.chain.exists(keys) == [False, False]
    assert faulty.chain.faults.counts()["disk.bypassed"] > 0


def test_haste_does_not_heal_a_tier_that_fails(faulty: Faulty) -> None:
    keys = some_keys(2)
    faulty.put_below(keys)
    memory = EngineMemory.blank([PAGE] * 2)
    for _ in range(FAILURES):
        faulty.lower.reads = Lookup.FAILED
        assert not any(faulty.chain.get(keys, memory.segments))
        faulty.lower.reads = Lookup.LATE
        assert not any(faulty.chain.get(keys, memory.segments, limits=Limits.within(0.001)))
    asked = faulty.lower.asked["get"]
    assert not any(faulty.chain.get(keys, memory.segments))
    assert faulty.lower.asked["get"] == asked
