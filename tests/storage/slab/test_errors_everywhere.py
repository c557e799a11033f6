"""A process goes on after an error at any step: nothing is damaged, leaked or in the way from then on."""

from __future__ import annotations

import errno
import random
from itertools import islice
from pathlib import Path

import pytest

from lmcache_sglang.storage.slab.settings import Eviction, SlabSettings
from lmcache_sglang.testing import crash_script
from lmcache_sglang.testing.crash_script import Errors
from lmcache_sglang.testing.injection import INDEX_FULL, MAY_BE_FULL
from lmcache_sglang.testing.small_store import SmallStore
from lmcache_sglang.testing.store_process import Job, run

CRAMPED = 1 << 20  # the pages of the script do not fit into it, so slabs change hands
OPERATIONS = 26
ERRORS = (errno.EIO, errno.ENOSPC)
AT_ONCE = 2  # processes, each with a store of its own
LONG = 20  # steps: more than the attempts of one operation have
NEAR = 4  # steps: an error within them strikes what mends the first one


def go_on(store: SmallStore, seed: int, trials: list[Errors]) -> list[list[str]]:
    """The names of the steps that each trial had."""
    script = list(islice(crash_script.operations(seed), OPERATIONS))
    saved = store.save()
    jobs = []
    for i in range(AT_ONCE):
        other = store.elsewhere(store.directory.with_name(f"store-{i}"))
        jobs.append(Job(crash_script.go_on_despite, other, saved, script, trials[i::AT_ONCE]))
    return [names for job in jobs for names in job.result()]


def a_store(shared_memory: Path, memory: bool, eviction: Eviction) -> SmallStore:
    settings = SlabSettings(eviction=eviction, seconds=5, engine="threads")
    store = SmallStore(shared_memory / "store", memory, CRAMPED, settings)
    run(crash_script.fill, store, 1)
    return store


def errors_of(name: str) -> tuple[int, ...]:
    """What a step of that name may fail with."""
    return (*ERRORS, INDEX_FULL) if name in MAY_BE_FULL else ERRORS


@pytest.mark.parametrize("eviction", ["sieve", "s3-fifo", "lru"])
@pytest.mark.parametrize("memory", [True, False])
def test_no_step_is_a_bad_one_to_fail_at(
    shared_memory: Path, memory: bool, eviction: Eviction
) -> None:
    store = a_store(shared_memory, memory, eviction)
    (steps,) = go_on(store, 2, [{}])
    assert len(steps) > 150
    every = 1 if eviction == "sieve" else 3
    tried = list(enumerate(steps, 1))[::every]
    trials: list[Errors] = [{number: e} for number, name in tried for e in errors_of(name)]
    seen = go_on(store, 2, trials)
    assert len(seen) == len(trials)
    assert any(names != steps for names in seen), "no error made a difference"


@pytest.mark.parametrize("eviction", ["sieve", "s3-fifo", "lru"])
@pytest.mark.parametrize("memory", [True, False])
def test_no_two_steps_are_bad_ones_to_fail_at(
    shared_memory: Path, memory: bool, eviction: Eviction
) -> None:
    """What mends the first error may meet the second one."""
    store = a_store(shared_memory, memory, eviction)
    (steps,) = go_on(store, 3, [{}])
    rng = random.Random(f"{memory} {eviction}")
    trials: list[Errors] = []
    for first in range(1, len(steps) + 1, 1 if eviction == "sieve" else 3):
        later = first + rng.choice([rng.randint(1, NEAR), rng.randint(1, len(steps))])
        errors = rng.choices((*ERRORS, INDEX_FULL), k=2)
        trials.append(dict(zip((first, later), errors, strict=True)))
    assert len(go_on(store, 3, trials)) == len(trials)


@pytest.mark.parametrize("memory", [True, False])
def test_an_index_that_stays_full_for_a_while_is_no_harm(shared_memory: Path, memory: bool) -> None:
    """Until the operation gives up: each attempt in vain is followed by another one."""
    store = a_store(shared_memory, memory, "sieve")
    (steps,) = go_on(store, 4, [{}])
    trials: list[Errors] = [
        dict.fromkeys(range(first, first + LONG), INDEX_FULL)
        for first in range(1, len(steps) + 1, 3)
    ]
    assert len(go_on(store, 4, trials)) == len(trials)
