"""SGLang's device pools, seen as the store's pages: the direct path's counterpart of pools.py and stored_pool.py.

Pages are those of SGLang's `page_first` host layout, byte for byte and under the same name, wherever SGLang's host
pool of the same device pool is one of those below; an engine that goes through HiCache with that layout and one
that goes directly then read each other's pages. Of any other pool a record is its buffers' rows one after the
other, and has a layout's name of its own.

    heads     [K | V], each [token, layer, head, dim]          MHATokenToKVPoolHost
    latent    [token, layer, row]                              MLATokenToKVPoolHost
    states    temporal [layer, ...], each convolution's        MambaPoolHost
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
from sglang.srt.mem_cache.hicache_storage import PoolName
from sglang.srt.mem_cache.hybrid_cache import linker_pool_assembler as assembler
from sglang.srt.mem_cache.hybrid_cache.hybrid_pool_assembler import _swa_layer_mappings
from sglang.srt.mem_cache.hybrid_cache.linker_pool_assembler import (
    DevicePoolEntry,
    DevicePoolGroup,
    resolve_hybrid_device_pool_group,
)
from sglang.srt.mem_cache.memory_pool import (
    HybridLinearKVPool,
    MHATokenToKVPool,
    MLATokenToKVPool,
)
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

from .device_copiers import by_device
from .device_pages import DevicePages, Run
from .pools import BY_TOKEN, HostPool, Sharding, describe
from .stored_pool import Named

if TYPE_CHECKING:
    from collections.abc import Mapping

PAGE_FIRST = "page_first"
OWN_LAYOUT = "device"


@dataclass(slots=True)
class Ranks:
    """Where this rank stands, as SGLang's `HiCacheStorageConfig` has it."""

    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    attn_cp_rank: int
    attn_cp_size: int
    dcp_rank: int
    dcp_size: int
    is_mla_model: bool


def ranks(params: Any) -> Ranks:
    """As HiCacheController._generate_storage_config, so that names are the same. Args: params: `CacheInitParams`."""
    from sglang.srt.managers.cache_controller import is_dp_attention_enabled
    from sglang.srt.mem_cache.deepseek_v4_memory_pool import DeepSeekV4TokenToKVPool
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    attends_apart = is_dp_attention_enabled()
    kv = params.token_to_kv_pool_allocator.get_kvcache()
    full = kv.full_kv_pool if isinstance(kv, HybridLinearKVPool) else kv
    return Ranks(
        tp_rank=parallel.attn_tp_rank if attends_apart else parallel.tp_rank,
        tp_size=parallel.attn_tp_size if attends_apart else parallel.tp_size,
        pp_rank=parallel.pp_rank,
        pp_size=parallel.pp_size,
        attn_cp_rank=params.attn_cp_rank,
        attn_cp_size=params.attn_cp_size,
        dcp_rank=0,
        dcp_size=parallel.attn_dcp_size,
        is_mla_model=isinstance(full, (MLATokenToKVPool, DeepSeekV4TokenToKVPool)),
    )


def pool_group(params: Any, components: set[Any]) -> DevicePoolGroup:
    """The pools of this model that a linker loads and offloads.

    Raises:
        NotImplementedError: of this model it cannot.
        ValueError: SGLang's own refusal.
    """
    _refuse(params)
    kv, size = params.token_to_kv_pool_allocator.get_kvcache(), params.page_size
    if len(components) == 1 and type(kv) in (MHATokenToKVPool, MLATokenToKVPool):
        layers = range(len(_buffers(kv)))
        return DevicePoolGroup([_kv_entry(kv, dict(enumerate(layers)), size)], len(layers), size)
    if type(kv) is HybridLinearKVPool and type(kv.full_kv_pool) is MHATokenToKVPool:
        return _heads_beside_states(kv, params, size)
    if type(kv) is SWAKVPool:
        return _heads_beside_windows(kv, size)
    return resolve_hybrid_device_pool_group(
        kvcache=kv, page_size=size, params=params, components=components
    )


def _refuse(params: Any) -> None:
    from sglang.srt.runtime_context import get_parallel

    parallel, ways = get_parallel(), "take direct out, or serve without"
    if params.mtp_draft_device_pools or params.sidecar_draft_device_pools:
        raise NotImplementedError(
            f"lmcache: the direct path does not carry the KV of a draft model; {ways} speculative decoding"
        )
    if parallel.pp_size > 1 or parallel.attn_dcp_size > 1:
        raise NotImplementedError(
            f"lmcache: the direct path does not go with --pp-size and --dcp-size; {ways} them"
        )


def _kv_entry(pool: Any, layers: Mapping[int, int], page_size: int) -> DevicePoolEntry:
    if isinstance(pool, MHATokenToKVPool):
        return assembler._mha_device_pool_entry(PoolName.KV, pool, layers, page_size)
    return DevicePoolEntry(
        name=PoolName.KV,
        indices_from_pool=PoolName.KV,
        device_pool=pool,
        components=[pool.kv_buffer],
        layer_mapping=layers,
        page_size=page_size,
        rows_are_pages=False,
    )


def _heads_beside_windows(kv: Any, page_size: int) -> DevicePoolGroup:
    """SGLang's assembler takes a window's pool beside recurrent states only."""
    full, window = _swa_layer_mappings(kv)
    entries = [
        _kv_entry(kv.full_kv_pool, full, page_size),
        assembler._mha_device_pool_entry(PoolName.SWA, kv.swa_kv_pool, window, page_size),
    ]
    return DevicePoolGroup(entries, max(*full, *window) + 1, page_size)


def _heads_beside_states(kv: Any, params: Any, page_size: int) -> DevicePoolGroup:
    """SGLang's assembler takes recurrent states beside latent rows only; beside heads they are the same."""
    start = kv.start_layer
    layers = {at - start: own for at, own in kv.full_attention_layer_id_mapping.items()}
    entries = [
        _kv_entry(kv.full_kv_pool, layers, page_size),
        assembler._mamba_device_pool_entry(params.req_to_token_pool, start),
    ]
    last = max(layer for entry in entries for layer in entry.layer_mapping)
    return DevicePoolGroup(entries, last + 1, page_size)


class DevicePool(Named):
    """One pool of a rank.

    Args:
        entry: SGLang's.
        sharding: where this rank stands.
        kv_heads: of the whole model; 0 where it is not known.

    Raises:
        NotImplementedError: its rows are not in one piece.
    """

    def __init__(self, entry: DevicePoolEntry, sharding: Sharding, kv_heads: int) -> None:
        self.entry = entry
        self.name = str(entry.name.value)
        self.span: int = entry._row_span
        self.pages, view = _pages(entry)
        super().__init__(describe(view, self.name, sharding, self.page_bytes, kv_heads))
        # Where every rank has the same pages, one of them stores them.
        is_own = self.identity.total_heads > 0 or "tp_rank" in self.identity.slices
        self.is_stored_here = is_own or sharding.tp_rank == 0

    @property
    def page_bytes(self) -> int:
        return self.pages.page_bytes

    def first_rows(self, indices: torch.Tensor) -> torch.Tensor:
        """int64 [page]: the first row of each page. Args: indices: of all tokens, or pages, page after page."""
        starts = indices.to(torch.int64).flatten()[:: self.entry.page_size]
        return starts if self.span > 1 else starts // self.entry.page_size


def _pages(entry: DevicePoolEntry) -> tuple[DevicePages, HostPool]:
    """Where its bytes lie in a record, and what its host pool would say of itself."""
    pool = entry.device_pool
    if isinstance(pool, MHATokenToKVPool) and not _is_by_token(pool):
        raise NotImplementedError(
            f"lmcache: pool {entry.name.value} has its heads before its tokens, which the direct path does not copy; "
            "unset SGLANG_USE_HND_KVCACHE, or take direct out"
        )
    if type(pool) is MHATokenToKVPool:
        runs, view = _heads(entry, pool)
    elif type(pool) is MLATokenToKVPool:
        runs, view = _latent(entry, pool)
    elif entry.name == PoolName.MAMBA:
        runs, view = _states(entry, pool)
    else:
        runs, view = _as_it_is(entry)
    copier = by_device(runs[0].buffer.device)
    return DevicePages(runs, entry._row_span, _layers(entry), copier), cast("HostPool", view)


def _is_by_token(pool: Any) -> bool:
    return str(pool._mha_buffers().layout.value) in BY_TOKEN


def _buffers(pool: Any) -> Sequence[torch.Tensor]:
    return cast("Sequence[torch.Tensor]", getattr(pool, "k_buffer", None) or pool.kv_buffer)


def _heads(entry: DevicePoolEntry, pool: Any) -> tuple[list[Run], SimpleNamespace]:
    info = pool._mha_buffer_info()
    keys = _rows_of_tokens(pool.k_buffer, 0)
    values = _rows_of_tokens(pool.v_buffer, keys[0].stride * entry.page_size)
    return keys + values, _view(
        "MHATokenToKVPoolHost",
        page_size=entry.page_size,
        dtype=info.dtype,
        start_layer=pool.start_layer,
        end_layer=pool.end_layer,
        layer_num=len(keys),
        head_num=info.head_num,
        head_dim=info.head_dim,
        v_head_dim=info.v_head_dim,
    )


def _latent(entry: DevicePoolEntry, pool: Any) -> tuple[list[Run], SimpleNamespace]:
    runs = _rows_of_tokens(pool.kv_buffer, 0)
    return runs, _view(
        "MLATokenToKVPoolHost",
        page_size=entry.page_size,
        dtype=pool.store_dtype,
        start_layer=pool.start_layer,
        end_layer=pool.end_layer,
        layer_num=len(runs),
        kv_lora_rank=pool.kv_lora_rank,
        qk_rope_head_dim=pool.qk_rope_head_dim,
    )


def _states(entry: DevicePoolEntry, pool: Any) -> tuple[list[Run], SimpleNamespace]:
    """A record is a state: each of its parts for all layers, one part after the other."""
    cache = pool.mamba_cache
    return _one_after_the_other(entry), _view(
        "MambaPoolHost",
        page_size=1,
        dtype=cache.conv[0].dtype,
        num_mamba_layers=cache.temporal.shape[0],
        conv_state_shapes=[state.shape[2:] for state in cache.conv],
        conv_dtype=cache.conv[0].dtype,
        temporal_state_shape=cache.temporal.shape[2:],
        temporal_dtype=cache.temporal.dtype,
    )


def _as_it_is(entry: DevicePoolEntry) -> tuple[list[Run], SimpleNamespace]:
    runs, first = _one_after_the_other(entry), entry.kv_buffer[0]
    view = _view(
        f"device {type(entry.device_pool).__name__}",
        page_size=entry.page_size,
        dtype=first.dtype,
        layer_num=len(runs),
        row_bytes=[run.width for run in runs],
    )
    view.layout = OWN_LAYOUT
    return runs, view


def _view(stands_for: str, **known: Any) -> SimpleNamespace:
    return SimpleNamespace(layout=PAGE_FIRST, dcp_size=1, stands_for=stands_for, **known)


def _rows_of_tokens(buffers: Sequence[torch.Tensor], start: int) -> list[Run]:
    """[token, layer, ...] of the layers' buffers, from `start` on."""
    widths = [buffer[0].nbytes for buffer in buffers]
    offsets = accumulate(widths, initial=start)
    return [Run(*each, sum(widths)) for each in zip(buffers, offsets, strict=False)]


def _one_after_the_other(entry: DevicePoolEntry) -> list[Run]:
    widths = [buffer[0].nbytes for buffer in entry.kv_buffer]
    offsets = accumulate((width * entry._row_span for width in widths), initial=0)
    return [
        Run(buffer, offset, width)
        for buffer, offset, width in zip(entry.kv_buffer, offsets, widths, strict=False)
    ]


def _layers(entry: DevicePoolEntry) -> dict[int, list[int]]:
    """Of each layer its buffers, counted over all components."""
    starts = [0, *accumulate(len(component) for component in entry.components)][:-1]
    return {
        layer: [start + own for start in starts for own in ([at] if isinstance(at, int) else at)]
        for layer, at in entry.layer_mapping.items()
    }
