"""A process that is killed while it makes or resizes a store leaves one that the next start can use."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from lmcache_sglang.testing import crash_script
from lmcache_sglang.testing.crash_script import NUMBERS, Opening
from lmcache_sglang.testing.small_store import SmallStore, here, put
from lmcache_sglang.testing.store_process import Died, run

SIZES = {  # what a store is opened with
    "made": 2 << 20,
    "made anew": 8 << 20,  # an empty one, which gets larger slabs
    "grown": 4 << 20,
    "shrunk": 1 << 20,
}
BEFORE = 2 << 20  # bytes, of a store that there is before; the pages just fill it
RANDOM_KILLS = 25

everywhere = pytest.mark.parametrize("memory", [True, False])
every_change = pytest.mark.parametrize("change", SIZES)


@dataclass
class Case:
    """A store that is to be made, or that has another size than it is opened with."""

    before: SmallStore
    after: SmallStore
    saved: dict[str, bytes] | None
    most: set[int]  # pages that it had
    least: set[int]  # pages that it has room for

    def attempt(self, **when: Any) -> Opening | None:
        """Open it, as it is before that. None: the process was killed."""
        shutil.rmtree(self.after.directory, ignore_errors=True)
        if self.saved is not None:
            self.before.restore(self.saved)
        try:
            return run(crash_script.open_and_be_killed, self.after, **when)
        except Died:
            return None

    def look(self, store: SmallStore) -> None:
        seen = run(crash_script.look_resizing, store)
        crash_script.require_whole(seen)
        assert self.least <= seen.here <= self.most
        assert store.allocated() <= store.capacity
        if store == self.after:
            assert seen.here == self.least


def fill(store: SmallStore, numbers: Iterable[int]) -> set[int]:
    with store.opened() as tier:
        for number in numbers:
            put(tier, [number], [b""])
        return here(tier, NUMBERS)


def a_case(shared_memory: Path, memory: bool, change: str) -> Case:
    before = SmallStore(shared_memory / "store", memory, BEFORE)
    after = replace(before, capacity=SIZES[change])
    if change == "made":
        return Case(before, after, None, set(), set())
    most = fill(before, [] if change == "made anew" else NUMBERS)
    case = Case(before, after, before.save(), most, set())
    assert case.attempt() is not None
    with after.opened() as tier:  # resized by a process that nobody killed
        case.least = here(tier, NUMBERS)
    assert set() < case.least < most if change == "shrunk" else case.least == most
    return case


@everywhere
@every_change
def test_no_call_and_no_step_is_a_bad_one_to_die_at(
    shared_memory: Path, memory: bool, change: str
) -> None:
    """Then it is opened as it was to be, or as it was before."""
    case = a_case(shared_memory, memory, change)
    whole = case.attempt()
    assert whole is not None
    deaths = [{"at_call": number} for number in range(1, whole.calls + 1)]
    deaths += [{"at_step": number} for number in range(1, whole.steps + 1)]
    assert whole.calls > 10 < len(deaths) - whole.steps
    for death in deaths:
        for store in (case.after, case.before):
            assert case.attempt(**death) is None, death
            case.look(store)


@everywhere
@every_change
def test_no_moment_is_a_bad_one_to_die_at(shared_memory: Path, memory: bool, change: str) -> None:
    """In the middle of a call too, and of LMDB's own work."""
    case = a_case(shared_memory, memory, change)
    whole = case.attempt()
    assert whole is not None
    kills, rng = 0, random.Random(f"{memory} {change}")
    while kills < RANDOM_KILLS:
        if case.attempt(after=rng.uniform(1e-6, whole.seconds)) is None:
            kills += 1
            case.look(rng.choice([case.after, case.before]))
