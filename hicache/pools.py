"""SGLang's host pools, seen as pages of segments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from ..kernels.pages import PageSegments
from .identity import PageIdentity

if TYPE_CHECKING:
    import torch


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


class Sharding(Protocol):
    """What this package uses of SGLang's `HiCacheStorageConfig`."""

    tp_rank: int
    tp_size: int
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


def describe(pool: HostPool, name: str, sharding: Sharding, size: int) -> PageIdentity:
    """What the pool's pages hold. Args: size: bytes of one page."""
    every_rank_holds_all = sharding.is_mla_model or hasattr(pool, "kv_lora_rank")
    heads = 0 if every_rank_holds_all else pool.head_num
    first = sharding.tp_rank * heads
    return PageIdentity(
        pool=name,
        page_size=logical_page_size(pool),
        page_bytes=size,
        dtype=str(pool.dtype).removeprefix("torch."),
        layers=(pool.start_layer, pool.end_layer),
        stored_layers=pool.layer_num,
        heads=(first, first + heads),
        # With fewer KV heads than ranks SGLang repeats heads, so rank 1 of 4 and rank 1 of 2 differ.
        total_heads=heads * sharding.tp_size,
        head_dims=_head_dims(pool),
        layout=pool.layout,
        slices=_slices(sharding),
    )


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
