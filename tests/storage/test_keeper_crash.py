"""A process with both tiers and the background work is killed: whoever comes next has all that was stored,
and finishes what the killed one had under way."""

from __future__ import annotations

import random
import shutil
import time
from contextlib import closing
from pathlib import Path
from typing import get_args

import pytest

from lmcache_sglang.storage import keeper as keeper_module
from lmcache_sglang.storage.admission import All, Mode
from lmcache_sglang.testing.crash_script import Log
from lmcache_sglang.testing.engine import until
from lmcache_sglang.testing.store_process import Died, Job, run
from lmcache_sglang.testing.two_tiers import (
    Left,
    TwoTiers,
    finish,
    get,
    keys_of,
    promote_put_and_flush,
    put_and_flush,
    reserved,
    take_over,
    work_for_ever,
)

SIZE = 4 << 20  # of each tier: all pages have room in either
BELOW = range(6)  # in the lower tier only, before
NEW = range(6, 24)
ALL = range(24)
RANDOM_KILLS = 60
HEIRS = 20
LONGEST_LIFE = 0.1  # seconds
OLDER = 1.05  # by which one may live longer than one who had stored nothing: the machine is busy

modes = pytest.mark.parametrize("mode", get_args(Mode))


def require_whole(left: Left, stored: set[int]) -> None:
    assert left.problems == []
    assert left.reserved == 0
    assert left.waiting == (0, 0)
    assert left.faults == {}
    assert stored <= left.here
    assert left.held == left.below == left.alone == left.here


def stored_by(log: Log) -> set[int]:
    """What a killed process of `work_for_ever` must have left."""
    in_a_clear = log.intent()[0] == "clear"
    return set() if in_a_clear else set[int]().union(*log.states())


def asked(mode: Mode) -> bool:
    """Write-back leaves pages where they are until they are to go, unless it is asked."""
    return mode == "write-back"


@modes
def test_no_step_of_a_chain_is_a_bad_one_to_die_at(shared_memory: Path, mode: Mode) -> None:
    """Of the caller's thread or of the keeper's, in either tier."""
    # both in memory: what a killed process wrote is there all the same, and hundreds of files are fast
    tiers = TwoTiers(shared_memory / "cpu", shared_memory / "disk", SIZE, SIZE, All(mode))
    assert run(put_and_flush, tiers, keys_of(BELOW))
    shutil.rmtree(shared_memory / "cpu")
    tiers.open().close()
    saved = [store.save() for store in tiers.files()]
    log = Log(shared_memory / "log")

    def attempt(step: int) -> int | None:
        """How many steps there were; None when it was killed."""
        for store, content in zip(tiers.files(), saved, strict=True):
            store.restore(content)
        log.begin(("put", []))
        try:
            return run(promote_put_and_flush, tiers, BELOW, NEW, log, step)
        except Died:
            return None

    steps = attempt(0)
    assert steps is not None
    kills = 0
    for step in range(1, steps + 1):
        kills += attempt(step) is None
        stored = set(BELOW).union(*log.states())
        left = run(take_over, tiers, ALL, asked=asked(mode))
        require_whole(left, stored)
    assert kills > 50
    assert kills > 0.8 * steps  # the threads do not meet alike each time


@modes
def test_a_kill_at_any_moment_loses_no_page_of_a_chain(
    tiers: TwoTiers, tmp_path: Path, mode: Mode
) -> None:
    """The same two tiers over and over, on a real disk; also while they are made and opened."""
    tiers = tiers.but(upper_bytes=SIZE, lower_bytes=SIZE, admission=All(mode))
    log, rng = Log(tmp_path / "log"), random.Random(mode)
    found, told, longest = set[int](), 0, LONGEST_LIFE
    for number in range(RANDOM_KILLS):
        log.begin(("work", []))
        job = Job(work_for_ever, tiers, number, ALL, log)
        time.sleep(rng.random() * longest)  # any moment will do
        job.kill()
        stored = stored_by(log)
        told += len(stored)
        longest *= 1.0 if stored else OLDER
        if log.intent()[0] == "work":  # nothing was cleared
            stored |= found
        left = run(take_over, tiers, ALL, asked=asked(mode))
        require_whole(left, stored)
        found = left.here
    assert told > RANDOM_KILLS


@modes
def test_a_living_process_finishes_what_a_killed_one_had_under_way(
    tiers: TwoTiers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Mode
) -> None:
    """Which holds slots of the dead one's, and pages that were on their way below."""
    monkeypatch.setattr(keeper_module, "LOOK_SECONDS", 0.02)  # between looks at the lock
    tiers = tiers.but(upper_bytes=SIZE, lower_bytes=SIZE, admission=All(mode))
    log, rng = Log(tmp_path / "log"), random.Random(mode)
    for number in range(HEIRS):
        log.begin(("work", []))
        job = Job(work_for_ever, tiers, number, ALL, log)
        until(lambda: bool(log.states()))
        with closing(tiers.open()) as chain:
            time.sleep(rng.random() * LONGEST_LIFE)  # any moment will do
            job.kill()
            stored = sorted(stored_by(log))
            finish(chain, asked=asked(mode))
            assert get(chain, keys_of(stored)) == [True] * len(stored)
            assert chain.tiers[1].exists(keys_of(stored)) == [True] * len(stored)
            assert reserved(chain) == 0
            assert all(report.ok for report in chain.check().values())
            assert chain.waiting() == (0, 0)
            assert chain.faults.counts() == {}
