"""The causal depthwise convolution of recurrent layers, in torch.

Stock SGLang has it in CUDA and Triton only, and no name for it at all in layers/attention/mamba/mamba.py
once the CPU is chosen. Same names, arguments and effect as in
`sglang.srt.layers.attention.mamba.causal_conv1d`; speculative decoding's arguments are left out.

A state is the last `width - 1` inputs of a sequence; `conv_states` is [slot, dim, width - 1], and
both functions leave there what the next token needs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv1d, silu


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    query_start_loc: Tensor | None = None,
    cache_indices: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    conv_states: Tensor | None = None,
    activation: str | None = "silu",
    **_: Any,
) -> Tensor:
    """[dim, token] of the sequences in x, which begin at `query_start_loc` ([sequence + 1]).

    A sequence goes on from its slot's state where `has_initial_state` says so.
    """
    assert query_start_loc is not None and cache_indices is not None and conv_states is not None
    bounds = query_start_loc.tolist()
    output = torch.empty_like(x)
    for number, slot in enumerate(cache_indices.tolist()):
        tokens = slice(bounds[number], bounds[number + 1])
        resumes = has_initial_state is not None and bool(has_initial_state[number])
        before = conv_states[slot] if resumes else torch.zeros_like(conv_states[slot])
        window = torch.cat([before.to(x.dtype), x[:, tokens]], dim=-1)
        convolved = conv1d(window[None], weight[:, None], bias, groups=len(weight))[0]
        output[:, tokens] = _activated(convolved, activation)
        conv_states[slot] = window[:, window.shape[-1] - before.shape[-1] :]
    return output


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """[sequence, dim] of one new token a sequence."""
    assert cache_seqlens is None and conv_state_indices is not None
    slots = conv_state_indices.long()
    window = torch.cat([conv_state[slots].to(x.dtype), x[:, :, None]], dim=-1)
    conv_state[slots] = window[:, :, 1:].to(conv_state.dtype)
    convolved = conv1d(window, weight[:, None], bias, groups=len(weight))[:, :, 0]
    return _activated(convolved, activation)


def _activated(x: Tensor, activation: str | None) -> Tensor:
    return silu(x) if activation in ("silu", "swish") else x
