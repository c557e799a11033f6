"""Mamba-2's recurrence in torch, token by token.

Stock SGLang has it in Triton only. Same names, arguments and effect as the functions of
`sglang.kernels.ops.mamba.triton_ops` that layers/attention/mamba/mamba.py calls without speculative
decoding and without states tracked inside a prompt (`--mamba-radix-cache-strategy extra_buffer`).

Unlike the chunked scan of the GPU, it gives the same numbers wherever a sequence is cut in two, so a
state that comes from a cache may be asked for exactly the tokens of a state that was computed.

    h = exp(dt A) h + dt x B        y = h C + D x        dt = softplus(dt + bias)

h is [head, dim, state]; B and C are shared by the heads of a group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor,
    dt_bias: Tensor,
    cu_seqlens: Tensor,
    initial_states: Tensor | None,
    out: Tensor,
    state_dtype: torch.dtype,
    **_: Any,
) -> tuple[None, Tensor, None]:
    """Fill `out`; return None, the state after each sequence, None: no states within a prompt.

    x and out are [1, token, head, dim], dt [1, token, head], A, D and dt_bias [head], B and C
    [1, token, group, state], the states [sequence, head, dim, state].
    """
    heads, dim, size = x.shape[2], x.shape[3], B.shape[3]
    bounds = cu_seqlens.tolist()
    states = torch.zeros(len(bounds) - 1, heads, dim, size)
    if initial_states is not None:
        states = initial_states.float().clone()
    for number, state in enumerate(states):
        for token in range(bounds[number], bounds[number + 1]):
            step = softplus(dt[0, token].float() + dt_bias)[:, None]
            keys, queries = (_of_heads(part[0, token], heads) for part in (B, C))
            decay, values = A[:, None, None], x[0, token].float()
            out[0, token] = _step(state, values, step, decay, keys, queries, D[:, None])
    return None, states.to(state_dtype), None


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    *,
    state_batch_indices: Tensor,
    out: Tensor,
) -> None:
    """Fill `out` for one new token a sequence, and move its slot's state on.

    state is [slot, head, dim, state]; x, dt and out [sequence, head, dim], A [head, dim, state], B and C
    [sequence, group, state], D and dt_bias [head, dim].
    """
    assert z is None and dt_softplus and dt_bias is not None
    for number, slot in enumerate(state_batch_indices.tolist()):
        current = state[slot].float()
        step = softplus(dt[number].float() + dt_bias)
        keys, queries = (_of_heads(part[number], x.shape[1]) for part in (B, C))
        out[number] = _step(current, x[number].float(), step, A, keys, queries, D)
        state[slot] = current.to(state.dtype)


def _step(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> Tensor:
    """Move `state` on in place by one token; what is said of that token, [head, dim]."""
    state *= torch.exp(dt[..., None] * A)
    state += (dt * x)[..., None] * B[:, None]
    return (state * C[:, None]).sum(-1) + D * x


def _of_heads(parts: Tensor, heads: int) -> Tensor:
    """[head, state] of [group, state]."""
    return parts.float().repeat_interleave(heads // len(parts), dim=0)
