"""SGLang's attention in torch, over the tokens that a query may see and no others.

Stock `TorchNativeAttnBackend` lays the new queries under as many empty ones as the prefix has
tokens and computes all rows: a prompt whose prefix was cached pays for the whole of its attention
again, and so does each chunk of a long prompt. The GPU backends do not; this one then does not
either, and a time measured on CPU says something about the cache.

It also reads a layer with a sliding window from the slots that the whole sequence has in the pool of
the other layers. In a model with a pool for each (SWAKVPool) these are other tokens' rows, or none's:
`forward_extend` and `forward_decode` translate where they write and not where they read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

_BACKEND = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"
MADE = f"{_BACKEND}.__init__"
EXTEND = f"{_BACKEND}._run_sdpa_forward_extend"
DECODE = f"{_BACKEND}._run_sdpa_forward_decode"


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
    """An AROUND hook. What has neither prefix nor window, or is not causal, is left to `original`.

    query and output are [token, head, dim], the requests one after the other; the caches are
    [slot, head, dim], and `req_to_token` names the slots of each request's tokens in order.
    """
    caches = (k_cache, v_cache, req_to_token)
    lengths = (req_pool_indices, seq_lens, prefix_lens, extend_lens)
    cut = prefix_lens.any() or _has_window(options)
    if encoder_lens is not None or not options.get("causal") or not cut:
        return original(backend, query, output, *caches, *lengths, encoder_lens, **options)
    return _attend_all(backend, query, output, caches, lengths, options)


def decode(
    original: Callable[..., Tensor],
    backend: Any,
    query: Tensor,
    output: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    req_to_token: Tensor,
    req_pool_indices: Tensor,
    seq_lens: Tensor,
    encoder_lens: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """An AROUND hook, as `extend` with one new token a request. Without a window: `original`."""
    caches = (k_cache, v_cache, req_to_token)
    if encoder_lens is not None or not _has_window(options):
        lengths: tuple[Tensor, ...] = (req_pool_indices, seq_lens)
        return original(backend, query, output, *caches, *lengths, encoder_lens, **options)
    lengths = (req_pool_indices, seq_lens, seq_lens - 1, torch.ones_like(seq_lens))
    return _attend_all(backend, query, output, caches, lengths, options)


def _attend_all(
    backend: Any,
    query: Tensor,
    output: Tensor,
    caches: tuple[Tensor, Tensor, Tensor],
    lengths: tuple[Tensor, ...],
    options: dict[str, Any],
) -> Tensor:
    k_cache, v_cache, req_to_token = caches
    start = 0
    for request, total, prefix, new in zip(*(part.tolist() for part in lengths), strict=True):
        first = max(0, prefix - _window(options, total))
        slots = _slots_of_layer(backend, req_to_token[request, first:total], options)
        rows = slice(start, start + new)
        output[rows] = _attend(query[rows], k_cache[slots], v_cache[slots], options)
        start += new
    return output


def _slots_of_layer(backend: Any, slots: Tensor, options: dict[str, Any]) -> Tensor:
    """Where the layer that asks has these tokens: layers with a window may have a pool of their own."""
    if not _has_window(options) or not getattr(backend, "use_sliding_window_kv_pool", False):
        return slots
    translated: Tensor = backend.token_to_kv_pool.translate_loc_from_full_to_swa(slots)
    return translated


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


def _has_window(options: dict[str, Any]) -> bool:
    window: int | None = options.get("sliding_window_size")
    return window is not None and window >= 0


def _window(options: dict[str, Any], total: int) -> int:
    """Tokens before itself that a token sees."""
    return int(options["sliding_window_size"]) if _has_window(options) else total
