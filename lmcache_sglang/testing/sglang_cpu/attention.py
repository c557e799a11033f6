"""SGLang's attention in torch, for the new tokens of a prompt only.

Stock `TorchNativeAttnBackend` lays the new queries under as many empty ones as the prefix has
tokens and computes all rows: a prompt whose prefix was cached pays for the whole of its attention
again, and so does each chunk of a long prompt. The GPU backends do not; this one then does not
either, and a time measured on CPU says something about the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

EXTEND = (
    "sglang.srt.layers.attention.torch_native_backend"
    ".TorchNativeAttnBackend._run_sdpa_forward_extend"
)


def extend(
    original: Callable[..., Tensor],
    backend: Any,
    query: Tensor,
    output: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    req_to_token: Tensor,
    req_pool_indices: Tensor,
    seq_lens: Tensor,
    prefix_lens: Tensor,
    extend_lens: Tensor,
    encoder_lens: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """An AROUND hook. What has no prefix, or is not causal, is left to `original`.

    query and output are [token, head, dim], the requests one after the other; the caches are
    [slot, head, dim], and `req_to_token` names the slots of each request's tokens in order.
    """
    lengths = (req_pool_indices, seq_lens, prefix_lens, extend_lens)
    if encoder_lens is not None or not options.get("causal") or not prefix_lens.any():
        caches = (k_cache, v_cache, req_to_token)
        return original(backend, query, output, *caches, *lengths, encoder_lens, **options)
    start = 0
    for request, total, prefix, new in zip(*(part.tolist() for part in lengths), strict=True):
        first = max(0, prefix - _window(options, total))
        slots = req_to_token[request, first:total]
        rows = slice(start, start + new)
        output[rows] = _attend(query[rows], k_cache[slots], v_cache[slots], options)
        start += new
    return output


def _attend(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
    """[token, head, dim] of the last tokens of `key`, each seeing itself and what came before."""
    attended = scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        key.to(query.dtype).transpose(0, 1)[None],
        value.to(query.dtype).transpose(0, 1)[None],
        attn_mask=_mask(len(query), len(key), _window(options, len(key))),
        scale=options.get("scaling"),
        enable_gqa=options.get("enable_gqa", False),
    )
    return attended[0].transpose(0, 1)


def _mask(new: int, total: int, window: int) -> Tensor:
    """[new, total], true where a token is seen: none later, none more than `window` before."""
    distance = torch.arange(total - new, total)[:, None] - torch.arange(total)
    return (distance >= 0) & (distance <= window)


def _window(options: dict[str, Any], total: int) -> int:
    window: int | None = options.get("sliding_window_size")
    return total if window is None or window < 0 else window
