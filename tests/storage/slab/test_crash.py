"""A killed process leaves a whole store behind, at whatever step it died."""

from __future__ import annotations

import random
import time
from itertools import count, islice
from pathlib import Path

import pytest

from lmcache_sglang.storage.slab.settings import Eviction, SlabSettings
from lmcache_sglang.testing import crash_script, hammer
from lmcache_sglang.testing.crash_script import Log
from lmcache_sglang.testing.small_store import SmallStore, put
from lmcache_sglang.testing.store_process import Died, Job, run

CRAMPED = 1 << 20  # the pages of the script do not fit into it
ROOMY = 8 << 20
OPERATIONS = 26
RANDOM_KILLS = 170  # of each kind of store
LONGEST_LIFE = 0.07  # seconds; some die before the store is open
OLDER = 1.1  # by which one may live longer, where too few had done anything
AT_WORK = 0.65  # of those killed that should have; half must
OTHERS_SECONDS = 5.0


@pytest.mark.parametrize("eviction", ["sieve", "s3-fifo", "lru"])
@pytest.mark.parametrize("memory", [True, False])
def test_no_step_is_a_bad_one_to_die_at(
    shared_memory: Path, memory: bool, eviction: Eviction
) -> None:
    store = SmallStore(
        shared_memory / "store", memory, CRAMPED, SlabSettings(eviction=eviction, seconds=5)
    )
    run(crash_script.fill, store, 1)
    saved = store.save()
    script = list(islice(crash_script.operations(2), OPERATIONS))
    log = Log(shared_memory / "log")

    def attempt(step: int) -> bool:
        store.restore(saved)
        log.begin(script[0])
        try:
            run(crash_script.run, store, script, log, step)
        except Died:
            return True
        return False

    assert not attempt(0)
    states = log.states()
    assert len(states) == OPERATIONS + 1
    kills = 0
    for step in count(1):
        if not attempt(step):
            break
        kills += 1
        told = log.states()
        assert told == states[: len(told)]
        before = states[max(len(told) - 1, 0)]
        after = states[len(told)]
        seen = run(crash_script.look, store)
        assert (seen.problems, seen.not_whole, seen.reserved, seen.works) == ([], set(), 0, True), (
            step
        )
        assert before & after <= seen.here <= before | after, step
    assert kills > 150


@pytest.mark.parametrize(("memory", "durable"), [(True, True), (False, True), (False, False)])
def test_a_kill_at_any_moment_loses_no_page_that_was_reported_stored(
    shared_memory: Path, tmp_path: Path, memory: bool, durable: bool
) -> None:
    """One store, killed over and over, also while it is made and opened; on a real disk if not in memory."""
    where = shared_memory if memory else tmp_path
    store = SmallStore(where / "store", memory, ROOMY, SlabSettings(durable=durable))
    log, rng = Log(shared_memory / "log"), random.Random(f"{memory} {durable}")
    expected, at_work, longest = set[int](), 0, LONGEST_LIFE
    for number in range(RANDOM_KILLS):
        log.begin(("get", []))
        job = Job(crash_script.work_for_ever, store, number, log)
        time.sleep(rng.random() * longest)
        job.kill()
        told = log.states()
        if told:
            expected = told[-1]
            at_work += 1
        elif at_work < number * AT_WORK:  # the machine is busy
            longest *= OLDER
        lost, come = crash_script.changed_by(log.intent())
        seen = run(crash_script.look, store)
        assert (seen.problems, seen.not_whole, seen.reserved, seen.works) == ([], set(), 0, True)
        assert expected - lost <= seen.here <= expected | come
        expected = seen.here
    assert expected
    assert at_work > RANDOM_KILLS / 2, "most were killed before they had done anything"


def test_the_others_go_on_while_one_after_the_other_is_killed(shared_memory: Path) -> None:
    """It may die with the mutex, or LMDB's lock, or a reader's place in its hands."""
    store = SmallStore(shared_memory / "store", True, CRAMPED, SlabSettings(seconds=5))
    with store.opened() as tier:
        others = [Job(hammer.run, store, seed, OTHERS_SECONDS) for seed in range(2)]
        rng, kills, end = random.Random(5), 0, time.monotonic() + OTHERS_SECONDS
        while time.monotonic() < end:
            victim = Job(hammer.run, store, 100 + kills, 60.0)
            time.sleep(0.02 + rng.random() * 0.06)
            victim.kill()
            kills += 1
            assert put(tier, [8], [b""])[0].kept
        done = [other.result() for other in others]
        tier.sweep()
        report = tier.check()
        assert report.ok, report
        assert tier.counts()["reserved"] == 0
    assert kills > 20
    for each in done:
        assert each.operations > 50
        assert each.busy == 0
        assert each.slowest < 5
