"""SGLang's host pools, seen as pages of segments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from ..kernels.pages import PageSegments
from .identity import PageIdentity

if TYPE_CHECKING:
    import torch


# What says how the bytes of a page are arranged, of the pools that have such a thing.
_SHAPE = (
    "conv_state_shapes",
    "conv_dtype",
    "temporal_state_shape",
    "temporal_dtype",
    "indexer_page_stride_size",
    "item_bytes",
    "slot_page_size",
    "row_bytes",
    "storage_format_tag",
)


# Pools of SGLang's whose pages are rows of K and V, or of one latent row, of each token, layer and head. A page of any
# other is not taken apart.
_PLAIN = ("MHATokenToKVPoolHost", "AsymmetricMHATokenToKVPoolHost", "MLATokenToKVPoolHost")


# Orders in which the device holds the rows of a page token by token. In any other (heads first, or vectors for AMD's
# kernels: SGLANG_USE_HND_KVCACHE, SGLANG_AITER_KV_CACHE_LAYOUT) SGLang copies whole pages to the host as they are.
BY_TOKEN = ("nhd", "paged_nhd")


class HostPool(Protocol):
    """What this package uses of `sglang.srt.mem_cache.pool_host.base.HostKVCache`."""

    page_size: int
    layout: str
    dtype: torch.dtype
    start_layer: int
    end_layer: int
    layer_num: int
    head_num: int  # not of pools that every rank holds whole
    dcp_size: int

    def get_page_buffer_meta(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
        """Address and bytes of each run of the pages, page after page."""


class FlatPool(HostPool, Protocol):
    """A pool that hands pages out and takes them back, as all of SGLang's do."""

    def get_data_page(self, index: int, flat: bool = True) -> torch.Tensor:
        """A page in one piece. Args: index: of its first token."""

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        """Memory for one."""

    def set_from_flat_data_page(self, index: int, data_page: torch.Tensor) -> None:
        """Put one into its place."""


class Sharding(Protocol):
    """What this package uses of SGLang's `HiCacheStorageConfig`."""

    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    attn_cp_rank: int
    attn_cp_size: int
    dcp_rank: int
    dcp_size: int
    is_mla_model: bool  # SGLang's name for: every rank holds the same bytes


def segments(pool: HostPool, indices: torch.Tensor) -> PageSegments:
    """Where the given pages lie in the pool.

    Args:
        indices: int64, one a token, page after page; a page's tokens lie together.

    The pool owns the memory; SGLang keeps the pages reserved while a storage call runs.
    """
    addresses, sizes = pool.get_page_buffer_meta(indices)
    pages = len(indices) // logical_page_size(pool)
    return PageSegments(addresses, sizes, len(addresses) // pages if pages else 1, pool)


def logical_page_size(pool: HostPool) -> int:
    """Tokens that one page of the radix tree covers, over all ranks that share it."""
    return pool.page_size * pool.dcp_size


def page_bytes(pool: HostPool, first_page: torch.Tensor) -> int:
    """Bytes of one page. Args: first_page: the indices of any one page."""
    return sum(segments(pool, first_page).sizes)


def describe(
    pool: HostPool, name: str, sharding: Sharding, size: int, kv_heads: int = 0
) -> PageIdentity:
    """What the pool's pages hold.

    Args:
        size: bytes of one page.
        kv_heads: of the whole model; 0 where it is not known.
    """
    first, heads, total = _heads(pool, name, sharding, kv_heads)
    return PageIdentity(
        pool=name,
        page_size=logical_page_size(pool),
        page_bytes=size,
        dtype=str(pool.dtype).removeprefix("torch."),
        layers=_layers(pool),
        stored_layers=getattr(pool, "layer_num", getattr(pool, "num_mamba_layers", 0)),
        heads=(first, first + heads),
        total_heads=total,
        head_dims=_head_dims(pool),
        layout=pool.layout,
        slices=_slices(sharding) | _state_slices(pool, name, sharding),
        shape=_shape(pool),
    )


def _heads(pool: HostPool, name: str, sharding: Sharding, kv_heads: int) -> tuple[int, int, int]:
    """The first KV head that a rank holds, how many it holds, and how many there are; 0 of 0: all on each rank.

    With fewer KV heads than ranks SGLang gives neighbours the same head. Where the model's own number is not
    known, that is told apart from other topologies, and not shared with them.
    """
    if _is_replicated(pool, name, sharding):
        return 0, 0, 0
    ranks = sharding.tp_size
    if name == "kv" and pool.head_num == 1 and 0 < kv_heads < ranks and ranks % kv_heads == 0:
        return sharding.tp_rank // (ranks // kv_heads), 1, kv_heads
    return sharding.tp_rank * pool.head_num, pool.head_num, ranks * pool.head_num


def _is_replicated(pool: HostPool, name: str, sharding: Sharding) -> bool:
    """Whether every tensor-parallel rank holds the same bytes. A draft model has a layout of its own."""
    if hasattr(pool, "kv_lora_rank") or not hasattr(pool, "head_num"):
        return True
    return sharding.is_mla_model and not name.startswith("draft")


def _state_slices(pool: HostPool, name: str, sharding: Sharding) -> dict[str, int]:
    """Of pools that do not count heads, or layers from the model's first."""
    slices: dict[str, int] = {}
    if name == "mamba" and sharding.tp_size > 1:  # recurrent state is cut along its heads
        slices |= {"tp_rank": sharding.tp_rank, "tp_size": sharding.tp_size}
    counts_own_layers = name != "kv" or (sharding.pp_rank > 0 and _first_layer(pool) == 0)
    return slices | stage(sharding) if counts_own_layers else slices


def _layers(pool: HostPool) -> tuple[int, int]:
    """The first layer, and one past the last.

    A sub-pool of a model with several is given its last layer for the end (SGLang's memory_pool.py: `end_layer or
    layer_num - 1`).
    """
    first, end = _first_layer(pool), getattr(pool, "end_layer", 0)
    count = getattr(pool, "target_layer_num", getattr(pool, "layer_num", 0))
    return first, first + count if end - first == count - 1 else end


def _shape(pool: HostPool) -> dict[str, str]:
    """What else tells two pools apart; nothing of those whose pages are plain rows of K and V."""
    named = {key: str(getattr(pool, key)) for key in _SHAPE if getattr(pool, key, None) is not None}
    order = _order_on_device(pool)
    if order not in BY_TOKEN:
        named["order"] = order
    # A device pool seen as the host pool that SGLang would make of it says which that is (device_pools.py).
    name = getattr(pool, "stands_for", type(pool).__name__)
    return named if name in _PLAIN else named | {"class": name}


def _order_on_device(pool: HostPool) -> str:
    """SGLang's `KVBufferLayout` of a pool of K and V; others have one order only."""
    infos = getattr(pool, "_buffer_infos", None)
    return str(infos[0].buffers.layout.value) if infos else BY_TOKEN[0]


def _first_layer(pool: HostPool) -> int:
    return getattr(pool, "start_layer", 0)


def stage(sharding: Sharding) -> dict[str, int]:
    """Which layers a rank has, where its pools count them from 0.

    In a model with several pools all of them do, the KV pool included (SWAKVPool, HybridLinearKVPool);
    where it is the only one it starts at the stage's first layer, and no more need be said.
    """
    if sharding.pp_size == 1:
        return {}
    return {"pp_rank": sharding.pp_rank, "pp_size": sharding.pp_size}


def _head_dims(pool: HostPool) -> tuple[int, int]:
    """Of K and V; latent and rope dimensions of an MLA pool."""
    if hasattr(pool, "kv_lora_rank"):
        return int(pool.kv_lora_rank), int(getattr(pool, "qk_rope_head_dim", 0))
    head_dim = int(getattr(pool, "head_dim", 0))
    return head_dim, int(getattr(pool, "v_head_dim", head_dim))


def _slices(sharding: Sharding) -> dict[str, int]:
    slices: dict[str, int] = {}
    if sharding.attn_cp_size > 1:
        slices |= {"cp_rank": sharding.attn_cp_rank, "cp_size": sharding.attn_cp_size}
    if sharding.dcp_size > 1:
        slices |= {"dcp_rank": sharding.dcp_rank, "dcp_size": sharding.dcp_size}
    return slices
