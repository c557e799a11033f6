"""The convolution of recurrent layers: what a sequence gives does not depend on where it was cut."""

from __future__ import annotations

import torch
from torch import Tensor

from lmcache_sglang.testing.sglang_cpu.convolution import causal_conv1d_fn, causal_conv1d_update

DIM, WIDTH, SLOTS = 6, 4, 5
LENGTHS = (7, 1, 12)


def test_each_output_is_the_weighted_sum_of_the_inputs_before_it() -> None:
    x, weight, bias = _random()
    output = _convolve(x, weight, bias, torch.zeros(SLOTS, DIM, WIDTH - 1))
    start = 0
    for length in LENGTHS:
        for token in range(length):
            expected = bias.clone()
            for back in range(min(WIDTH, token + 1)):
                expected += weight[:, WIDTH - 1 - back] * x[:, start + token - back]
            got = output[:, start + token]
            torch.testing.assert_close(got, expected * torch.sigmoid(expected))
        start += length


def test_sequences_go_on_from_their_slots() -> None:
    x, weight, bias = _random()
    whole = torch.zeros(SLOTS, DIM, WIDTH - 1)
    expected = _convolve(x, weight, bias, whole)
    cut = torch.full((SLOTS, DIM, WIDTH - 1), 9.0)  # of who had the slots before
    sequences = torch.split(x, list(LENGTHS), dim=1)
    for first in (2, 1):
        rest = _convolve_one(sequences[first], weight, bias, cut, slot=first)
        start = sum(LENGTHS[:first])
        torch.testing.assert_close(rest, expected[:, start : start + LENGTHS[first]])
        torch.testing.assert_close(cut[first], whole[_slot_of(first)])


def _convolve_one(x: Tensor, weight: Tensor, bias: Tensor, states: Tensor, slot: int) -> Tensor:
    """In three parts: a start, what follows it, and the last token alone."""
    parts, tokens = [], x.shape[1]
    half = tokens // 2
    for begin, end in ((0, half), (half, tokens - 1)):
        if end > begin:
            parts.append(
                causal_conv1d_fn(
                    x[:, begin:end],
                    weight,
                    bias,
                    query_start_loc=torch.tensor([0, end - begin]),
                    cache_indices=torch.tensor([slot]),
                    has_initial_state=torch.tensor([begin > 0]),
                    conv_states=states,
                )
            )
    if tokens == 1:
        states[slot] = 0
    at = torch.tensor([slot], dtype=torch.int32)
    last = causal_conv1d_update(
        x[:, -1:].T, states, weight, bias, activation="silu", conv_state_indices=at
    )
    return torch.cat([*parts, last.T], dim=1)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor, states: Tensor) -> Tensor:
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0)
    slots = torch.tensor([_slot_of(number) for number in range(len(LENGTHS))])
    return causal_conv1d_fn(
        x,
        weight,
        bias,
        query_start_loc=bounds,
        cache_indices=slots,
        has_initial_state=torch.zeros(len(LENGTHS), dtype=torch.bool),
        conv_states=states,
    )


def _slot_of(number: int) -> int:
    return (4, 2, 3)[number]


def _random() -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(DIM, sum(LENGTHS), generator=random)
    return x, torch.randn(DIM, WIDTH, generator=random), torch.randn(DIM, generator=random)
