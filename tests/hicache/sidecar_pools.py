"""SGLang's host pools that lie beside a KV pool or below a KV pool without memory, small, on CPU.

Each is made from SGLang's own device pool where that can be had without a GPU, and otherwise from what the host
pool's class takes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch

LAYERS = 3
ROW_BYTES = 96  # of a page of one layer, in pools that count bytes only
ALL_LAYOUTS = ("layer_first", "page_first", "page_first_direct")


def dsa_indexer(pages: int, page_size: int, layout: str) -> Any:
    """Index keys beside latent KV; of the middle layer there are none. Args: page_size: 64, as SGLang asks."""
    from sglang.srt.mem_cache.memory_pool import DSATokenToKVPool
    from sglang.srt.mem_cache.pool_host.dsa import DSAIndexerPoolHost, make_dsa_indexer_pool_decl
    from sglang.srt.runtime_context import get_parallel

    with get_parallel().override(attn_dcp_size=1):
        device_pool = DSATokenToKVPool(
            size=page_size,
            page_size=page_size,
            kv_lora_rank=16,
            dtype=torch.bfloat16,
            qk_rope_head_dim=8,
            layer_num=LAYERS,
            device="cpu",
            index_head_dim=128,
            enable_memory_saver=False,
            kv_cache_dim=24,
            skip_topk_layers=[layer == 1 for layer in range(LAYERS)],
        )
    decl = make_dsa_indexer_pool_decl(device_pool)
    return DSAIndexerPoolHost(decl, _anchor(pages, page_size, layout), pin_memory=False)


def qsa_indexer(pages: int, page_size: int, layout: str) -> Any:
    """Index keys of two tokens each beside the KV of a model with recurrent state."""
    from sglang.srt.mem_cache.pool_host.qsa import QSAIndexerPoolHost

    ratio, width = 2, 8
    groups = 2 * page_size // ratio
    device_pool = SimpleNamespace(  # of QSATokenToKVPool, which wants a pool of recurrent state
        qsa_compress_ratio=ratio,
        qsa_compressed_k_buffer_pool=[
            torch.zeros(groups, 1, width, dtype=torch.bfloat16) for _ in range(LAYERS)
        ],
    )
    return QSAIndexerPoolHost(device_pool, _anchor(pages, page_size, layout))


def key_only(pages: int, page_size: int, layout: str) -> Any:
    """Index keys of MiniMax M3, in rows of tokens."""
    from sglang.srt.mem_cache.memory_pool import MHATokenToKOnlyPool
    from sglang.srt.mem_cache.pool_host.mha import MHATokenToKOnlyPoolHost

    device_pool = MHATokenToKOnlyPool(
        page_size, page_size, torch.bfloat16, 1, 8, LAYERS, "cpu", enable_memory_saver=False
    )
    anchor = _anchor(pages, page_size, layout)
    return MHATokenToKOnlyPoolHost(device_pool, anchor, layout, pin_memory=False)


def nvfp4_main(pages: int, page_size: int, layout: str) -> Any:
    """K and V of MiniMax M3 in four bits, with their scales. Args: page_size: 128, as SGLang asks."""
    from sglang.srt.mem_cache.minimax_m3_nvfp4_pool import MiniMaxM3Nvfp4MainKVPool
    from sglang.srt.mem_cache.pool_host.minimax_m3_nvfp4 import MiniMaxM3Nvfp4MainKVPoolHost

    device_pool = MiniMaxM3Nvfp4MainKVPool(
        page_size, page_size, torch.bfloat16, 1, 128, LAYERS, "cpu", enable_memory_saver=False
    )
    return MiniMaxM3Nvfp4MainKVPoolHost(
        device_pool.get_device_pool_infos()[0].buffer_info,
        float(pages),
        0,
        page_size,
        layout,
        pin_memory=False,
        device_capacity_tokens=page_size,
        start_layer=0,
        end_layer=LAYERS,
    )


def nvfp4_index(pages: int, page_size: int, layout: str) -> Any:
    """Index keys of MiniMax M3 in four bits, with their scales. Args: page_size: as `nvfp4_main`."""
    from sglang.srt.mem_cache.minimax_m3_nvfp4_pool import MiniMaxM3Nvfp4IndexKPool
    from sglang.srt.mem_cache.pool_host.minimax_m3_nvfp4 import MiniMaxM3Nvfp4IndexKPoolHost

    device_pool = MiniMaxM3Nvfp4IndexKPool(
        page_size, page_size, torch.bfloat16, 1, 128, LAYERS, "cpu", enable_memory_saver=False
    )
    return MiniMaxM3Nvfp4IndexKPoolHost(
        device_pool.get_device_pool_infos()[0].buffer_info,
        nvfp4_main(pages, page_size, layout),
        layout,
        pin_memory=False,
        start_layer=0,
        end_layer=LAYERS,
    )


def paged(pages: int, page_size: int, layout: str) -> Any:
    """DeepSeek V4's pools: rows of bytes, a page each."""
    from sglang.srt.mem_cache.memory_pool_host import DeepSeekV4PagedHostPool

    rows = [torch.empty(2, ROW_BYTES, dtype=torch.uint8) for _ in range(LAYERS)]
    return DeepSeekV4PagedHostPool(
        "paged", rows, ROW_BYTES, pages, page_size, layout, pin_memory=False
    )


def compress_state(pages: int, page_size: int, layout: str) -> Any:
    """What DeepSeek V4 has not yet compressed, a ring of it with each page of the window."""
    from sglang.srt.mem_cache.deepseek_v4_compress_state import CompressStatePool
    from sglang.srt.mem_cache.memory_pool_host import DeepSeekV4StateHostPool

    rings = [
        CompressStatePool(
            size=16,
            ring_size=8,
            overlap=True,
            head_dim=4,
            dtype=torch.float32,
            device="cpu",
            enable_memory_saver=False,
            ratio=4,
            swa_page_size=page_size,
        )
        for _ in range(LAYERS)
    ]
    return DeepSeekV4StateHostPool("state", rings, pages, page_size, layout, pin_memory=False)


def logical(pages: int, page_size: int, layout: str) -> Any:
    """DeepSeek V4's KV pool: it gives out indices, and has no memory."""
    from sglang.srt.mem_cache.memory_pool_host import LogicalHostPool

    return LogicalHostPool(pages * page_size, page_size, layout)


def envelopes(pages: int, page_size: int, layout: str) -> tuple[Any, Any]:
    """SGLang's unified memory: two host pools in one piece of memory, which the first of them owns."""
    from sglang.srt.mem_cache.pool_host.unified import UnifiedPageEnvelopeHostPool

    rows = torch.zeros(pages, ROW_BYTES, dtype=torch.uint8)
    device_pools = [
        SimpleNamespace(
            get_page_envelope_buffer=lambda: rows,
            get_contiguous_buf_infos=lambda: ([rows.data_ptr()], [rows.nbytes], [ROW_BYTES]),
            page_size=page_size,
            size=pages * page_size,
            host_capacity_tokens=None,
            grow_direction=direction,
            start_layer=0,
            end_layer=LAYERS,
        )
        for direction in ("up", "down")
    ]
    owner, other = UnifiedPageEnvelopeHostPool.build_hybrid_swa_pool_pair(
        device_pools=device_pools,
        host_to_device_ratio=1.0,
        host_size=0,
        page_size=page_size,
        layout=layout,
        allocator_type="default",
        pin_memory=False,
    )
    return owner, other


def _anchor(pages: int, page_size: int, layout: str) -> Any:
    """What an indexer's pool takes of the KV pool that its pages lie beside."""
    return SimpleNamespace(
        page_size=page_size,
        layout=layout,
        page_num=pages,
        size=pages * page_size,
        device="cpu",
        pin_memory=False,
    )


MAKERS: Mapping[str, Callable[[int, int, str], Any]] = {
    "dsa_indexer": dsa_indexer,
    "qsa_indexer": qsa_indexer,
    "key_only": key_only,
    "nvfp4_main": nvfp4_main,
    "nvfp4_index": nvfp4_index,
    "logical": logical,
    "paged": paged,
    "compress_state": compress_state,
}
