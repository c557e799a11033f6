"""How bytes are divided: the limit holds to the byte, and what the message names is enough."""

from __future__ import annotations

import itertools
import random
import re
from contextlib import closing
from pathlib import Path

import pytest

from lmcache_sglang.storage.base import Stored
from lmcache_sglang.storage.slab import plan as plan_module
from lmcache_sglang.storage.slab.plan import BLOCK, SLAB_LEAST, SLAB_MOST, SLABS_WANTED, Plan
from lmcache_sglang.testing.small_store import SmallStore
from lmcache_sglang.testing.tier_suite import EngineMemory, some_keys

MIB = 1 << 20
CAPACITIES = [
    *(
        512 << 10,
        MIB,
        2 * MIB + 1,
        10**7,
        64 * MIB - 1,
        64 * MIB,
        10**9,
        8 << 30,
        100 << 30,
        1 << 40,
    ),
    *random.Random(1).sample(range(MIB, 1 << 36), 20),
]


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_all_files_together_fit_and_little_is_left_over(capacity: int) -> None:
    plan = Plan.of(capacity)
    assert plan.total <= capacity
    one_more = Plan(plan.slab_bytes, plan.slots_per_slab, plan.slabs + 1, plan.ghosts)
    assert one_more.total > capacity


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_slabs_are_whole_blocks_and_many_enough_to_share(capacity: int) -> None:
    plan = Plan.of(capacity)
    assert plan.slab_bytes & (plan.slab_bytes - 1) == 0
    assert SLAB_LEAST <= plan.slab_bytes <= SLAB_MOST
    assert plan.slab_bytes >= plan.slots_per_slab * BLOCK
    if plan.slab_bytes > SLAB_LEAST:
        assert plan.slabs >= SLABS_WANTED // 2


def test_more_bytes_hold_more_but_for_a_slab() -> None:
    """Where slabs grow to twice their size, there may be room for one less of them."""
    plans = [Plan.of(capacity) for capacity in sorted(CAPACITIES)]
    for less, more in itertools.pairwise(plans):
        assert more.region_bytes > less.region_bytes - more.slab_bytes


@pytest.mark.parametrize("capacity", [-1, 0, 1, 4096, 300 << 10])
def test_too_little_is_an_error_that_names_what_would_do(capacity: int) -> None:
    with pytest.raises(ValueError, match="smallest store takes") as caught:
        Plan.of(capacity)
    assert str(capacity) in str(caught.value)
    (enough,) = re.findall(r"takes (\d+)", str(caught.value))
    assert Plan.of(int(enough)).slabs >= 1


@pytest.mark.parametrize("slab", [SLAB_LEAST, MIB, 8 * MIB])
def test_a_store_keeps_its_slabs_at_any_size(slab: int) -> None:
    for capacity in (64 * MIB, 1 << 30):
        plan = Plan.of(capacity, slab)
        assert plan.slab_bytes == slab
        assert plan.total <= capacity
    with pytest.raises(ValueError, match="smallest store takes") as caught:
        Plan.of(slab, slab)
    (enough,) = re.findall(r"takes (\d+)", str(caught.value))
    assert Plan.of(int(enough), slab).slabs >= 1


@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("capacity", [MIB, 3 * MIB + 5, 20 * MIB])
def test_the_files_on_the_medium_take_no_more_than_the_plan(
    capacity: int, memory: bool, tmp_path: Path, shared_memory: Path
) -> None:
    store = SmallStore((shared_memory if memory else tmp_path) / "store", memory, capacity)
    with store.opened() as tier:
        assert store.allocated() <= capacity
        assert tier.capacity == capacity
        assert tier.head.plan == Plan.of(capacity)


def test_the_index_has_room_for_a_page_in_every_slot(shared_memory: Path) -> None:
    """Of the smallest pages, keys at random, and again after half of them were replaced."""
    with closing(SmallStore(shared_memory / "store", True, 24 * MIB).open()) as tier:
        most = tier.head.plan.pages_most
        for start in (0, most // 2, most):
            for first in range(start, start + most, 500):
                keys = some_keys(min(500, start + most - first), start=first)
                memory = EngineMemory([b"x"] * len(keys))
                outcome = tier.put(keys, memory.segments, None, [b""] * len(keys))
                assert {Stored.STORED, Stored.PRESENT} >= set(outcome)
        counts = tier.counts()
        assert counts["pages"] == most
        assert counts["index_bytes"] <= tier.head.plan.index_bytes
        assert tier.check().ok


def test_what_a_page_costs_in_the_index_is_not_less_than_was_planned(shared_memory: Path) -> None:
    with closing(SmallStore(shared_memory / "store", True, 24 * MIB).open()) as tier:
        keys = some_keys(tier.head.plan.pages_most)
        for first in range(0, len(keys), 500):
            part = keys[first : first + 500]
            tier.put(part, EngineMemory([b"x"] * len(part)).segments, None, [b""] * len(part))
        counts = tier.counts()
        assert counts["tree_bytes"] / counts["pages"] < plan_module.ENTRY_BYTES
