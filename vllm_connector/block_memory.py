"""vLLM's blocks and the store's records, and copies of tokens between them.

A *record* is a page in the order of SGLang's page_first. Blocks and pages may be of different lengths: a *piece* is as
many tokens as lie together on both sides, and a *slot* is the number of its first token, counted over all blocks, or
over all records of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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


class BlockMemory(Protocol):
    """The blocks of one KV cache group of a worker. Its memory is vLLM's, and must outlive it.

    Both copies are done when they return.
    """

    def gather(
        self,
        block_slots: torch.Tensor,
        record_slots: torch.Tensor,
        tokens: int,
        records: torch.Tensor,
    ) -> None:
        """Copy pieces from blocks into records.

        Args:
            block_slots: int64 [piece], in host memory.
            record_slots: int64 [piece].
            tokens: of a piece.
            records: uint8 [record, page_bytes], contiguous.
        """

    def scatter(
        self,
        block_slots: torch.Tensor,
        record_slots: torch.Tensor,
        tokens: int,
        records: torch.Tensor,
    ) -> None:
        """Copy pieces from records into blocks. Args: as of `gather`."""


class InRows:
    """In host memory, where each token and head has its numbers in one row.

    Args:
        layers: a view [block, head, token, K and V] of each.
        head_dims: numbers of a row of K and of V, or of the one latent row.
        form: of the records.

    Raises:
        ValueError: the views are not alike, or not of these dimensions.
    """

    def __init__(
        self, layers: Sequence[torch.Tensor], head_dims: Sequence[int], form: PageForm
    ) -> None:
        size = layers[0].element_size()
        as_bytes = [layer.view(torch.uint8) for layer in layers]
        self._blocks = PageLayout.blocks(as_bytes, head_dims=[dim * size for dim in head_dims])
        self._form = form

    def gather(
        self,
        block_slots: torch.Tensor,
        record_slots: torch.Tensor,
        tokens: int,
        records: torch.Tensor,
    ) -> None:
        plan = CopyPlan(block_slots, record_slots, tokens)
        copy_pages(plan, self._blocks, self._form.lay_out(records), threads=BESIDE)

    def scatter(
        self,
        block_slots: torch.Tensor,
        record_slots: torch.Tensor,
        tokens: int,
        records: torch.Tensor,
    ) -> None:
        plan = CopyPlan(record_slots, block_slots, tokens)
        copy_pages(plan, self._form.lay_out(records), self._blocks)


class ByStrides:
    """In host memory, in any order that strides describe (cpu_packing.py): the kernels' runs are single numbers.

    They are transposed tile by tile: 10 GB/s on two cores and 6 on one, where torch by index does 0.25 to 0.3.

    Args:
        layers: as of `InRows`.
        packings: of K and of V, which are of equal dimensions.
        form: of the records, page_first.
    """

    def __init__(
        self, layers: Sequence[torch.Tensor], packings: Sequence[Packing], form: PageForm
    ) -> None:
        blocks, self._heads, size, content = layers[0].shape
        _require_rows(content, layers[0].element_size(), packings, form)
        self._dim, self._item = content // len(packings), layers[0].element_size()
        self._page_size, self._layers = form.tokens, len(layers)
        planes = [
            Plane(
                tuple(self._at(layer, head * layer.stride(1) + packing.origin) for layer in layers),
                layers[0].stride(0) * self._item,
                packing.token * self._item,
                packing.dim * self._item,
                self._item,
            )
            for packing in packings
            for head in range(self._heads)
        ]
        areas = tuple((layer.data_ptr(), _extent(layer) * self._item) for layer in layers)
        self._blocks = PageLayout(
            tuple(planes), blocks, size, self._dim, self._item, areas, owner=layers
        )

    def gather(
        self,
        block_slots: torch.Tensor,
        record_slots: torch.Tensor,
        tokens: int,
        records: torch.Tensor,
    ) -> None:
        plan = CopyPlan(block_slots, record_slots, tokens)
        copy_pages(plan, self._blocks, self._records(records), threads=BESIDE)

    def scatter(
        self,
        block_slots: torch.Tensor,
        record_slots: torch.Tensor,
        tokens: int,
        records: torch.Tensor,
    ) -> None:
        plan = CopyPlan(record_slots, block_slots, tokens)
        copy_pages(plan, self._records(records), self._blocks)

    def _records(self, records: torch.Tensor) -> PageLayout:
        """[K and V, token, layer, head, number] of each, a plane for each head."""
        run, start = self._dim * self._item, records.data_ptr()
        row = self._layers * self._heads * run
        planes = [
            Plane(
                tuple(
                    start + half * self._page_size * row + (layer * self._heads + head) * run
                    for layer in range(self._layers)
                ),
                records.shape[1],
                row,
                self._item,
                self._item,
            )
            for half in range(len(self._blocks.planes) // self._heads)
            for head in range(self._heads)
        ]
        areas = ((start, records.numel()),)
        return PageLayout(
            tuple(planes),
            len(records),
            self._page_size,
            self._dim,
            self._item,
            areas,
            owner=records,
        )

    def _at(self, layer: torch.Tensor, number: int) -> int:
        return layer.data_ptr() + number * self._item


def _extent(layer: torch.Tensor) -> int:
    """Numbers from the first to the last of a view, both included."""
    return 1 + sum(
        (size - 1) * stride for size, stride in zip(layer.shape, layer.stride(), strict=True)
    )


class OnCuda:
    """On an NVIDIA GPU, in rows as `InRows`; records lie in pinned memory. Never run on one so far.

    Args:
        layers, head_dims, form: as of `InRows`.
        copier: of that GPU.
    """

    def __init__(
        self,
        layers: Sequence[torch.Tensor],
        head_dims: Sequence[int],
        form: PageForm,
        copier: CudaCopier,
    ) -> None:
        size = layers[0].element_size()
        as_bytes = [layer.view(torch.uint8) for layer in layers]
        self._blocks = PageLayout.blocks(as_bytes, head_dims=[dim * size for dim in head_dims])
        self._form = form
        self._copier = copier
        self._loads = torch.cuda.Stream(layers[0].device)  # type: ignore[no-untyped-call]
        self._saves = torch.cuda.Stream(layers[0].device)  # type: ignore[no-untyped-call]

    def gather(
        self,
        block_slots: torch.Tensor,
        record_slots: torch.Tensor,
        tokens: int,
        records: torch.Tensor,
    ) -> None:
        plan = CopyPlan(block_slots, record_slots, tokens)
        self._copier.copy(plan, self._blocks, self._form.lay_out(records), stream=self._saves)
        self._saves.synchronize()

    def scatter(
        self,
        block_slots: torch.Tensor,
        record_slots: torch.Tensor,
        tokens: int,
        records: torch.Tensor,
    ) -> None:
        plan = CopyPlan(record_slots, block_slots, tokens)
        self._copier.copy(plan, self._form.lay_out(records), self._blocks, stream=self._loads)
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


class ByIndex:
    """By torch, by index, on any device and of any order that strides describe.

    The last resort, for devices on which the copy kernels cannot be built.

    Args:
        layers: as of `InRows`.
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

    def gather(
        self,
        block_slots: torch.Tensor,
        record_slots: torch.Tensor,
        tokens: int,
        records: torch.Tensor,
    ) -> None:
        source = _divided(block_slots, self._block_size, tokens)
        target = _divided(record_slots, self._page_size, tokens)
        for blocks, pages in self._sides(tokens, records):
            pages[target] = blocks[_to(source, blocks)].to(pages.device)

    def scatter(
        self,
        block_slots: torch.Tensor,
        record_slots: torch.Tensor,
        tokens: int,
        records: torch.Tensor,
    ) -> None:
        source = _divided(record_slots, self._page_size, tokens)
        target = _divided(block_slots, self._block_size, tokens)
        for blocks, pages in self._sides(tokens, records):
            blocks[_to(target, blocks)] = pages[source].to(blocks.device)

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


def _require_rows(content: int, item: int, packings: Sequence[Packing], form: PageForm) -> None:
    """Raises: ValueError: a row of the views is not what the records have of a token and head."""
    row = content * item
    if len(form.runs) != len(packings) or len(set(form.runs)) != 1 or sum(form.runs) != row:
        raise ValueError(f"rows of {row} bytes, and records of {form.runs}")


def _divided(slots: torch.Tensor, length: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each piece its block or record, and which part of that it is."""
    return slots // length, slots % length // tokens


def _to(places: tuple[torch.Tensor, torch.Tensor], like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(each.to(like.device) for each in places)
