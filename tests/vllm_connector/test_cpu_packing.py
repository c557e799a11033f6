"""What vLLM's own operation writes is found where the packing says."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm")

from lmcache_sglang.vllm_connector import cpu_packing
from lmcache_sglang.vllm_connector.cpu_packing import UnknownPackingError, packing_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("block_size", "head_dim"), [(32, 32), (32, 128), (64, 80), (128, 64)])
def test_it_is_where_the_numbers_are(dtype: torch.dtype, block_size: int, head_dim: int) -> None:
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    heads, blocks = 3, 4
    k, v = torch.randn(2, block_size, heads, head_dim).to(dtype)
    cache = torch.zeros((blocks, heads, 2 * block_size, head_dim), dtype=dtype)
    slots = torch.arange(block_size, dtype=torch.int64) + 2 * block_size
    isa = _get_attn_isa(dtype, block_size, head_dim, "auto")
    halves = cache.chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(
        k, v, *halves, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
    )
    for given, packing in zip((k, v), packing_of(dtype, block_size, head_dim), strict=True):
        kept = cache[2].as_strided(
            (block_size, heads, head_dim),
            (packing.token, 2 * block_size * head_dim, packing.dim),
            cache[2].storage_offset() + packing.origin,
        )
        assert torch.equal(kept, given)


def test_an_order_without_strides_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = cpu_packing._written
    shuffled = torch.randperm(2 * 32 * 32)
    monkeypatch.setattr(cpu_packing, "_written", lambda *given: real(*given)[shuffled])
    with pytest.raises(UnknownPackingError, match="no strides"):
        packing_of(torch.float32, 32, 32)


def test_another_form_of_the_numbers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = cpu_packing._written
    monkeypatch.setattr(cpu_packing, "_written", lambda *given: real(*given) * 2)
    with pytest.raises(UnknownPackingError, match="another form"):
        packing_of(torch.float32, 32, 32)
