"""The CPU attention of the stand-ins gives what stock SGLang's gives, without the wasted rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lmcache_sglang.testing.sglang_cpu.attention import extend

HEADS, KV_HEADS, DIM, SLOTS = 4, 2, 16, 64


@pytest.mark.usefixtures("sglang")
@pytest.mark.parametrize("window", [None, 3, 40])
@pytest.mark.parametrize("prefixes", [(0, 0), (5, 0), (7, 12)])
def test_extension_equals_stock(prefixes: tuple[int, ...], window: int | None) -> None:
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    random = torch.Generator().manual_seed(0)
    news = (4, 3)
    query = torch.randn(sum(news), HEADS, DIM, generator=random)
    key, value = torch.randn(2, SLOTS, KV_HEADS, DIM, generator=random)
    slots = torch.randperm(SLOTS, generator=random).view(2, SLOTS // 2)
    totals = [prefix + new for prefix, new in zip(prefixes, news, strict=True)]
    tables = (slots, torch.tensor([1, 0]), *map(torch.tensor, (totals, prefixes, news)))
    options: dict[str, Any] = {"causal": True, "enable_gqa": True, "sliding_window_size": window}
    backend = TorchNativeAttnBackend.__new__(TorchNativeAttnBackend)
    stock = TorchNativeAttnBackend._run_sdpa_forward_extend

    def run(function: Any, *first: Any) -> torch.Tensor:
        output = torch.empty_like(query)
        result: torch.Tensor = function(*first, query, output, key, value, *tables, **options)
        return result

    torch.testing.assert_close(run(extend, stock, backend), run(stock, backend))
