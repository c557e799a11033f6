"""By how much what two engines computed of the same tokens differs, layer by layer, as their stores hold it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..config import Config
from ..hicache.kind import Kind
from ..hicache.namespaces import Namespaces
from ..hicache.page_hashes import page_hashes
from ..store import Store, open_chain


@dataclass(frozen=True, slots=True)
class Difference:
    """Of K or V in one layer. Attributes: scale: the largest number in either. most: the largest difference."""

    layer: int
    what: str
    scale: float
    most: float


def kinds(settings: dict[str, Any]) -> list[Kind]:
    """What a store that nobody has open holds."""
    chain = open_chain(Config.of(settings))
    try:
        records = Namespaces(chain.directories)
        records.refreshed()
        return records.kinds()
    finally:
        chain.close()


def pages(settings: dict[str, Any], kind: Kind, tokens: Sequence[int]) -> torch.Tensor:
    """All whole pages of a prompt as [page, K and V, token, layer, head, dim]. Raises: LookupError: one is missing."""
    page = kind.page
    hashes = page_hashes(tokens, page.page_size)
    memory = [bytearray(page.page_bytes) for _ in hashes]
    with Store(Config.of(settings)) as store:
        held = store.get([kind.namespace + each for each in hashes], memory)
    if not all(held):
        raise LookupError(f"{held.count(False)} of {len(held)} pages are missing")
    numbers = torch.stack([torch.frombuffer(each, dtype=torch.uint8) for each in memory])
    heads = page.heads[1] - page.heads[0]
    shape = (len(hashes), 2, page.page_size, page.stored_layers, heads, page.head_dims[0])
    return numbers.view(getattr(torch, page.dtype)).view(shape)


def differences(one: torch.Tensor, other: torch.Tensor) -> list[Difference]:
    """Args: both as of `pages`."""
    return [
        Difference(
            layer,
            what,
            float(torch.maximum(a.abs().max(), b.abs().max())),
            float((a - b).abs().max()),
        )
        for layer in range(one.shape[3])
        for what, a, b in zip(
            "KV", one[..., layer, :, :].unbind(1), other[..., layer, :, :].unbind(1), strict=True
        )
    ]
