"""SGLang's own device pools and allocators of one rank, small, on CPU, without a model.

The four families of models that SGLang keeps in pools of different kinds: plain heads (`mha`), latent rows
(`mla`), a pool of their own for layers with a window (`swa`), and recurrent state beside the KV (`mamba`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

LAYERS = 4
FULL_LAYERS = [1, 3]  # of a model with a window or with state
OTHER_LAYERS = [0, 2]
HEADS, HEAD_DIM = 2, 8  # KV heads of the whole model
WINDOW_PAGES = 2
POOL_PAGES = 48
STATES = 16
DTYPE = torch.bfloat16


@dataclass(frozen=True, slots=True)
class Family:
    """What one rank holds of a model.

    Args:
        name: "mha", "mla", "swa" or "mamba".
        page_size: in tokens.
        ranks: of tensor parallelism; each has an equal part of the heads.
    """

    name: str
    page_size: int
    ranks: int = 1

    @property
    def heads(self) -> int:
        return HEADS // self.ranks

    @property
    def tokens(self) -> int:
        """Slots of the device pool."""
        return POOL_PAGES * self.page_size

    @property
    def window(self) -> int | None:
        """Tokens that a layer with a window looks back."""
        return WINDOW_PAGES * self.page_size if self.name == "swa" else None

    @property
    def tracks_states(self) -> bool:
        """Whether recurrent state is kept of places inside a prompt: SGLang asks it for pages of many tokens."""
        return self.name == "mamba" and self.page_size > 1


@dataclass(frozen=True, slots=True)
class DevicePools:
    """What a tree is built on: SGLang's `ReqToTokenPool`, allocator and `KVCache`."""

    requests: Any
    allocator: Any
    kv: Any

    def take(self, family: Family, tokens: int) -> torch.Tensor:
        """Slots for so many tokens, whole pages. Raises: AssertionError: the pool is full."""
        slots: torch.Tensor | None
        if family.name == "swa" and family.page_size > 1:  # its own alloc is for pages of one token
            slots = self.allocator.full_attn_allocator.alloc(tokens)
            of_window = self.allocator.swa_attn_allocator.alloc(tokens)
            self.allocator.full_to_swa_index_mapping[slots] = of_window
        else:
            slots = self.allocator.alloc(tokens)
        assert slots is not None
        return slots

    def take_state(self, family: Family) -> torch.Tensor | None:
        """A slot for recurrent state, shape [1]; None for a model that has none."""
        if family.name != "mamba":
            return None
        slot: torch.Tensor | None = self.requests.mamba_allocator.alloc(1)
        assert slot is not None
        return slot

    def token_pools(self) -> dict[str, list[torch.Tensor]]:
        """The memory of each pool of tokens: a tensor [slot, ...] for each of K and V of each layer."""
        full = getattr(self.kv, "full_kv_pool", self.kv)
        pools = {"kv": _layers(full)}
        if hasattr(self.kv, "swa_kv_pool"):
            pools["swa"] = _layers(self.kv.swa_kv_pool)
        return pools

    def states(self) -> list[torch.Tensor]:
        """The memory of recurrent states: tensors [layer, slot, ...]."""
        pool = getattr(self.requests, "mamba_pool", None)
        return [] if pool is None else [pool.mamba_cache.temporal, *pool.mamba_cache.conv]

    def memory(self) -> list[torch.Tensor]:
        return [layer for layers in self.token_pools().values() for layer in layers] + self.states()


def _layers(pool: Any) -> list[torch.Tensor]:
    if hasattr(pool, "k_buffer"):
        return [*pool.k_buffer, *pool.v_buffer]
    return list(pool.kv_buffer)


def device_pools(family: Family) -> DevicePools:
    return _MAKERS[family.name](family)


def components(family: Family) -> tuple[Any, ...]:
    """SGLang's `ComponentType`s of the tree, as registry.create_unified_radix_cache chooses them."""
    from sglang.srt.mem_cache.unified_cache.components import ComponentType

    further = {"swa": (ComponentType.SWA,), "mamba": (ComponentType.MAMBA,)}
    return (ComponentType.FULL, *further.get(family.name, ()))


def _mha(family: Family) -> DevicePools:
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    kv = MHATokenToKVPool(
        **_sizes(family), **_heads(family), layer_num=LAYERS, enable_memory_saver=False
    )
    return DevicePools(_requests(), _allocator(family, kv), kv)


def _mla(family: Family) -> DevicePools:
    from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

    kv = MLATokenToKVPool(
        **_sizes(family),
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        layer_num=LAYERS,
        enable_memory_saver=False,
    )
    return DevicePools(_requests(), _allocator(family, kv), kv)


def _swa(family: Family) -> DevicePools:
    from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

    kv = SWAKVPool(
        **_sizes(family),
        **_heads(family),
        size_swa=family.tokens,
        swa_attention_layer_ids=OTHER_LAYERS,
        full_attention_layer_ids=FULL_LAYERS,
    )
    allocator = SWATokenToKVPoolAllocator(
        **_sizes(family), size_swa=family.tokens, kvcache=kv, need_sort=False
    )
    return DevicePools(_requests(), allocator, kv)


def _mamba(family: Family) -> DevicePools:
    from sglang.srt.configs.mamba_utils import Mamba2CacheParams, Mamba2StateShape
    from sglang.srt.mem_cache.memory_pool import HybridLinearKVPool, HybridReqToTokenPool

    shape = Mamba2StateShape.create(
        tp_world_size=family.ranks,
        intermediate_size=32,
        n_groups=1,
        num_heads=2,
        head_dim=16,
        state_size=8,
        conv_kernel=4,
    )
    requests = HybridReqToTokenPool(
        size=STATES,
        mamba_size=STATES,
        mamba_spec_state_size=STATES,
        max_context_len=POOL_PAGES * 64,
        device="cpu",
        enable_memory_saver=False,
        cache_params=Mamba2CacheParams(shape=shape, layers=OTHER_LAYERS),
        mamba_layer_ids=OTHER_LAYERS,
        enable_mamba_extra_buffer=family.page_size > 1,
        speculative_num_draft_tokens=None,
    )
    kv = HybridLinearKVPool(
        **_sizes(family),
        **_heads(family),
        full_attention_layer_ids=FULL_LAYERS,
        enable_memory_saver=False,
        mamba_pool=requests.mamba_pool,
    )
    return DevicePools(requests, _allocator(family, kv), kv)


_MAKERS: Mapping[str, Callable[[Family], DevicePools]] = {
    "mha": _mha,
    "mla": _mla,
    "swa": _swa,
    "mamba": _mamba,
}


def _requests() -> Any:
    from sglang.srt.mem_cache.memory_pool import ReqToTokenPool

    return ReqToTokenPool(
        size=STATES, max_context_len=POOL_PAGES * 64, device="cpu", enable_memory_saver=False
    )


def _allocator(family: Family, kv: Any) -> Any:
    from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
    from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator

    sizes = _sizes(family)
    if family.page_size > 1:
        return PagedTokenToKVPoolAllocator(**sizes, kvcache=kv, need_sort=False)
    del sizes["page_size"]
    return TokenToKVPoolAllocator(**sizes, kvcache=kv, need_sort=False)


def _sizes(family: Family) -> dict[str, Any]:
    return {
        "size": family.tokens,
        "page_size": family.page_size,
        "dtype": DTYPE,
        "device": "cpu",
    }


def _heads(family: Family) -> dict[str, Any]:
    return {"head_num": family.heads, "head_dim": HEAD_DIM}
