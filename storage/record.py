"""Pages as tiers keep them, on their way to whoever asked for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from ..kernels.pages import PageSegments, scatter
from .base import Lookup

if TYPE_CHECKING:
    from typing_extensions import Buffer


class Record(Protocol):
    """A page in one piece."""

    @property
    def data(self) -> Buffer:
        """Its bytes."""

    @property
    def checksum(self) -> int:
        """The one they had when they came from the engine."""


def _bytes(record: Record) -> memoryview:
    return memoryview(record.data).cast("B")


def deliver(
    keys: Sequence[bytes], found: Mapping[bytes, Record], into: PageSegments
) -> list[Lookup]:
    """Copy what was found into the caller's memory, each page verified; the others are misses."""
    lengths = into.page_bytes()
    here = [
        i for i, key in enumerate(keys) if key in found and len(_bytes(found[key])) == lengths[i]
    ]
    records = [found[keys[i]] for i in here]
    whole = scatter(
        [keys[i] for i in here],
        [record.data for record in records],
        [record.checksum for record in records],
        into.select(here),
    )
    outcome = [Lookup.MISS] * len(keys)
    for i, ok in zip(here, whole, strict=True):
        outcome[i] = Lookup.HIT if ok else Lookup.CORRUPT
    return outcome
