"""vLLM's blocks and the store's records, and copies of tokens between them.

A *record* is a page in the order of SGLang's page_first. Blocks and pages may be of different lengths: a *piece* is as
many tokens as lie together on both sides, and a *slot* is the number of its first token, counted over all blocks, or
over all records of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch

from ..hicache.form import PageForm
from ..kernels.copy_plan import CopyPlan, copy_pages
from ..kernels.layout import PageLayout, Plane
from .cpu_packing import Packing

if TYPE_CHECKING:
    from ..kernels.cuda.copier import CudaCopier


BESIDE = (
    1  # thread of a save, which runs beside the engine; a load has all, for a request waits for it
)


@dataclass(frozen=True, slots=True)
class Pieces:
    """What a copy moves.

    Attributes:
        block_slots: int64 [piece], in host memory.
        record_slots: int64 [piece].
        tokens: of a piece.
    """

    block_slots: torch.Tensor
    record_slots: torch.Tensor
    tokens: int

    def to_records(self) -> CopyPlan:
        return CopyPlan(self.block_slots, self.record_slots, self.tokens)

    def to_blocks(self) -> CopyPlan:
        return CopyPlan(self.record_slots, self.block_slots, self.tokens)


class BlockMemory(Protocol):
    """The blocks of one KV cache group of a worker. Its memory is vLLM's, and must outlive it.

    Both copies are done when they return. Records are uint8 [record, page_bytes], contiguous.
    """

    def gather(self, pieces: Pieces, records: torch.Tensor) -> None:
        """Copy from blocks into records."""

    def scatter(self, pieces: Pieces, records: torch.Tensor) -> None:
        """Copy from records into blocks."""


class OnHost:
    """In host memory.

    Args:
        blocks: where their numbers are.
        lay_out: where those of some records are, in the same planes.
    """

    def __init__(self, blocks: PageLayout, lay_out: Callable[[torch.Tensor], PageLayout]) -> None:
        self._blocks = blocks
        self._lay_out = lay_out

    def gather(self, pieces: Pieces, records: torch.Tensor) -> None:
        copy_pages(pieces.to_records(), self._blocks, self._lay_out(records), threads=BESIDE)

    def scatter(self, pieces: Pieces, records: torch.Tensor) -> None:
        copy_pages(pieces.to_blocks(), self._lay_out(records), self._blocks)


def in_rows(layers: Sequence[torch.Tensor], head_dims: Sequence[int], form: PageForm) -> OnHost:
    """Blocks where each token and head has its numbers in one row.

    Args:
        layers: a view [block, head, token, K and V] of each.
        head_dims: numbers of a row of K and of V, or of the one latent row.
        form: of the records.

    Raises:
        ValueError: the views are not alike, or not of these dimensions.
    """
    return OnHost(_rows(layers, head_dims), form.lay_out)


def by_strides(
    layers: Sequence[torch.Tensor], packings: Sequence[Packing], form: PageForm
) -> OnHost:
    """Blocks in any order that strides describe (cpu_packing.py): the kernels' runs are single numbers.

    The kernels transpose them tile by tile.

    Args:
        layers: as of `in_rows`.
        packings: of K and of V, which are of equal dimensions.
        form: of the records, page_first.
    """
    item = layers[0].element_size()
    _require_rows(layers[0].shape[3], item, packings, form)
    return OnHost(_numbers(layers, packings), partial(_numbers_of_records, form, item))


class OnCuda:
    """On an NVIDIA GPU, in rows as `in_rows`; records lie in pinned memory. Never run on one so far.

    Args:
        layers, head_dims, form: as of `in_rows`.
        copier: of that GPU.
    """

    def __init__(
        self,
        layers: Sequence[torch.Tensor],
        head_dims: Sequence[int],
        form: PageForm,
        copier: CudaCopier,
    ) -> None:
        self._blocks = _rows(layers, head_dims)
        self._form = form
        self._copier = copier
        self._loads = torch.cuda.Stream(layers[0].device)  # type: ignore[no-untyped-call]
        self._saves = torch.cuda.Stream(layers[0].device)  # type: ignore[no-untyped-call]

    def gather(self, pieces: Pieces, records: torch.Tensor) -> None:
        plan, there = pieces.to_records(), self._form.lay_out(records)
        self._copier.copy(plan, self._blocks, there, stream=self._saves)
        self._saves.synchronize()

    def scatter(self, pieces: Pieces, records: torch.Tensor) -> None:
        plan, there = pieces.to_blocks(), self._form.lay_out(records)
        self._copier.copy(plan, there, self._blocks, stream=self._loads)
        self._loads.synchronize()


def computed_on(device: torch.device) -> Callable[[], None]:
    """What waits until all that was begun on a device by now is done. To be called on the engine's own thread."""
    if device.type != "cuda":
        return _nothing
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record()
    return event.synchronize


def _nothing() -> None:
    """On a CPU what was begun is done."""


_Places = tuple[torch.Tensor, torch.Tensor]


class ByIndex:
    """By torch, by index, on any device and of any order that strides describe.

    The last resort, for devices on which the copy kernels cannot be built.

    Args:
        layers: as of `in_rows`.
        packings: of K and of V, which are of equal dimensions, or of the one latent row.
        form: of the records.
    """

    def __init__(
        self, layers: Sequence[torch.Tensor], packings: Sequence[Packing], form: PageForm
    ) -> None:
        _require_rows(layers[0].shape[3], layers[0].element_size(), packings, form)
        self._layers = list(layers)
        self._packings = packings
        self._page_size = form.tokens
        self._block_size = layers[0].shape[2]

    def gather(self, pieces: Pieces, records: torch.Tensor) -> None:
        source, target = self._places(pieces)
        for blocks, pages in self._sides(pieces.tokens, records):
            pages[target] = blocks[_to(source, blocks)].to(pages.device)

    def scatter(self, pieces: Pieces, records: torch.Tensor) -> None:
        target, source = self._places(pieces)
        for blocks, pages in self._sides(pieces.tokens, records):
            blocks[_to(target, blocks)] = pages[source].to(blocks.device)

    def _places(self, pieces: Pieces) -> tuple[_Places, _Places]:
        """Of the pieces in the blocks, and in the records."""
        return (
            _divided(pieces.block_slots, self._block_size, pieces.tokens),
            _divided(pieces.record_slots, self._page_size, pieces.tokens),
        )

    def _sides(
        self, tokens: int, records: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Of each layer's K and V: [block, part, token, head, dim] of the blocks, and the same of the records."""
        _, heads, _, content = self._layers[0].shape
        dim, numbers = content // len(self._packings), records.view(self._layers[0].dtype)
        row = len(self._layers) * heads * dim
        within = (tokens, heads, dim)
        for half, packing in enumerate(self._packings):
            for at, layer in enumerate(self._layers):
                yield (
                    layer.as_strided(
                        (len(layer), self._block_size // tokens, *within),
                        (
                            layer.stride(0),
                            tokens * packing.token,
                            packing.token,
                            layer.stride(1),
                            packing.dim,
                        ),
                        layer.storage_offset() + packing.origin,
                    ),
                    numbers.as_strided(
                        (len(numbers), self._page_size // tokens, *within),
                        (numbers.stride(0), tokens * row, row, dim, 1),
                        numbers.storage_offset() + half * self._page_size * row + at * heads * dim,
                    ),
                )


def _rows(layers: Sequence[torch.Tensor], head_dims: Sequence[int]) -> PageLayout:
    size = layers[0].element_size()
    as_bytes = [layer.view(torch.uint8) for layer in layers]
    return PageLayout.blocks(as_bytes, head_dims=[dim * size for dim in head_dims])


def _numbers(layers: Sequence[torch.Tensor], packings: Sequence[Packing]) -> PageLayout:
    """Single numbers of packed blocks, a plane for each of K and V and each head."""
    first, item = layers[0], layers[0].element_size()
    blocks, heads, size, content = first.shape
    planes = [
        Plane(
            tuple(
                layer.data_ptr() + (head * layer.stride(1) + packing.origin) * item
                for layer in layers
            ),
            first.stride(0) * item,
            packing.token * item,
            packing.dim * item,
            item,
        )
        for packing in packings
        for head in range(heads)
    ]
    areas = tuple((layer.data_ptr(), _extent(layer) * item) for layer in layers)
    dim = content // len(packings)
    return PageLayout(tuple(planes), blocks, size, dim, item, areas, owner=layers)


def _numbers_of_records(form: PageForm, item: int, records: torch.Tensor) -> PageLayout:
    """The same of records, which are [K and V, token, layer, head, number] each."""
    layers, heads = (end - start for start, end in (form.layers, form.heads))
    run, start = form.runs[0], records.data_ptr()
    row = layers * heads * run
    planes = [
        Plane(
            tuple(
                start + half * form.tokens * row + (layer * heads + head) * run
                for layer in range(layers)
            ),
            records.shape[1],
            row,
            item,
            item,
        )
        for half in range(len(form.runs))
        for head in range(heads)
    ]
    areas = ((start, records.numel()),)
    return PageLayout(
        tuple(planes), len(records), form.tokens, run // item, item, areas, owner=records
    )


def _extent(layer: torch.Tensor) -> int:
    """Numbers from the first to the last of a view, both included."""
    return 1 + sum(
        (size - 1) * stride for size, stride in zip(layer.shape, layer.stride(), strict=True)
    )


def _require_rows(content: int, item: int, packings: Sequence[Packing], form: PageForm) -> None:
    """Raises: ValueError: a row of the views is not what the records have of a token and head."""
    row = content * item
    if len(form.runs) != len(packings) or len(set(form.runs)) != 1 or sum(form.runs) != row:
        raise ValueError(f"rows of {row} bytes, and records of {form.runs}")


def _divided(slots: torch.Tensor, length: int, tokens: int) -> _Places:
    """Of each piece its block or record, and which part of that it is."""
    return slots // length, slots % length // tokens


def _to(places: _Places, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(each.to(like.device) for each in places)
