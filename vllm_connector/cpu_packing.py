"""In what order vLLM's attention on a CPU keeps the numbers of a block.

Its views say [block, head, token, K and V], but the kernels behind them (csrc/cpu of vLLM) arrange a block and head as
they like: on x86 K is transposed. The order depends on the instruction set that vLLM chooses, and no interface tells it.
So it is asked: tokens whose numbers say where they belong are written through vLLM's own operation, and looked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

_DIGIT = (
    128  # of a place's number; any dtype that attention computes in holds so many whole numbers
)
_DIGITS = 3
_HEADS = 2


class UnknownPackingError(NotImplementedError):
    """vLLM keeps the numbers of a block in an order that no strides describe."""


@dataclass(frozen=True, slots=True)
class Packing:
    """Where the number of a token and dimension lies among those of its block and head.

    Attributes:
        origin: of the first token's first number, in numbers.
        token: from one token to the next.
        dim: from one number of a token to the next.
    """

    origin: int
    token: int
    dim: int


def require_together(layers: Sequence[torch.Tensor]) -> None:
    """Raises: UnknownPackingError: what a block has for a head does not lie together, in one of the layers' views."""
    if not all(layer[0, 0].is_contiguous() for layer in layers):
        raise UnknownPackingError(
            "lmcache: vLLM keeps a block's heads apart in a way that is unknown on a CPU"
        )


def packing_of(
    dtype: torch.dtype, block_size: int, head_dim: int, kv_cache_dtype: str = "auto"
) -> tuple[Packing, Packing]:
    """Of K and of V, as this machine's vLLM keeps them.

    Args:
        dtype: that attention computes in.
        block_size: tokens of a block.
        kv_cache_dtype: vLLM's setting.

    Raises:
        UnknownPackingError: strides do not describe it.
    """
    places = [_places(which, dtype, block_size, head_dim, kv_cache_dtype) for which in range(2)]
    k, v = (_strides(each) for each in places)
    return k, v


def _places(
    which: int, dtype: torch.dtype, block_size: int, head_dim: int, kv_cache_dtype: str
) -> torch.Tensor:
    """Where each number of K (0) or V (1) is: [token, dim], counted within its block and head."""
    numbers = torch.arange(block_size * head_dim)
    found = torch.zeros(2 * block_size * head_dim, dtype=torch.int64)
    for digit in range(_DIGITS):
        digits = numbers // _DIGIT**digit % _DIGIT + 1  # none is 0, as what nobody wrote is
        given = digits.view(block_size, 1, head_dim).expand(-1, _HEADS, -1)
        got = _written(which, given.to(dtype).contiguous(), kv_cache_dtype)
        if digit == 0:
            written = got != 0
        found += (got.to(torch.int64) - 1) * _DIGIT**digit
    there = written.nonzero().flatten()
    if not torch.equal(found[there].sort().values, numbers):
        raise UnknownPackingError(
            "lmcache: vLLM keeps a block's numbers in another form than it was given them"
        )
    places = torch.empty_like(numbers)
    places[found[there]] = there
    return places.view(block_size, head_dim)


def _written(which: int, given: torch.Tensor, kv_cache_dtype: str) -> torch.Tensor:
    """A block and head as vLLM writes it. Args: given: [token, head, dim], all heads alike."""
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    tokens, heads, dim = given.shape
    blocks = torch.zeros((2, heads, 2 * tokens, dim), dtype=given.dtype)
    nothing = torch.zeros_like(given)
    ops.cpu_attn_reshape_and_cache(
        nothing if which else given,
        given if which else nothing,
        *blocks.chunk(2, dim=2),
        torch.arange(tokens, dtype=torch.int64) + tokens,
        _get_attn_isa(given.dtype, tokens, dim, kv_cache_dtype),
        k_scale=1.0,
        v_scale=1.0,
        kv_cache_dtype=kv_cache_dtype,
    )
    first, second = blocks[1].view(heads, -1)
    if blocks[0].any() or not torch.equal(first, second):
        raise UnknownPackingError("lmcache: vLLM mixes the numbers of blocks or heads")
    written: torch.Tensor = first
    return written


def _strides(places: torch.Tensor) -> Packing:
    """Raises: UnknownPackingError."""
    origin = int(places[0, 0])
    token = int(places[1, 0]) - origin if places.shape[0] > 1 else 0
    dim = int(places[0, 1]) - origin if places.shape[1] > 1 else 1
    rows, columns = (torch.arange(count) for count in places.shape)
    if not torch.equal(places, origin + rows[:, None] * token + columns * dim):
        raise UnknownPackingError(
            "lmcache: no strides describe how vLLM keeps a block on this CPU; serve with --dtype float32, or with a "
            "VLLM_CPU build for another instruction set"
        )
    return Packing(origin, token, dim)
