"""A restore that would lose against computing is declined; nothing is declined on a guess."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from lmcache_sglang.hicache import recompute as module
from lmcache_sglang.hicache.recompute import (
    LEAST_BATCH,
    LEAST_BYTES,
    LEAST_TOKENS,
    MARGIN,
    RETRY_ONE_IN,
    Recompute,
)
from lmcache_sglang.storage.rate import Rate
from tests.hicache.test_backend import USUAL, indices, page_hashes

PAGE_TOKENS = 64
PAGE_BYTES = 8 << 20
PREFILL = 6400.0  # tokens a second: 10 ms a page


def rate(a_second: float, seen: float) -> Rate:
    made = Rate()
    made.add(seen, seen / a_second)
    return made


def tier(page_seconds: float, seen: float = LEAST_BYTES) -> Rate:
    """One that takes so long for a page."""
    return rate(PAGE_BYTES / page_seconds, seen)


@pytest.fixture
def engine() -> Recompute:
    return Recompute(rate(PREFILL, LEAST_TOKENS))


def pays(engine: Recompute, *tiers: Rate, asked: bytes = b"\1") -> int:
    return engine.pays(tiers, PAGE_BYTES, PAGE_TOKENS, asked)


MEMORY, FAST, SLOW = tier(0.001), tier(0.009), tier(0.02)


def test_what_is_read_sooner_than_computed_is_restored(engine: Recompute) -> None:
    assert pays(engine, *[MEMORY] * 5) == 5
    assert pays(engine, *[FAST] * 5) == 5
    assert engine.declined == 0


def test_what_is_computed_sooner_than_read_is_declined(engine: Recompute) -> None:
    assert pays(engine, *[SLOW] * 5) == 0
    assert engine.declined == 5


def test_a_doubt_is_in_favour_of_the_restore(engine: Recompute) -> None:
    assert pays(engine, tier(0.010 * MARGIN * 0.99)) == 1
    assert pays(engine, tier(0.010 * MARGIN * 1.01)) == 0


def test_pages_in_memory_are_restored_though_those_after_them_are_not(engine: Recompute) -> None:
    assert pays(engine, MEMORY, MEMORY, SLOW, SLOW) == 2
    assert engine.declined == 2


def test_slow_pages_are_read_for_the_sake_of_many_fast_ones_behind_them(engine: Recompute) -> None:
    assert pays(engine, SLOW, *[MEMORY] * 5) == 6
    assert pays(engine, SLOW, SLOW, SLOW, MEMORY) == 0


def test_nothing_is_nothing(engine: Recompute) -> None:
    assert pays(engine) == 0


def test_nothing_is_declined_before_the_engine_computed_enough() -> None:
    engine = Recompute(rate(PREFILL, LEAST_TOKENS - 1))
    assert pays(engine, SLOW) == 1


def test_a_tier_is_slow_only_when_enough_was_read_from_it(engine: Recompute) -> None:
    assert pays(engine, tier(0.02, LEAST_BYTES - 1)) == 1


def test_a_slow_tier_is_tried_again_by_all_ranks_for_the_same_prefixes() -> None:
    """SGLang restores what all ranks want: one that tries alone measures nothing."""
    ranks = [Recompute(rate(speed, LEAST_TOKENS)) for speed in (PREFILL, 1.1 * PREFILL)]
    hashes = [hashlib.sha256(bytes([i])).digest() for i in range(200)]
    tried = [[pays(rank, SLOW, asked=each) for each in hashes] for rank in ranks]
    assert tried[0] == tried[1]
    assert 0.5 / RETRY_ONE_IN < sum(tried[0]) / len(hashes) < 2 / RETRY_ONE_IN


def test_small_batches_say_nothing_of_the_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_prefill", Rate())
    module.computed(LEAST_BATCH - 1, 0.1)
    assert module._prefill.seen == 0
    module.computed(LEAST_BATCH, 0.1)
    assert module._prefill.seen == LEAST_BATCH


# --- in the backend ---


@pytest.fixture
def backend(make_pool: Any, backends: Any) -> Any:
    made = backends.open(make_pool(USUAL), metrics=True)
    made.batch_set_v1(page_hashes(3), indices(made.mem_pool_host, [0, 1, 2]))
    (kept,) = made.pools.values()
    page_seconds = kept.page_size / PREFILL
    made._recompute = Recompute(rate(PREFILL, LEAST_TOKENS))
    made.tier_takes = lambda pages: rate(kept.page_bytes / (pages * page_seconds), LEAST_BYTES)
    return made


@pytest.mark.parametrize(("pages", "found"), [(0.5, 3), (2.0, 0)])
def test_a_lookup_finds_what_it_pays_to_restore(backend: Any, pages: float, found: int) -> None:
    backend._chain.rates["cpu"] = backend.tier_takes(pages)
    assert backend.batch_exists(page_hashes(3)) == found
    result = backend.batch_exists_v2(page_hashes(3), [])
    assert result.kv_hit_pages == found
    assert backend.reasons() == ({} if found else {"recompute.faster": 6})
    assert result.restorable_prefix_pages == list(range(1, found + 1))


def test_sglang_is_given_the_reasons_with_its_metrics(backend: Any) -> None:
    backend._chain.rates["cpu"] = backend.tier_takes(2.0)
    metrics = backend.get_stats()
    assert metrics.reasons() == {}
    backend.batch_exists(page_hashes(3))
    assert metrics.reasons() == backend.get_stats().reasons() == {"recompute.faster": 3}


def test_a_lookup_finds_everything_where_the_setting_says_so(backend: Any) -> None:
    backend._chain.rates["cpu"] = backend.tier_takes(100.0)
    backend._recompute = None
    assert backend.batch_exists(page_hashes(3)) == 3


def test_reads_are_measured_by_tier(backend: Any) -> None:
    pool = backend.mem_pool_host
    assert backend.batch_get_v1(page_hashes(3), indices(pool, [3, 4, 5])) == [True] * 3
    assert backend._chain.rates["cpu"].seen == 3 * next(iter(backend.pools.values())).page_bytes
    assert backend._chain.rates["disk"].seen == 0


def test_what_pays_is_cut_to_where_the_other_pools_can_stop(
    make_pool: Any, backends: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window that ends after the first page or after the third, and two pages that are worth it."""
    from sglang.srt.mem_cache.hicache_storage import PoolHitPolicy, PoolName, PoolTransfer

    kv, windows = make_pool(USUAL), make_pool(USUAL)
    backend = backends.open(kv)
    backend.register_mem_host_pool_v2(windows, PoolName.SWA)
    keys = page_hashes(3)
    backend.batch_set_v1(keys, indices(kv, [0, 1, 2]))
    last = PoolTransfer(
        PoolName.SWA,
        host_indices=indices(windows, [0, 1]),
        keys=[keys[0], keys[2]],
        hit_policy=PoolHitPolicy.TRAILING_PAGES,
    )
    assert backend.batch_set_v2([last]) == {PoolName.SWA: [True, True]}
    asked = PoolTransfer(PoolName.SWA, keys=["one"], hit_policy=PoolHitPolicy.TRAILING_PAGES)
    assert backend.batch_exists_v2(keys, [asked]).restorable_prefix_pages == [1, 3]
    backend._recompute = Recompute()
    monkeypatch.setattr(backend._recompute, "pays", lambda *_: 2)
    found = backend.batch_exists_v2(keys, [asked])
    assert found.restorable_prefix_pages == [1]
    assert found.kv_hit_pages == 1
    assert found.extra_pool_hit_pages[PoolName.KV] == 3  # which is what is stored
