"""Which prefixes a pool allows, beside SGLang's own file backend, which says what its controller expects."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

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
