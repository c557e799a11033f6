"""The recurrence of Mamba-2 against its other form, a sum over all tokens before."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from lmcache_sglang.testing.sglang_cpu.state_space import (
    mamba_chunk_scan_combined,
    selective_state_update,
)

HEADS, DIM, STATE, GROUPS = 4, 3, 5, 2
LENGTHS = (9, 4)


@dataclass
class Inputs:
    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    bias: Tensor


def test_the_scan_is_the_sum_over_all_tokens_before() -> None:
    """y_t = sum over s <= t of (C_t B_s) exp(A times the steps between) dt_s x_s, plus D x_t."""
    inputs = _random()
    output, _ = _scan(inputs, 0, sum(LENGTHS), LENGTHS, None)
    step = softplus(inputs.dt + inputs.bias)
    begins = [0, LENGTHS[0]]
    for token in range(sum(LENGTHS)):
        begin = max(start for start in begins if start <= token)
        for head in range(HEADS):
            group = head // (HEADS // GROUPS)
            expected = inputs.D[head] * inputs.x[token, head]
            for before in range(begin, token + 1):
                decay = torch.exp(inputs.A[head] * step[before + 1 : token + 1, head].sum())
                weight = inputs.C[token, group] @ inputs.B[before, group]
                expected += weight * decay * step[before, head] * inputs.x[before, head]
            torch.testing.assert_close(output[token, head], expected)


def test_a_sequence_that_goes_on_gives_the_very_same_numbers() -> None:
    inputs, tokens = _random(), LENGTHS[0]
    whole, ends = _scan(inputs, 0, tokens, (tokens,), None)
    start, state = _scan(inputs, 0, 4, (4,), None)
    rest, end = _scan(inputs, 4, tokens, (tokens - 4,), state)
    assert torch.equal(torch.cat([start, rest]), whole)
    assert torch.equal(end, ends)


def test_one_token_at_a_time_is_the_same_too() -> None:
    inputs, tokens = _random(), LENGTHS[0]
    whole, ends = _scan(inputs, 0, tokens, (tokens,), None)
    slots = torch.full((3, HEADS, DIM, STATE), 7.0)
    slots[2] = _scan(inputs, 0, 6, (6,), None)[1][0]
    for token in range(6, tokens):
        out = torch.empty(1, HEADS, DIM)
        each = slice(token, token + 1)
        selective_state_update(
            slots,
            inputs.x[each],
            inputs.dt[each, :, None].expand(-1, -1, DIM),
            inputs.A[:, None, None].expand(-1, DIM, STATE),
            inputs.B[each],
            inputs.C[each],
            inputs.D[:, None].expand(-1, DIM),
            dt_bias=inputs.bias[:, None].expand(-1, DIM),
            dt_softplus=True,
            state_batch_indices=torch.tensor([2], dtype=torch.int32),
            out=out,
        )
        torch.testing.assert_close(out[0], whole[token])
    torch.testing.assert_close(slots[2], ends[0])
    assert (slots[:2] == 7.0).all()


def _scan(
    inputs: Inputs, begin: int, end: int, lengths: tuple[int, ...], initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    span = slice(begin, end)
    out = torch.empty(1, end - begin, HEADS, DIM)
    _, states, _ = mamba_chunk_scan_combined(
        inputs.x[None, span],
        inputs.dt[None, span],
        inputs.A,
        inputs.B[None, span],
        inputs.C[None, span],
        chunk_size=4,
        D=inputs.D,
        dt_bias=inputs.bias,
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
        initial_states=initial,
        out=out,
        state_dtype=torch.float32,
    )
    return out[0], states


def _random() -> Inputs:
    random, tokens = torch.Generator().manual_seed(0), sum(LENGTHS)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    both = some(2, tokens, GROUPS, STATE)
    decay = -torch.exp(some(HEADS))
    x, dt = some(tokens, HEADS, DIM), some(tokens, HEADS)
    return Inputs(x, dt, decay, both[0], both[1], some(HEADS), some(HEADS))
