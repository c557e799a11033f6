"""Several processes on one store: right bytes, no limit exceeded, and nobody waits for a stopped one."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from pathlib import Path
from threading import Event, Thread

import pytest

from lmcache_sglang.errors import Reason, TierError
from lmcache_sglang.storage.base import Lookup, Stored
from lmcache_sglang.storage.slab.settings import Eviction, SlabSettings
from lmcache_sglang.testing import crash_script, hammer
from lmcache_sglang.testing.injection import UNDER_THE_MUTEX
from lmcache_sglang.testing.small_store import SmallStore, get, here, put
from lmcache_sglang.testing.store_process import Job, run

CRAMPED = 1 << 20
ROOMY = 4 << 20
SECONDS = 1.2
SHARE = 0.01  # of the steps, where storage fails


class Meter:
    """Looks all the time at what a store takes of its medium."""

    def __init__(self, store: SmallStore) -> None:
        self._store = store
        self._ended = Event()
        self._thread = Thread(target=self._measure, daemon=True)
        self.most = self.looks = 0
        self._thread.start()

    def _measure(self) -> None:
        while not self._ended.wait(0.002):
            if self._store.directory.is_dir():
                self.most = max(self.most, self._store.allocated())
                self.looks += 1

    def end(self) -> None:
        self._ended.set()
        self._thread.join()


@pytest.mark.parametrize("eviction", ["sieve", "s3-fifo", "lru"])
@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("processes", [2, 8])
def test_processes_that_hammer_one_store_see_right_bytes_and_exceed_no_limit(
    shared_memory: Path, processes: int, memory: bool, eviction: Eviction
) -> None:
    """With pages of many sizes, so that slabs change hands, and twice as many as fit."""
    settings = SlabSettings(eviction=eviction)
    store = SmallStore(shared_memory / "store", memory, CRAMPED, settings)
    meter = Meter(store)
    jobs = [Job(hammer.run, store, seed, SECONDS) for seed in range(processes)]
    done = [job.result() for job in jobs]
    meter.end()
    assert 0 < meter.most <= CRAMPED, "the store takes more than it was given"
    assert meter.looks > 100
    with store.opened() as tier:
        report = tier.check()
        assert report.ok, report
        assert tier.counts()["reserved"] == 0
    for each in done:
        assert each.busy == 0
        assert each.operations > 20
        assert each.outcomes["hit"] > 0 < each.outcomes["stored"]


def require_whole(store: SmallStore) -> None:
    """As the next process finds it."""
    seen = run(crash_script.look, store)
    assert (seen.problems, seen.not_whole, seen.reserved, seen.works) == ([], set(), 0, True), seen


@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("processes", [2, 8])
def test_processes_whose_storage_keeps_failing_do_one_another_no_harm(
    shared_memory: Path, processes: int, memory: bool
) -> None:
    """What an error left half done in one of them is mended by whichever comes next, beside the others."""
    store = SmallStore(shared_memory / "store", memory, CRAMPED)
    with store.opened() as tier:
        seconds = 2 * SECONDS
        jobs = [Job(hammer.run_flaky, store, seed, seconds, SHARE) for seed in range(processes)]
        done = [job.result() for job in jobs]
        report = tier.check()
        assert report.ok, report
        assert tier.counts()["reserved"] == 0
    require_whole(store)
    errors = sum((each.errors for each in done), Counter[str]())
    assert errors["io"] > 0 < errors["full"]
    for each in done:
        assert each.busy == 0
        assert each.operations > 20
        assert each.outcomes["hit"] > 0 < each.outcomes["stored"]


@pytest.mark.parametrize("memory", [True, False])
def test_kills_among_processes_whose_storage_keeps_failing_do_no_harm(
    shared_memory: Path, memory: bool
) -> None:
    store = SmallStore(shared_memory / "store", memory, CRAMPED)
    seconds = 3 * SECONDS
    with store.opened() as tier:
        others = [Job(hammer.run_flaky, store, seed, seconds, SHARE) for seed in range(2)]
        rng, kills, end = random.Random(6), 0, time.monotonic() + seconds
        while time.monotonic() < end:
            victim = Job(hammer.run_flaky, store, 100 + kills, 60.0, SHARE)
            time.sleep(0.02 + rng.random() * 0.06)  # any moment will do
            victim.kill()
            kills += 1
        done = [other.result() for other in others]
        tier.sweep()
        report = tier.check()
        assert report.ok, report
        assert tier.counts()["reserved"] == 0
    require_whole(store)
    assert kills > 10
    for each in done:
        assert each.operations > 20
        assert each.busy == 0
        assert each.errors.total() > 0


def test_a_page_that_one_process_put_is_there_for_the_others(shared_memory: Path) -> None:
    store = SmallStore(shared_memory / "store", True, ROOMY)
    with store.opened() as tier:
        assert run(hammer.put_all, store, list(range(20))) == ["stored"] * 20
        assert get(tier, range(20)) == [Lookup.HIT] * 20
        assert put(tier, range(25), [b""] * 25) == [Stored.PRESENT] * 20 + [Stored.STORED] * 5


STOPS = ["reserve", "write", "flush", "publish", "index_begin", "index_commit", "index_committed"]


@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("step", STOPS)
def test_a_stopped_process_keeps_nobody_waiting(
    shared_memory: Path, step: str, memory: bool
) -> None:
    """With the mutex in its hands the others cannot change anything, and say so; else they go on."""
    if memory and step == "flush":
        pytest.skip("memory is not flushed")
    store = SmallStore(shared_memory / "store", memory, ROOMY, SlabSettings(seconds=0.3))
    with store.opened() as tier:
        put(tier, range(10), [b""] * 10)
        job = Job(hammer.put_and_stop, store, [10, 11, 12], step)
        job.wait_until_stopped()
        for number in (20, 21):
            started = time.monotonic()
            assert get(tier, range(10)) == [Lookup.HIT] * 10
            if step in UNDER_THE_MUTEX:
                with pytest.raises(TierError) as caught:
                    put(tier, [number])
                assert caught.value.reason is Reason.BUSY
            else:
                assert put(tier, [number]) == [Stored.STORED]
            assert time.monotonic() - started < 3
        job.signal(signal.SIGCONT)
        outcome = job.result()
        assert set(outcome) <= {"stored", "late"}
        kept = {n for n, one in zip([10, 11, 12], outcome, strict=True) if one == "stored"}
        assert here(tier, [10, 11, 12]) == kept
        assert all(stored.kept for stored in put(tier, [20, 21, 10, 11, 12]))
        report = tier.check()
        assert report.ok, report
        assert tier.counts()["reserved"] == 0


@pytest.mark.parametrize("step", STOPS)
def test_a_stopped_process_that_is_killed_leaves_all_to_the_others(
    shared_memory: Path, step: str
) -> None:
    store = SmallStore(shared_memory / "store", False, ROOMY, SlabSettings(seconds=0.5))
    with store.opened() as tier:
        put(tier, range(10), [b""] * 10)
        job = Job(hammer.put_and_stop, store, [10, 11, 12], step)
        job.wait_until_stopped()
        if step not in UNDER_THE_MUTEX:
            assert tier.counts()["reserved"] == 3
            assert tier.sweep() == 0, "what a stopped process holds is its own"
        job.kill()
        assert put(tier, [10]) == [Stored.PRESENT if step == "index_committed" else Stored.STORED]
        tier.sweep()
        report = tier.check()
        assert report.ok, report
        assert tier.counts()["reserved"] == 0
        assert get(tier, range(11)) == [Lookup.HIT] * 11


def test_a_process_that_is_killed_in_a_long_look_does_not_fill_the_index(
    shared_memory: Path,
) -> None:
    """LMDB uses no page again that a snapshot may see, and believes that a dead one's still does."""
    store = SmallStore(shared_memory / "store", True, CRAMPED)
    with store.opened() as tier:
        put(tier, range(60), [b""] * 60)
        for _ in range(8):
            job = Job(hammer.check_for_ever, store)
            time.sleep(0.1)
            job.kill()
            for first in range(100, 400, 4):
                put(tier, range(first, first + 4), [b""] * 4)
        assert tier.check().ok
