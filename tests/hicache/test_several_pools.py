"""Models with more than a KV pool: a prefix comes back with all pools that it needs, or it does not come back."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lmcache_sglang.hicache.stored_pool import is_logical, require_reachable
from tests.hicache import sidecar_pools
from tests.hicache.test_backend import buffers, indices, page_hashes
from tests.hicache.test_backend import content as parts_of_page

BATCH, WINDOW = 1024, 64  # pages

MakePool = Callable[..., Any]


def tensors(pool: Any) -> list[torch.Tensor]:
    """All memory of a pool that holds state."""
    if hasattr(pool, "temporal_buffer"):
        return [pool.temporal_buffer, *pool.conv_buffer, *pool.slot_state_buffers]
    if pool.__class__.__name__.startswith("Asymmetric"):
        return [pool.k_buffer, pool.v_buffer]
    if pool.layout == "page_first_kv_split":
        return buffers(pool)
    if is_logical(pool):
        return []
    for attribute in ("index_k_with_scale_buffer", "kv_buffer", "k_buffer"):
        kept = getattr(pool, attribute, None)
        if kept is not None:
            return list(kept) if isinstance(kept, (tuple, list)) else [kept]
    raise ValueError(type(pool).__name__)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def fill(pool: Any, seed: int) -> None:
    random_bytes = torch.Generator().manual_seed(seed)
    for tensor in tensors(pool):
        as_bytes(tensor).random_(0, 256, generator=random_bytes)


def content(pool: Any, slot: int) -> bytes:
    """As SGLang itself hands the page out, if it does."""
    if pool.__class__.__name__.startswith("Asymmetric"):
        where = pool.get_page_buffer_meta(indices(pool, [slot]))
        return b"".join(ctypes.string_at(at, size) for at, size in zip(*where, strict=True))
    if pool.layout == "page_first_kv_split":
        return parts_of_page(pool, slot)
    page = pool.get_data_page(slot * pool.page_size, flat=True)
    return as_bytes(page).numpy().tobytes()


def test_each_pool_has_pages_of_its_own_under_the_same_hash(
    make_pool: MakePool, backends: Any
) -> None:
    from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer

    kv, swa = make_pool("mha page_first"), make_pool("mha page_first")  # of one shape
    backend = backends.open(kv)
    backend.register_mem_host_pool_v2(swa, PoolName.SWA)
    fill(kv, 1)
    fill(swa, 2)
    keys, expected = page_hashes(2), [content(kv, 0), content(swa, 0)]
    assert backend.batch_set_v1(keys, indices(kv, [0, 1])) == [True, True]
    assert backend.batch_exists_v2(keys, [PoolTransfer(PoolName.SWA)]).kv_hit_pages == 0
    transfer = PoolTransfer(PoolName.SWA, host_indices=indices(swa, [0, 1]), keys=keys)
    assert backend.batch_set_v2([transfer]) == {PoolName.SWA: [True, True]}
    assert backend.batch_exists_v2(keys, [PoolTransfer(PoolName.SWA)]).kv_hit_pages == 2
    fill(kv, 3)
    fill(swa, 4)
    assert backend.batch_get_v1(keys, indices(kv, [0, 1])) == [True, True]
    assert backend.batch_get_v2([transfer]) == {PoolName.SWA: [True, True]}
    assert [content(kv, 0), content(swa, 0)] == expected


def test_a_prefix_is_not_reported_once_a_sidecar_is_gone(
    make_pool: MakePool, backends: Any
) -> None:
    from sglang.srt.mem_cache.hicache_storage import PoolHitPolicy, PoolName, PoolTransfer

    from lmcache_sglang.storage.base import page_key

    kv, state = make_pool("mha page_first"), make_pool("mamba page_first")
    backend = backends.open(kv)
    backend.register_mem_host_pool_v2(state, PoolName.MAMBA)
    keys = page_hashes(6)
    assert backend.batch_set_v1(keys, indices(kv, list(range(6)))) == [True] * 6
    for end in (2, 5):  # checkpoints
        each = PoolTransfer(
            PoolName.MAMBA,
            host_indices=indices(state, [end]),
            keys=[keys[end - 1]],
            hit_policy=PoolHitPolicy.TRAILING_PAGES,
        )
        assert backend.batch_set_v2([each]) == {PoolName.MAMBA: [True]}
    asked = [PoolTransfer(PoolName.MAMBA, keys=keys[-1:], hit_policy=PoolHitPolicy.TRAILING_PAGES)]
    found = backend.batch_exists_v2(keys, asked)
    assert (found.kv_hit_pages, found.restorable_prefix_pages) == (5, [2, 5])
    assert found.extra_pool_hit_pages == {PoolName.KV: 6, PoolName.MAMBA: 5}
    gone = page_key(backend.pools[PoolName.MAMBA].namespace, bytes.fromhex(keys[4]))
    for tier in backend._chain.tiers:
        tier.remove([gone])
    assert backend.batch_exists_v2(keys, asked).restorable_prefix_pages == [2]


def test_groups_of_blocks_have_a_verdict_and_shorten_no_prefix(
    make_pool: MakePool, backends: Any
) -> None:
    from sglang.srt.mem_cache.hicache_storage import PoolHitPolicy, PoolName, PoolTransfer

    kv, blocks = make_pool("mha page_first"), make_pool("paged page_first")
    backend = backends.open(kv)
    backend.register_mem_host_pool_v2(blocks, PoolName.DEEPSEEK_V4_C4)
    keys, groups = page_hashes(6), page_hashes(4, "groups")
    backend.batch_set_v1(keys, indices(kv, list(range(6))))
    asked = PoolTransfer(
        PoolName.DEEPSEEK_V4_C4,
        keys=groups,
        hit_policy=PoolHitPolicy.BLOCK_GROUPS,
        block_pages=3,
        group_pages=2,
    )
    for stored, covered in ((0, 0), (1, 0), (2, 3), (3, 3), (4, 6)):
        if stored:
            one = PoolTransfer(
                PoolName.DEEPSEEK_V4_C4,
                host_indices=indices(blocks, [stored]),
                keys=[groups[stored - 1]],
            )
            assert backend.batch_set_v2([one])[PoolName.DEEPSEEK_V4_C4] == [True]
        found = backend.batch_exists_v2(keys, [asked])
        assert found.kv_hit_pages == 6
        assert found.restorable_prefix_pages == [1, 2, 3, 4, 5, 6]
        assert found.extra_pool_hit_pages.get(PoolName.DEEPSEEK_V4_C4, 0) == covered


def test_a_kv_pool_without_memory_leaves_it_to_the_others(
    make_pool: MakePool, backends: Any
) -> None:
    """DeepSeek V4: the KV pool gives out indices only."""
    from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer

    anchor, pages = make_pool("logical page_first"), make_pool("paged page_first")
    assert is_logical(anchor)
    backend = backends.open(anchor)
    backend.register_mem_host_pool_v2(anchor, PoolName.KV)
    backend.register_mem_host_pool_v2(pages, PoolName.DEEPSEEK_V4_C4)
    assert list(backend.pools) == [PoolName.DEEPSEEK_V4_C4]
    keys, where = page_hashes(4), torch.arange(16)
    asked = [PoolTransfer(PoolName.DEEPSEEK_V4_C4)]
    assert backend.batch_exists_v2(keys, asked).kv_hit_pages == 0
    assert backend.batch_set_v1(keys, where) == backend.batch_get_v1(keys, where) == [True] * 4
    put = PoolTransfer(
        PoolName.DEEPSEEK_V4_C4, host_indices=indices(pages, [0, 1, 2]), keys=keys[:3]
    )
    backend.batch_set_v2([put])
    assert backend.batch_exists_v2(keys, asked).kv_hit_pages == 3


def test_a_kv_pool_without_memory_of_its_own_is_refused_and_not_answered_for(
    backends: Any,
) -> None:
    """It would be told that all its pages came, and not one would have been read."""
    owner, other = sidecar_pools.envelopes(4, 4, "page_first")
    assert owner.kv_buffer is not None
    assert other.kv_buffer is None
    backend = backends.make()
    keys = page_hashes(2)
    with pytest.raises(NotImplementedError, match=r"'kv' \(UnifiedPageEnvelopeHostPool\)"):
        backend.register_mem_pool_host(other)
    assert backend.batch_exists(keys) == 0
    assert backend.batch_get_v1(keys, torch.arange(8)) == [False, False]
    assert not is_logical(owner)
    assert not is_logical(other)
    with pytest.raises(NotImplementedError, match=r"'kv'.*is not allocated"):
        require_reachable(owner, "kv")  # nor does it say where a page lies that nobody holds


def test_clearing_forgets_the_pages_of_all_pools_and_of_no_other_model(
    make_pool: MakePool, backends: Any
) -> None:
    from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer

    kinds = {"kv": "mha page_first", "swa": "wide page_first", "mamba": "mamba page_first"}
    pools = {PoolName(name): make_pool(kind) for name, kind in kinds.items()}
    keys = page_hashes(3)

    def serving(model: str, beside: Any = None) -> Any:
        backend = backends.make(model=model, beside=beside)
        backend.register_mem_pool_host(pools[PoolName.KV])
        for name, pool in pools.items():
            backend.register_mem_host_pool_v2(pool, name)
        backend.on_host_pools_registered()
        return backend

    def stored(backend: Any) -> dict[str, list[bool]]:
        return {
            name.value: backend._chain.exists([pool.namespace + bytes.fromhex(key) for key in keys])
            for name, pool in backend.pools.items()
        }

    mine = serving("model")
    theirs = serving("another model", beside=mine)
    for backend in (mine, theirs):
        for name, pool in pools.items():
            put = PoolTransfer(name, host_indices=indices(pool, [0, 1, 2]), keys=keys)
            assert backend.batch_set_v2([put]) == {name: [True] * 3}
    assert mine._chain.flush(30.0)
    everything, nothing = (dict.fromkeys(kinds, [there] * 3) for there in (True, False))
    assert stored(mine) == stored(theirs) == everything
    mine.clear()
    assert stored(mine) == nothing
    assert stored(theirs) == everything
    mine.close()
    mine = serving("model")  # nor does a restart bring them back
    assert stored(mine) == nothing
    assert stored(serving("another model", beside=mine)) == everything


@pytest.mark.parametrize("places", [None, 0, 1, 7])
def test_places_that_do_not_match_the_keys_move_nothing(
    places: int | None, make_pool: MakePool, backends: Any
) -> None:
    """As after a hit that fell short of what was allocated for it."""
    from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer

    swa = make_pool("mha page_first")
    backend = backends.open(make_pool("mha page_first"))
    backend.register_mem_host_pool_v2(swa, PoolName.SWA)
    where = None if places is None else torch.arange(places)
    transfer = PoolTransfer(PoolName.SWA, host_indices=where, keys=page_hashes(2))
    assert backend.batch_set_v2([transfer]) == {PoolName.SWA: [False, False]}
    assert backend.batch_get_v2([transfer]) == {PoolName.SWA: [False, False]}


def test_a_pool_that_is_not_registered_is_a_miss(make_pool: MakePool, backends: Any) -> None:
    from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer

    backend = backends.open(make_pool("mha page_first"))
    keys = page_hashes(2)
    backend.batch_set_v1(keys, indices(backend.pools[PoolName.KV].host, [0, 1]))
    transfer = PoolTransfer(PoolName.INDEXER, host_indices=torch.arange(8), keys=keys)
    assert backend.batch_get_v2([transfer]) == {PoolName.INDEXER: [False, False]}
    assert backend.batch_exists_v2(keys, [transfer]).kv_hit_pages == 0


def test_one_lookup_serves_all_pools_of_a_long_request(
    make_pool: MakePool, backends: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """250,000 tokens in pages of 16, stored to the last, and a window beside them."""
    from sglang.srt.mem_cache.hicache_storage import PoolHitPolicy, PoolName, PoolTransfer

    kv, swa = (
        make_pool("mha page_first", page_size=16, heads=1, head_dim=width, pages=BATCH)
        for width in (8, 4)
    )
    backend = backends.open(kv, cpu=0, disk="320MiB")
    backend.register_mem_host_pool_v2(swa, PoolName.SWA)
    keys = page_hashes(250_000 // 16)
    window = keys[-WINDOW:]
    for start in range(0, len(keys), BATCH):
        batch = keys[start : start + BATCH]
        assert all(backend.batch_set_v1(batch, indices(kv, list(range(len(batch))))))
    put = PoolTransfer(PoolName.SWA, host_indices=indices(swa, list(range(WINDOW))), keys=window)
    assert backend.batch_set_v2([put]) == {PoolName.SWA: [True] * WINDOW}
    lookups: list[int] = []

    def counted(exists: Callable[[list[bytes]], list[bool]]) -> Callable[[list[bytes]], list[bool]]:
        def look(some: list[bytes]) -> list[bool]:
            lookups.append(len(some))
            return exists(some)

        look.__name__ = "exists"
        return look

    (tier,) = backend._chain.tiers
    monkeypatch.setattr(tier, "exists", counted(tier.exists))
    asked = PoolTransfer(PoolName.SWA, keys=window, hit_policy=PoolHitPolicy.TRAILING_PAGES)
    found = backend.batch_exists_v2(keys, [asked])
    assert (found.kv_hit_pages, found.restorable_prefix_pages) == (15_625, [15_625])
    assert lookups == [2 * len(keys)]
    assert backend.batch_exists(keys) == 15_625
    assert lookups == [2 * len(keys), len(keys)]


def test_a_recurrent_state_is_cut_by_ranks_and_latent_kv_is_not(
    make_pool: MakePool, backends: Any
) -> None:
    from sglang.srt.mem_cache.hicache_storage import PoolName

    first = backends.open(make_pool("mla page_first"), tp_rank=0, tp_size=2, is_mla_model=True)
    other = backends.open(
        make_pool("mla page_first"), tp_rank=1, tp_size=2, is_mla_model=True, beside=first
    )
    for backend in (first, other):
        backend.register_mem_host_pool_v2(make_pool("mamba page_first"), PoolName.MAMBA)
    assert first.pools[PoolName.KV].namespace == other.pools[PoolName.KV].namespace
    assert first.pools[PoolName.MAMBA].namespace != other.pools[PoolName.MAMBA].namespace


def test_stages_of_a_pipeline_share_no_page_of_a_model_with_several_pools(
    make_pool: MakePool, backends: Any
) -> None:
    """Each of its pools counts its own layers from 0, on every stage."""
    from sglang.srt.mem_cache.hicache_storage import PoolName

    opened: list[Any] = []
    for rank, of in ((0, 2), (1, 2), (0, 1)):
        beside = opened[0] if opened else None
        backend = backends.open(
            make_pool("mha page_first"), pp_rank=rank, pp_size=of, beside=beside
        )
        backend.register_mem_host_pool_v2(make_pool("mha page_first", head_dim=4), PoolName.SWA)
        backend.on_host_pools_registered()
        opened.append(backend)
    for name in (PoolName.KV, PoolName.SWA):
        assert len({backend.pools[name].namespace for backend in opened}) == 3
    alone = backends.open(make_pool("mha page_first"), beside=opened[0])
    before = alone.pools[PoolName.KV].namespace
    alone.on_host_pools_registered()
    assert alone.pools[PoolName.KV].namespace == before


def test_the_addresses_of_a_state_are_inside_its_pool(make_pool: MakePool) -> None:
    pool = make_pool("mamba page_first")
    addresses, sizes = pool.get_page_buffer_meta(torch.tensor([1]))
    fill(pool, 5)
    pieces = [ctypes.string_at(at, size) for at, size in zip(addresses, sizes, strict=True)]
    assert b"".join(pieces) == content(pool, 1)
