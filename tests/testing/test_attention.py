"""The CPU attention of the stand-ins gives what stock SGLang's gives, without the wasted rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lmcache_sglang.testing.sglang_cpu.attention import decode, extend

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


@pytest.mark.usefixtures("sglang")
@pytest.mark.parametrize("window", [3, 40])
@pytest.mark.parametrize("new", [1, 4])
def test_a_layer_with_a_window_reads_from_its_own_pool(window: int, new: int) -> None:
    """The slots of the other layers' pool hold another token's rows there, or nothing."""
    random = torch.Generator().manual_seed(1)
    total = 12
    query = torch.randn(new, HEADS, DIM, generator=random)
    key, value = torch.randn(2, SLOTS, KV_HEADS, DIM, generator=random)
    slots = torch.randperm(SLOTS, generator=random)[None]
    lengths = tuple(torch.tensor([number]) for number in (0, total, total - new, new))
    options: dict[str, Any] = {"enable_gqa": True, "sliding_window_size": window}
    expected = extend(
        _never, _Backend(None), query, torch.empty_like(query), key, value, slots, *lengths,
        causal=True, **options,
    )  # fmt: skip
    moved = torch.randperm(SLOTS, generator=random)
    own_key, own_value = (torch.full_like(part, float("nan")) for part in (key, value))
    seen = slots[0, max(0, total - new - window) : total]
    own_key[moved[seen]], own_value[moved[seen]] = key[seen], value[seen]
    backend = _Backend(moved)
    output = torch.empty_like(query)
    if new == 1:
        decode(_never, backend, query, output, own_key, own_value, slots, *lengths[:2], **options)
    else:
        extend(
            _never, backend, query, output, own_key, own_value, slots, *lengths, causal=True,
            **options,
        )  # fmt: skip
    torch.testing.assert_close(output, expected)


def _never(*_: Any, **__: Any) -> torch.Tensor:
    raise AssertionError("stock attention reads the wrong rows here")


class _Backend:
    """Of a model whose layers with a window have a pool of their own, or share the others'."""

    def __init__(self, moved: torch.Tensor | None) -> None:
        self.use_sliding_window_kv_pool = moved is not None
        self.token_to_kv_pool = self
        self._moved = moved

    def translate_loc_from_full_to_swa(self, slots: torch.Tensor) -> torch.Tensor:
        assert self._moved is not None
        return self._moved[slots]
