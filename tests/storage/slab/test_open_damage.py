"""A control block that is damaged while the store is open: no wrong bytes, no hang, no crash."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmcache_sglang.storage.slab.settings import Eviction, SlabSettings
from lmcache_sglang.testing.scribble import put_against_a_circle, use_while_damaged
from lmcache_sglang.testing.small_store import SmallStore
from lmcache_sglang.testing.store_process import Job, run

CASES = 200  # of each kind
CAPACITY = 1 << 20
NUMBERS = range(80)  # more than fit


@pytest.mark.parametrize("eviction", ["sieve", "s3-fifo", "lru"])
@pytest.mark.parametrize("memory", [True, False])
def test_no_damage_under_an_open_store_hangs_or_ends_a_process(
    shared_memory: Path, memory: bool, eviction: Eviction
) -> None:
    settings = SlabSettings(eviction=eviction, seconds=1)
    store = SmallStore(shared_memory / "store", memory, CAPACITY, settings)
    told = run(use_while_damaged, store, NUMBERS, range(CASES))  # ends at its deadline, if it hangs
    assert told, "no damage was noticed: was there any?"


def test_a_list_that_leads_in_a_circle_is_not_followed_for_ever(shared_memory: Path) -> None:
    store = SmallStore(shared_memory / "store", True, CAPACITY, SlabSettings(seconds=1))
    assert "circle" in Job(put_against_a_circle, store).result(30)
