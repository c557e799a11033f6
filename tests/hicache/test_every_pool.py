"""Every pool that SGLang names, as the class that SGLang makes of it, in each layout: its pages come back whole.

The pairs are those of SGLang's hybrid_pool_assembler.py. A name that a later SGLang brings fails the first test until
it stands here with its class.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lmcache_sglang.hicache.stored_pool import WholePages, require_reachable
from tests.hicache.sidecar_pools import ALL_LAYOUTS
from tests.hicache.test_backend import indices, page_hashes
from tests.hicache.test_several_pools import content, fill

PAGES = 4
PAGE = 4
# Of each pool's name: what makes it (conftest.make_pool). All of them can be made without a GPU.
POOLS: dict[str, tuple[str, ...]] = {
    "kv": ("mha", "wide", "mla", "dsa", "nvfp4_main"),
    "mamba": ("mamba", "conv", "sided"),
    "swa": ("mha", "wide", "paged"),
    "auxiliary_swa": ("mha", "wide"),
    "indexer": ("dsa_indexer", "qsa_indexer", "key_only", "nvfp4_index"),
    "deepseek_v4_c1": ("paged",),
    "deepseek_v4_c1_indexer": ("paged",),
    "deepseek_v4_c1_indexer_scale": ("paged",),
    "deepseek_v4_c2": ("paged",),
    "deepseek_v4_c2_indexer": ("paged",),
    "deepseek_v4_c2_indexer_scale": ("paged",),
    "deepseek_v4_c4": ("paged",),
    "deepseek_v4_c4_indexer": ("paged",),
    "deepseek_v4_c4_indexer_scale": ("paged",),
    "deepseek_v4_c128": ("paged",),
    "deepseek_v4_c4_rope": ("paged",),
    "deepseek_v4_c128_rope": ("paged",),
    "deepseek_v4_c4_state": ("compress_state",),
    "deepseek_v4_c4_indexer_state": ("compress_state",),
    "deepseek_v4_c128_state": ("compress_state",),  # which SGLang names and does not make
    "draft": ("mha", "wide", "mla"),
    "draft_indexer": ("dsa_indexer", "qsa_indexer"),
    "draft_swa": ("mha", "paged"),
}
CLASSES = {
    "mha": "MHATokenToKVPoolHost",
    "wide": "AsymmetricMHATokenToKVPoolHost",
    "mla": "MLATokenToKVPoolHost",
    "dsa": "MLATokenToKVPoolHost",
    "mamba": "MambaPoolHost",
    "conv": "MambaPoolHost",
    "sided": "MambaPoolHost",
    "paged": "DeepSeekV4PagedHostPool",
    "compress_state": "DeepSeekV4StateHostPool",
    "dsa_indexer": "DSAIndexerPoolHost",
    "qsa_indexer": "QSAIndexerPoolHost",
    "key_only": "MHATokenToKOnlyPoolHost",
    "nvfp4_main": "MiniMaxM3Nvfp4MainKVPoolHost",
    "nvfp4_index": "MiniMaxM3Nvfp4IndexKPoolHost",
}
LAYOUTS = {  # where not those that are most pools'
    "mha": (*ALL_LAYOUTS, "page_head"),
    "wide": ("page_first", "page_first_direct"),
    "mla": (*ALL_LAYOUTS, "page_first_kv_split"),
    "dsa": ("page_first_kv_split",),
    "mamba": ("page_first", "page_first_direct"),
    "conv": ("page_first", "page_first_direct"),
    "sided": ("page_first", "page_first_direct"),
}
# Of which SGLang does not say where a page lies: it is copied once more on the way.
COPIED = {
    ("sided", "page_first"),
    ("sided", "page_first_direct"),
    *((made, "layer_first") for made in ("dsa_indexer", "key_only", "nvfp4_main", "nvfp4_index")),
}
PAGE_SIZES = {"dsa_indexer": 64, "nvfp4_main": 128, "nvfp4_index": 128}  # SGLang takes no other
CASES = [
    (name, made, layout)
    for name, makers in POOLS.items()
    for made in makers
    for layout in LAYOUTS.get(made, ALL_LAYOUTS)
]

MakePool = Callable[..., Any]


def test_every_name_of_sglang_stands_here(sglang: None) -> None:
    from sglang.srt.mem_cache.hicache_storage import PoolName

    assert [name.value for name in PoolName] == list(POOLS)


@pytest.mark.parametrize(("name", "made", "layout"), CASES)
def test_pages_of_every_pool_come_back_whole_and_elsewhere(
    name: str, made: str, layout: str, make_pool: MakePool, backends: Any
) -> None:
    from sglang.srt.mem_cache.hicache_storage import PoolName

    page_size = PAGE_SIZES.get(made, PAGE)
    pool = make_pool(f"{made} {layout}", pages=2 * PAGES, page_size=page_size)
    assert type(pool).__name__ == CLASSES[made]
    is_kv = name == PoolName.KV.value
    kv = pool if is_kv else make_pool("mha page_first", pages=2 * PAGES, page_size=page_size)
    backend = backends.make()
    backend.register_mem_pool_host(kv)
    for each in {PoolName.KV: kv, PoolName(name): pool}.items():
        backend.register_mem_host_pool_v2(*reversed(each))
    backend.on_host_pools_registered()
    is_copied = isinstance(backend.pools[PoolName(name)].access, WholePages)
    assert is_copied == ((made, layout) in COPIED)
    places = random.Random(5).sample(range(2 * PAGES), 2 * PAGES)
    source, target = places[:PAGES], places[PAGES:]
    keys = page_hashes(PAGES)
    fill(pool, 1)
    before = [content(pool, place) for place in source]
    assert len(set(before)) == PAGES
    assert len(before[0]) == backend.pools[PoolName(name)].page_bytes
    assert found(backend, name, keys) == 0
    assert put(backend, name, pool, source, keys) == [True] * PAGES
    assert backend._chain.flush(30.0)
    if not is_kv:
        assert found(backend, name, keys) == 0  # without its KV it is of no use
        put(backend, "kv", kv, source, keys)
    assert found(backend, name, keys) == PAGES
    fill(pool, 2)
    others = [content(pool, place) for place in source]
    asked = [*keys[:2], *page_hashes(1, "unknown"), *keys[3:]]
    assert found(backend, name, asked) == 2
    assert get(backend, name, pool, target, asked) == [True, True, False, True]
    for page in (0, 1, 3):
        assert content(pool, target[page]) == before[page]
    assert [content(pool, place) for place in source] == others, "what was not asked for is touched"


@pytest.mark.parametrize("kind", ["mha page_unified", "mla page_unified"])
def test_pages_that_sglang_gives_to_no_storage_are_refused(kind: str, make_pool: MakePool) -> None:
    """A layout of SGLang's own grid: its pools say neither where a page lies nor what it holds."""
    with pytest.raises(NotImplementedError, match=r"'kv'.*Unsupported layout: page_unified"):
        require_reachable(make_pool(kind), "kv")


def found(backend: Any, name: str, keys: list[str]) -> int:
    """Pages of the longest prefix that can be restored with this pool."""
    from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer

    if name == PoolName.KV.value:
        return int(backend.batch_exists(keys))
    return int(backend.batch_exists_v2(keys, [PoolTransfer(PoolName(name))]).kv_hit_pages)


def put(backend: Any, name: str, pool: Any, places: list[int], keys: list[str]) -> list[bool]:
    return moved(backend.batch_set_v1, backend.batch_set_v2, name, where(pool, places), keys)


def get(backend: Any, name: str, pool: Any, places: list[int], keys: list[str]) -> list[bool]:
    return moved(backend.batch_get_v1, backend.batch_get_v2, name, where(pool, places), keys)


def moved(
    one: Callable[..., Any],
    several: Callable[..., Any],
    name: str,
    host_indices: torch.Tensor,
    keys: list[str],
) -> list[bool]:
    """By the call that SGLang makes for this pool."""
    from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer

    pool = PoolName(name)
    if pool == PoolName.KV:
        return list(one(keys, host_indices))
    return list(several([PoolTransfer(pool, host_indices=host_indices, keys=keys)])[pool])


def where(pool: Any, places: list[int]) -> torch.Tensor:
    return indices(pool, places)
