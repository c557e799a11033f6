"""Which prefixes a pool allows, beside SGLang's own file backend, which says what its controller expects."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from lmcache_sglang.hicache import restorable

if TYPE_CHECKING:
    from pathlib import Path

SPAN = 12  # pages


@pytest.mark.parametrize("window", [1, 2, 3, SPAN, SPAN + 3])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.0])
def test_a_window_is_whole_where_each_of_its_pages_is_here(window: int, share: float) -> None:
    rng = random.Random(f"{window} {share}")
    for _ in range(50):
        here = [rng.random() < share for _ in range(SPAN)]
        verdict = restorable.trailing_pages(here, window)
        expected = {end for end in range(1, SPAN + 1) if all(here[max(0, end - window) : end])}
        assert verdict.prefixes == expected
        assert verdict.boundary == max(expected, default=0)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.0])
def test_all_pages_allows_what_comes_before_the_first_gap(share: float) -> None:
    rng = random.Random(share)
    for _ in range(50):
        here = [rng.random() < share for _ in range(SPAN)]
        boundary = [*here, False].index(False)
        assert restorable.leading(np.array(here)) == boundary
        assert restorable.all_pages(here) == restorable.Verdict(
            frozenset(range(1, boundary + 1)), boundary
        )


@pytest.mark.parametrize(("last", "scale"), [(16, 4), (4, 16)])
def test_ranks_that_choose_some_of_their_prefixes_choose_a_long_one_in_common(
    last: int, scale: int
) -> None:
    rng = random.Random(last)
    for _ in range(300):
        shorter, more = rng.randint(1, 3000), rng.choice([0, 1, 5, 40, 900])
        chosen = [
            restorable.thinned(np.arange(1, pages + 1), last, scale)
            for pages in (shorter, shorter + more)
        ]
        common = max(set(chosen[0].tolist()) & set(chosen[1].tolist()))
        assert common == 1 or shorter - common <= scale / (last - 1) * more
        assert max(map(len, chosen)) < 90


def test_of_prefixes_far_apart_ranks_choose_common_ones_too() -> None:
    """A state lies where a turn ended. One rank lacks the last five."""
    there = np.array(sorted(random.Random(1).sample(range(1, 60_000), 40)))
    chosen = [restorable.thinned(each, 4, 16).tolist() for each in (there, there[:-5])]
    assert set(chosen[0]) & set(chosen[1])
    assert all(set(each) <= set(there.tolist()) for each in chosen)
    assert [each[-4:] for each in chosen] == [there[-4:].tolist(), there[-9:-5].tolist()]


def test_few_prefixes_are_all_chosen() -> None:
    few = np.array([3, 40, 41, 900])
    assert restorable.thinned(few, 4, 16).tolist() == few.tolist()
    assert restorable.thinned(few[:0], 4, 16).tolist() == []


@pytest.mark.parametrize(
    ("here", "group", "covered"),
    [
        ("", 2, 0),
        ("1", 2, 0),
        ("11", 2, 4),
        ("1111", 2, 8),
        ("1101", 2, 4),
        ("0111", 2, 0),
        ("111", 1, 12),
        ("111", 0, 0),
    ],
)
def test_leading_whole_groups_cover_their_blocks(here: str, group: int, covered: int) -> None:
    assert restorable.block_groups([page == "1" for page in here], group, 4) == covered


def test_the_answer_is_that_of_the_file_backend(
    sglang: None, tmp_path: Path, storage_config: Any, make_pool: Any, backends: Any
) -> None:
    """Random pages in either store, of a model with a window and a recurrent state."""
    import torch
    from sglang.srt.mem_cache.hicache_storage import (
        HiCacheFile,
        PoolHitPolicy,
        PoolName,
        PoolTransfer,
    )

    from tests.hicache.test_backend import indices, page_hashes

    pools = {
        PoolName.KV: make_pool("mha page_first", pages=SPAN),
        PoolName.SWA: make_pool("mha page_first", pages=SPAN, head_dim=4),
        PoolName.MAMBA: make_pool("mamba page_first", pages=SPAN),
    }
    ours = backends.open(pools[PoolName.KV])
    for name, pool in pools.items():
        ours.register_mem_host_pool_v2(pool, name)
    rng = random.Random(1)
    seen = set()
    for case in range(40):
        theirs = HiCacheFile(storage_config(), str(tmp_path / f"file {case}"))
        keys, share = page_hashes(SPAN, f"case {case}"), rng.choice([0.6, 0.9, 1.0])
        for name, pool in pools.items():
            for number, key in enumerate(keys):
                if rng.random() >= share:
                    continue
                theirs.set(theirs._log_key(name, key), torch.zeros(4))
                transfer = PoolTransfer(name, host_indices=indices(pool, [number]), keys=[key])
                assert ours.batch_set_v2([transfer]) == {name: [True]}
        window = rng.randint(1, 4)
        transfers = [
            PoolTransfer(
                PoolName.SWA, keys=keys[-window:], hit_policy=PoolHitPolicy.TRAILING_PAGES
            ),
            PoolTransfer(PoolName.MAMBA, keys=keys[-1:], hit_policy=PoolHitPolicy.TRAILING_PAGES),
        ]
        if rng.random() < 0.3:
            transfers[0].hit_policy = PoolHitPolicy.ALL_PAGES
        expected = theirs.batch_exists_v2(keys, transfers)
        found = ours.batch_exists_v2(keys, transfers)
        assert found.kv_hit_pages == expected.kv_hit_pages
        assert found.restorable_prefix_pages == expected.restorable_prefix_pages
        if expected.restorable_prefix_pages:  # else it stops looking at the pools behind
            assert found.extra_pool_hit_pages == expected.extra_pool_hit_pages
        seen.add(found.kv_hit_pages)
    assert len(seen) > 4
