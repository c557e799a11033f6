"""What stands for KV and state in the device pools of `rank_pools`, to be told again after a restore."""

from __future__ import annotations

from typing import Any

import torch

from .rank_pools import HEADS, DevicePools, Family

SCRIBBLE = -7.0  # which no memory is left with that was written or restored


class Content:
    """What a rank's model "computed" for the tokens of one prompt: random numbers by position.

    A head has the same numbers however the heads are shared out, and so has a latent row. The state of a
    recurrent layer has other ones on each rank.

    Args:
        rank: of tensor parallelism.
    """

    def __init__(self, family: Family, pools: DevicePools, rank: int) -> None:
        self._family = family
        self._pools = pools
        self._rank = rank
        seed = torch.Generator().manual_seed(0)
        self._rows = {
            name: [self._rows_of(layer, seed) for layer in layers]
            for name, layers in pools.token_pools().items()
        }

    def _rows_of(self, layer: torch.Tensor, seed: torch.Generator) -> torch.Tensor:
        """This rank's part of a layer: [token, head, dim]."""
        family = self._family
        if family.name == "mla":
            return _random((family.tokens, *layer.shape[1:]), layer.dtype, seed)
        whole = _random((family.tokens, HEADS, *layer.shape[2:]), layer.dtype, seed)
        return whole[:, self._rank * family.heads : (self._rank + 1) * family.heads]

    def write(self, slots: torch.Tensor, state: torch.Tensor | None) -> None:
        """Put the numbers of a prompt's tokens, as many as slots, where the model would have."""
        for name, layers in self._pools.token_pools().items():
            for layer, rows in zip(layers, self._rows[name], strict=True):
                layer[self._places(name, slots)] = rows[: len(slots)]
        if state is not None:
            for memory, after in zip(self._pools.states(), self._state(len(slots)), strict=True):
                memory[:, int(state)] = after

    def compare(self, slots: torch.Tensor, state: torch.Tensor | None) -> dict[str, bool]:
        """Whether each pool holds, bit by bit, what a prefix with these slots needs of it.

        Raises: AssertionError: of no slots nothing can be said.
        """
        assert len(slots)
        same = {}
        window = self._family.window or 0
        for name, layers in self._pools.token_pools().items():
            first = max(0, len(slots) - window) if name == "swa" else 0
            places = self._places(name, slots)[first:]
            same[name] = all(
                _equal(layer[places], rows[first : len(slots)])
                for layer, rows in zip(layers, self._rows[name], strict=True)
            )
        if self._pools.states():
            pairs = zip(self._pools.states(), self._state(len(slots)), strict=True)
            same["mamba"] = state is not None and all(
                _equal(memory[:, int(state)], after) for memory, after in pairs
            )
        return same

    def _places(self, pool: str, slots: torch.Tensor) -> torch.Tensor:
        return slots if pool == "kv" else self._pools.allocator.full_to_swa_index_mapping[slots]

    def _state(self, tokens: int) -> list[torch.Tensor]:
        """The state after so many tokens: [layer, ...] of each memory."""
        seed = torch.Generator().manual_seed(2 * tokens + self._rank)
        return [
            _random((memory.shape[0], *memory.shape[2:]), memory.dtype, seed)
            for memory in self._pools.states()
        ]


def _random(shape: tuple[int, ...], dtype: torch.dtype, seed: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=seed).to(dtype)


def _equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


def scribble(pools: DevicePools, host: Any) -> None:
    """Overwrite all memory of the device pools and of the host pools, a `HostPoolGroup`; None: there are none."""
    entries = host.entries if host is not None else ()
    of_host = [tensor for entry in entries for tensor in _host_memory(entry.host_pool)]
    for tensor in (*pools.memory(), *of_host):
        tensor.fill_(SCRIBBLE)


def _host_memory(pool: Any) -> list[torch.Tensor]:
    if hasattr(pool, "temporal_buffer"):
        return [pool.temporal_buffer, *pool.conv_buffer]
    kept = pool.kv_buffer
    return list(kept) if isinstance(kept, (tuple, list)) else [kept]
