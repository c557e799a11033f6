"""The tiers as one store: what is lost where, what heals, and that no tier's failure comes through."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from threading import Thread

import pytest

from lmcache_sglang.errors import Reason, TierError
from lmcache_sglang.storage import chain as chain_module
from lmcache_sglang.storage import faults as faults_module
from lmcache_sglang.storage.base import Tier
from lmcache_sglang.storage.chain import Chain
from lmcache_sglang.storage.cpu import CpuTier
from lmcache_sglang.storage.disk.tier import DiskTier
from lmcache_sglang.storage.memory import MemoryTier
from lmcache_sglang.storage.spill import Spill
from lmcache_sglang.testing.damage import flip_in_cpu, flip_on_disk
from lmcache_sglang.testing.faulty_tier import FaultyTier
from lmcache_sglang.testing.tier_suite import (
    OTHER_NAMESPACE,
    PAGE,
    ROOMY,
    EngineMemory,
    a_key,
    at_once,
    bytes_of,
    some_keys,
    write,
)

SPILL = 8 << 20
SOON = 30.0  # longer than anything here takes, shorter than a person waits


def put(chain: Chain, keys: Sequence[bytes]) -> list[bool]:
    memory = EngineMemory([bytes_of(key) for key in keys], 2)
    kept = chain.put(keys, memory.segments)
    assert chain.exists(keys) == kept
    return kept


def get(chain: Chain, keys: Sequence[bytes]) -> list[bool]:
    memory = EngineMemory.blank([PAGE] * len(keys), 3)
    held = chain.get(keys, memory.segments)
    for i, key in enumerate(keys):
        if held[i]:
            assert memory.page(i) == bytes_of(key)
        else:
            assert memory.is_blank(i)
    assert memory.guards_hold()
    return held


class Stack:
    """An upper tier over a lower one that can be told to fail or to wait."""

    def __init__(self, lower: Tier, upper_bytes: int = ROOMY, spill_bytes: int = SPILL) -> None:
        self.upper = CpuTier(upper_bytes)
        self.lower = FaultyTier(lower)
        self.chain = Chain(self.upper, self.lower, spill_bytes=spill_bytes)

    def put_and_flush(self, keys: Sequence[bytes]) -> None:
        assert put(self.chain, keys) == [True] * len(keys)
        assert self.chain.flush(SOON)

    def forget_above(self, keys: Sequence[bytes]) -> None:
        self.upper.remove(keys)
        assert not any(self.upper.exists(keys))


@pytest.fixture
def stack() -> Iterator[Stack]:
    """Over a plain lower tier."""
    stack = Stack(MemoryTier(ROOMY))
    with closing(stack.chain):
        yield stack


@pytest.fixture
def disk(tmp_path: Path) -> DiskTier:
    return DiskTier(tmp_path, ROOMY)


@pytest.fixture
def disk_stack(disk: DiskTier) -> Iterator[Stack]:
    stack = Stack(disk)
    with closing(stack.chain):
        yield stack


# One store, whatever the tiers.

Opener = Callable[[], Chain]


@pytest.fixture(params=["cpu+disk", "disk", "cpu"])
def open_chain(request: pytest.FixtureRequest, tmp_path: Path) -> Opener:
    kinds = str(request.param).split("+")

    def opened() -> Chain:
        upper = CpuTier(ROOMY) if "cpu" in kinds else None
        lower = DiskTier(tmp_path / "store", ROOMY) if "disk" in kinds else None
        return Chain(upper, lower, spill_bytes=SPILL)

    return opened


def test_pages_come_back_and_others_miss(open_chain: Opener) -> None:
    a, b, c, d = some_keys(4)
    with closing(open_chain()) as chain:
        assert put(chain, [a, c]) == [True, True]
        assert chain.exists([a, b, c, d]) == [True, False, True, False]
        assert get(chain, [d, c, b, a]) == [False, True, False, True]
        assert put(chain, [a, b]) == [True, True]
        assert chain.faults.counts() == {}


def test_prefix_ends_at_the_first_gap(open_chain: Opener) -> None:
    keys = some_keys(6)
    with closing(open_chain()) as chain:
        assert chain.prefix(keys) == 0
        put(chain, keys[:3] + keys[4:])
        assert chain.prefix(keys) == 3
        assert chain.prefix(keys[:3]) == 3
        assert chain.prefix([]) == 0


def test_what_was_put_outlives_close_and_reopen(open_chain: Opener) -> None:
    """Without a flush: closing writes what still waits."""
    keys = some_keys(40)
    with closing(open_chain()) as chain:
        put(chain, keys)
        outlives = any(isinstance(tier, DiskTier) for tier in chain.tiers)
    with closing(open_chain()) as chain:
        assert get(chain, keys) == [outlives] * 40
        assert all(report.ok for report in chain.check().values())


def test_clear_forgets_one_namespace_in_every_tier(open_chain: Opener) -> None:
    ours, theirs = some_keys(4), [a_key(number, OTHER_NAMESPACE) for number in range(3)]
    with closing(open_chain()) as chain:
        put(chain, ours + theirs)
        assert chain.clear(OTHER_NAMESPACE) == 3
        assert get(chain, ours + theirs) == [True] * 4 + [False] * 3
    with closing(open_chain()) as chain:
        assert not any(chain.exists(theirs))


def test_a_closed_chain_misses_and_raises_nothing(open_chain: Opener) -> None:
    chain = open_chain()
    put(chain, some_keys(2))
    chain.close()
    chain.close()
    assert get(chain, some_keys(2)) == [False, False]
    assert put(chain, some_keys(2)) == [False, False]
    assert chain.clear(OTHER_NAMESPACE) == 0
    assert chain.stats() == []
    assert chain.faults.counts()[f"{chain.tiers[0].name}.closed"] >= 3


def test_unequal_counts_are_the_callers_mistake(open_chain: Opener) -> None:
    one = EngineMemory([bytes_of(a_key(0))])
    with closing(open_chain()) as chain:
        with pytest.raises(ValueError, match="2 keys but 1 pages"):
            chain.put(some_keys(2), one.segments)
        with pytest.raises(ValueError, match="2 keys but 1 pages"):
            chain.get(some_keys(2), one.segments)


def test_a_chain_of_nothing_is_the_callers_mistake() -> None:
    with pytest.raises(ValueError, match="needs a tier"):
        Chain(None)


# Down, and up again.


def test_every_page_reaches_the_lower_tier(stack: Stack) -> None:
    keys = some_keys(10)
    stack.put_and_flush(keys)
    assert stack.lower.exists(keys) == [True] * 10
    assert stack.chain.waiting() == (0, 0)


def test_a_batch_larger_than_the_upper_tier_reaches_the_lower_one(disk: DiskTier) -> None:
    stack = Stack(disk, upper_bytes=6 * PAGE)
    keys = some_keys(40)
    with closing(stack.chain) as chain:
        memory = EngineMemory([bytes_of(key) for key in keys])
        assert chain.put(keys, memory.segments) == [True] * 40
        assert chain.flush(SOON)
        assert disk.exists(keys) == [True] * 40
        assert get(chain, keys) == [True] * 40


def test_a_hit_below_goes_up_and_not_down_again(stack: Stack) -> None:
    keys = some_keys(3)
    stack.put_and_flush(keys)
    stack.forget_above(keys)
    assert get(stack.chain, keys) == [True] * 3
    assert stack.upper.exists(keys) == [True] * 3
    put(stack.chain, keys)
    assert stack.chain.flush(SOON)
    assert stack.lower.puts == [keys]


def test_a_page_that_the_lower_tier_lost_is_sent_again(stack: Stack) -> None:
    keys = some_keys(3)
    stack.put_and_flush(keys)
    stack.lower.remove(keys[1:2])
    stack.put_and_flush(keys)
    assert stack.lower.exists(keys) == [True] * 3
    assert stack.lower.puts == [keys, keys[1:2]]


def test_a_page_on_its_way_down_is_a_hit(stack: Stack) -> None:
    keys = some_keys(3)
    with stack.lower.hold_puts():
        put(stack.chain, keys[:1])
        assert stack.lower.holding.wait(SOON)  # the first is in the writer's hands, two wait
        put(stack.chain, keys[1:])
        stack.forget_above(keys)
        assert stack.chain.waiting() == (3, 3 * PAGE)
        assert stack.chain.exists(keys) == [True] * 3
        assert get(stack.chain, keys) == [True] * 3
        assert not stack.chain.flush(0.0)
    assert stack.chain.flush(SOON)
    assert stack.lower.exists(keys) == [True] * 3


def test_the_callers_memory_is_free_once_put_returns(stack: Stack) -> None:
    (key,) = some_keys(1)
    memory = EngineMemory([bytes_of(key)])
    with stack.lower.hold_puts():
        stack.chain.put([key], memory.segments)
        memory.reuse()
    assert stack.chain.flush(SOON)
    stack.forget_above([key])
    assert get(stack.chain, [key]) == [True]


# A lower tier that is slower than its pages come.


def test_a_slow_lower_tier_costs_its_deadline_and_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chain_module, "PUT_SECONDS", 0.01)
    stack = Stack(MemoryTier(ROOMY), spill_bytes=2 * PAGE)
    keys = some_keys(5)
    with closing(stack.chain):
        with stack.lower.hold_puts():
            assert put(stack.chain, keys) == [True] * 5  # the upper tier has them
            assert stack.chain.waiting() == (2, 2 * PAGE)
        assert stack.chain.faults.counts() == {"memory.busy": 3}
        assert stack.chain.flush(SOON)
        assert stack.lower.exists(keys) == [True, True, False, False, False]
        stack.put_and_flush(keys[2:4])
        assert stack.lower.exists(keys) == [True] * 4 + [False]


def test_a_lower_tier_that_stands_still_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain_module, "PUT_SECONDS", 0.01)
    stack = Stack(MemoryTier(ROOMY), spill_bytes=PAGE)
    with closing(stack.chain):
        with stack.lower.hold_puts():
            put(stack.chain, some_keys(2))
            monkeypatch.setattr(chain_module, "PUT_SECONDS", SOON)
            begun = time.monotonic()
            assert put(stack.chain, some_keys(2, start=10)) == [True] * 2
            assert time.monotonic() - begun < SOON / 2
        assert stack.chain.flush(SOON)
        stack.put_and_flush(some_keys(1, start=20))  # it moves again, and is waited for again
        assert stack.lower.exists(some_keys(1, start=20)) == [True]


def test_a_put_waits_for_room_on_the_way_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain_module, "PUT_SECONDS", SOON)
    stack = Stack(MemoryTier(ROOMY), spill_bytes=PAGE)
    keys = some_keys(6)
    with closing(stack.chain):
        producer = Thread(target=put, args=(stack.chain, keys))
        with stack.lower.hold_puts():
            producer.start()
            assert stack.lower.holding.wait(SOON)
            assert stack.chain.waiting() == (1, PAGE)
        producer.join(SOON)
        assert stack.chain.flush(SOON)
        assert stack.lower.exists(keys) == [True] * 6
        assert stack.chain.faults.counts() == {}


def test_a_page_larger_than_the_way_down_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain_module, "PUT_SECONDS", SOON)
    stack = Stack(MemoryTier(ROOMY), spill_bytes=PAGE - 1)
    with closing(stack.chain):
        before = time.monotonic()
        assert put(stack.chain, some_keys(2)) == [True, True]
        assert time.monotonic() - before < SOON / 2
        assert stack.chain.faults.counts() == {"memory.busy": 2}


# Tiers that fail.


@pytest.mark.parametrize("reason", Reason)
def test_a_failing_lower_tier_is_misses_and_a_count(stack: Stack, reason: Reason) -> None:
    below, new = some_keys(2), some_keys(2, start=10)
    stack.put_and_flush(below)
    stack.forget_above(below)
    stack.lower.failing = reason
    assert get(stack.chain, below) == [False, False]
    assert put(stack.chain, new) == [True, True]
    assert stack.chain.flush(SOON)
    assert get(stack.chain, new) == [True, True]
    assert stack.chain.clear(OTHER_NAMESPACE) == 0
    assert [stats.name for stats in stack.chain.stats()] == ["cpu"]
    assert set(stack.chain.faults.counts()) == {f"memory.{reason.value}"}
    assert stack.chain.faults.counts()[f"memory.{reason.value}"] >= 5
    stack.lower.failing = None
    assert get(stack.chain, below) == [True, True]
    stack.put_and_flush(new)
    assert stack.lower.exists(new) == [True, True]


@pytest.mark.parametrize("call", ["exists", "get", "put", "lease", "remove", "clear", "stats"])
def test_a_failing_upper_tier_is_misses_and_a_count(
    stack: Stack, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise TierError("cpu", Reason.FULL, "told to fail")

    keys = some_keys(2)
    stack.put_and_flush(keys)
    flip_in_cpu(stack.upper, keys[0])
    monkeypatch.setattr(stack.upper, call, fail)
    assert stack.chain.exists(keys) == [True, True]
    assert get(stack.chain, keys) == [True, True]
    new = EngineMemory([bytes_of(a_key(9))])
    kept = stack.chain.put([a_key(9)], new.segments)
    assert kept == [call != "put"]
    stack.chain.clear(OTHER_NAMESPACE)
    stack.chain.stats()
    assert stack.chain.faults.counts()["cpu.full"] >= 1


def test_a_failing_tier_logs_one_line_a_minute(
    stack: Stack, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack.lower.failing = Reason.IO
    with caplog.at_level(logging.DEBUG):
        for _ in range(50):
            get(stack.chain, some_keys(1))
        (line,) = caplog.messages
        assert "memory tier: io: told to fail" in line
        assert "(1 since the last message, 1 in all)" in line
        caplog.clear()
        monkeypatch.setattr(faults_module, "LOG_EVERY_SECONDS", 0.0)
        get(stack.chain, some_keys(1))
        (line,) = caplog.messages
        assert "(50 since the last message, 51 in all)" in line
        caplog.clear()
        monkeypatch.setattr(faults_module, "LOG_EVERY_SECONDS", 60.0)
        stack.lower.failing = Reason.BUSY  # another kind has a line of its own
        get(stack.chain, some_keys(1))
        assert len(caplog.messages) == 1


def test_a_check_that_fails_is_not_a_miss(stack: Stack) -> None:
    stack.lower.failing = Reason.CORRUPT
    with pytest.raises(TierError):
        stack.chain.check()


def test_no_room_in_a_tier_is_counted() -> None:
    stack = Stack(MemoryTier(2 * PAGE), upper_bytes=4 * PAGE)
    with closing(stack.chain) as chain:
        stack.put_and_flush(some_keys(4))
        assert chain.faults.counts() == {"memory.refused": 2}
        large = EngineMemory([bytes(5 * PAGE)])
        assert chain.put([a_key(99)], large.segments) == [False]
        assert chain.faults.counts() == {"cpu.refused": 1, "memory.refused": 2}
        assert chain.fits(PAGE) == []
        assert chain.fits(3 * PAGE) == [stack.lower]
        assert chain.fits(5 * PAGE) == [stack.upper, stack.lower]


# Damage.


def test_damage_below_is_a_miss_that_the_next_put_heals(disk_stack: Stack, disk: DiskTier) -> None:
    keys = some_keys(3)
    disk_stack.put_and_flush(keys)
    disk_stack.forget_above(keys)
    assert flip_on_disk(disk, keys[1])
    assert get(disk_stack.chain, keys) == [True, False, True]
    assert disk_stack.chain.faults.counts() == {"disk.corrupt": 1}
    assert disk.exists(keys) == [True, False, True]
    disk_stack.put_and_flush(keys)
    disk_stack.forget_above(keys)
    assert get(disk_stack.chain, keys) == [True] * 3
    assert disk.check().ok


def test_damage_above_is_served_from_below_and_healed(disk_stack: Stack) -> None:
    keys = some_keys(3)
    disk_stack.put_and_flush(keys)
    assert flip_in_cpu(disk_stack.upper, keys[1])
    assert get(disk_stack.chain, keys) == [True] * 3
    assert disk_stack.chain.faults.counts() == {"cpu.corrupt": 1}
    assert disk_stack.upper.check().ok
    assert disk_stack.upper.exists(keys) == [True] * 3


def test_damage_on_the_way_down_is_not_served_and_not_kept(disk_stack: Stack) -> None:
    keys = some_keys(3)
    with disk_stack.lower.hold_puts():
        put(disk_stack.chain, keys[:1])
        assert disk_stack.lower.holding.wait(SOON)
        put(disk_stack.chain, keys[1:])
        for key in keys[:2]:  # one in the writer's hands, one that waits
            assert flip_in_cpu(disk_stack.upper, key)  # the same bytes wait in the spill
        assert get(disk_stack.chain, keys) == [False, False, True]
    assert disk_stack.chain.flush(SOON)
    assert disk_stack.lower.exists(keys) == [False, False, True]
    assert disk_stack.lower.check().ok
    counts = disk_stack.chain.faults.counts()
    assert counts == {"cpu.corrupt": 2, "disk.refused": 1, "spill.corrupt": 2}


def test_check_speaks_for_each_tier(disk_stack: Stack, disk: DiskTier) -> None:
    keys = some_keys(3)
    disk_stack.put_and_flush(keys)
    flip_in_cpu(disk_stack.upper, keys[0])
    flip_on_disk(disk, keys[1])
    reports = disk_stack.chain.check(repair=True)
    assert {name: report.corrupt for name, report in reports.items()} == {
        "cpu": [keys[0]],
        "disk": [keys[1]],
    }
    assert all(report.ok for report in disk_stack.chain.check().values())
    assert get(disk_stack.chain, keys) == [True] * 3


# Clearing and closing while pages are on their way.


def test_cleared_pages_do_not_come_back_from_the_way_down(stack: Stack) -> None:
    ours, theirs = some_keys(2), [a_key(number, OTHER_NAMESPACE) for number in range(2)]
    clearing = Thread(target=stack.chain.clear, args=(OTHER_NAMESPACE,))
    with stack.lower.hold_puts():
        put(stack.chain, theirs[:1])
        assert stack.lower.holding.wait(SOON)  # this one is being written while it is cleared
        put(stack.chain, ours + theirs[1:])
        clearing.start()
    clearing.join(SOON)
    assert not clearing.is_alive()
    assert stack.chain.flush(SOON)
    assert get(stack.chain, ours + theirs) == [True, True, False, False]
    assert stack.lower.exists(ours + theirs) == [True, True, False, False]


def test_close_does_not_wait_for_ever(caplog: pytest.LogCaptureFixture) -> None:
    stack = Stack(MemoryTier(ROOMY))
    with stack.lower.hold_puts():
        put(stack.chain, some_keys(1))
        assert stack.lower.holding.wait(SOON)
        put(stack.chain, some_keys(4, start=1))
        stack.chain.close(timeout=0.01)
    assert any("4 pages were not written" in line for line in caplog.messages)


def test_threads_over_a_chain_never_see_wrong_bytes(disk: DiskTier) -> None:
    """With an upper tier so small that most reads are promotions."""
    stack = Stack(disk, upper_bytes=8 * PAGE, spill_bytes=4 * PAGE)
    keys = some_keys(24)
    with closing(stack.chain) as chain:

        def run() -> None:
            for start in range(0, 24, 3):
                some = keys[start : start + 6]
                chain.put(some, EngineMemory([bytes_of(key) for key in some]).segments)
                get(chain, keys[:start:2])

        at_once(*[run] * 4)
        assert chain.flush(SOON)
        assert all(report.ok for report in chain.check().values())
        assert not any(what.endswith("corrupt") for what in chain.faults.counts())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_mistake_in_a_lower_tier_holds_nobody_up(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is no `TierError` ends the thread that writes, and nothing else."""

    def fail(*args: object) -> None:
        raise ZeroDivisionError("a mistake")

    monkeypatch.setattr(stack.lower, "put", fail)
    monkeypatch.setattr(chain_module, "PUT_SECONDS", SOON)
    assert put(stack.chain, some_keys(2)) == [True, True]
    assert not stack.chain.flush(SOON)  # it would be a lie: nothing was written
    assert put(stack.chain, some_keys(4)) == [True] * 4
    assert stack.chain.faults.counts() == {"memory.closed": 4}
    assert get(stack.chain, some_keys(4)) == [True] * 4


def test_nothing_is_taken_on_the_way_down_once_it_is_closed() -> None:
    """It would never be written, and would count as here."""
    upper, lower = CpuTier(ROOMY), MemoryTier(ROOMY)
    write(upper, some_keys(2))
    spill = Spill(lower, SPILL, on_error=lambda error: None, on_refused=lambda pages: None)
    spill.close(SOON)
    assert spill.offer(upper.lease(some_keys(2)), SOON) == 0
    assert spill.exists(some_keys(2)) == [False, False]
    assert spill.waiting == (0, 0)
