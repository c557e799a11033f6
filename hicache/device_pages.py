"""Where pages move between a device pool and records: every copy of the direct path is here.

A device pool is a list of buffers, mostly one for K and one for V of each layer, whose rows are tokens (or whole
pages, or states). A record is a page in one contiguous run of bytes. A `Run` says where in a record the rows of
one buffer lie, so that any order of bytes is a matter of offsets and strides.

Pools in host memory are copied by the kernels' one native call; those of a device by torch, which was never run on one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import gcd
from typing import Protocol

import torch

from ..kernels.copy_plan import CopyPlan, copy_pages
from ..kernels.layout import PageLayout, Plane

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


@dataclass(frozen=True, slots=True)
class Run:
    """One buffer of a device pool, and where its rows lie in a record.

    Attributes:
        buffer: [row, ...], a row a token or a page; rows are contiguous.
        offset: of the first row, in bytes.
        stride: bytes from one row of a page to the next.
    """

    buffer: torch.Tensor
    offset: int
    stride: int

    @property
    def width(self) -> int:
        """Bytes of one row."""
        return self.buffer[0].nbytes

    @property
    def row_stride(self) -> int:
        """Bytes from one row of the buffer to the next."""
        return int(self.buffer.stride(0)) * self.buffer.element_size()


class Copier(Protocol):
    """Copies some runs of pages."""

    def to_records(self, firsts: torch.Tensor, records: torch.Tensor) -> None:
        """Args: firsts: int64 [page], the first row of each. records: uint8 [page, page_bytes]."""

    def to_device(self, firsts: torch.Tensor, records: torch.Tensor, chosen: torch.Tensor) -> None:
        """Args: chosen: int64 [page], the record of each page."""


class DevicePages:
    """The pages of one device pool.

    Args:
        runs: all of its buffers.
        span: rows that a page has in each buffer.
        layers: of each layer, which of the runs hold it.
        copier: makes what copies some of the runs; None: as the buffers' device asks.

    Raises:
        NotImplementedError: a buffer whose rows are not in one piece.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        span: int,
        layers: Mapping[int, Sequence[int]],
        copier: type[ByKernels | ByTorch] | None = None,
    ) -> None:
        self.page_bytes = sum(run.width for run in runs) * span
        if any(not run.buffer[0].is_contiguous() for run in runs):
            raise NotImplementedError("lmcache: rows of a device pool are not in one piece")
        is_on_host = runs[0].buffer.device.type == "cpu"
        made = copier or (ByKernels if is_on_host else ByTorch)
        self._all: Copier = made(runs, span)
        self._layers: dict[int, Copier] = {
            layer: made([runs[at] for at in chosen], span) for layer, chosen in layers.items()
        }

    def gather(self, firsts: torch.Tensor, records: torch.Tensor) -> None:
        """Copy pages from the device into records.

        Args:
            firsts: int64 [page], the first row of each.
            records: uint8 [page, page_bytes].
        """
        self._all.to_records(firsts, records)

    def scatter(
        self, layer: int, firsts: torch.Tensor, records: torch.Tensor, chosen: torch.Tensor
    ) -> None:
        """Copy one layer of pages from records to the device; nothing for a layer that the pool has not.

        Args:
            firsts: int64 [page], the first row of each.
            records: uint8 [record, page_bytes].
            chosen: int64 [page], the record of each.
        """
        if layer in self._layers:
            self._layers[layer].to_device(firsts, records, chosen)


class ByKernels:
    """In host memory: each run is a plane of one layer and one head, whose slots are rows."""

    def __init__(self, runs: Sequence[Run], span: int) -> None:
        self._runs = runs
        self._span = span
        planes = [
            Plane((run.buffer.data_ptr(),), span * run.row_stride, run.row_stride, 0, run.width)
            for run in runs
        ]
        areas = [
            (run.buffer.data_ptr(), (len(run.buffer) - 1) * run.row_stride + run.width)
            for run in runs
        ]
        pages = min(len(run.buffer) for run in runs) // span
        self._device = self._layout(planes, pages, areas, runs)

    def to_records(self, firsts: torch.Tensor, records: torch.Tensor) -> None:
        slots = torch.arange(len(records)) * self._span
        plan = CopyPlan(firsts.contiguous(), slots, tokens=self._span)
        copy_pages(plan, self._device, self._of(records))

    def to_device(self, firsts: torch.Tensor, records: torch.Tensor, chosen: torch.Tensor) -> None:
        plan = CopyPlan(chosen * self._span, firsts.contiguous(), tokens=self._span)
        copy_pages(plan, self._of(records), self._device)

    def _of(self, records: torch.Tensor) -> PageLayout:
        start, size = records.data_ptr(), records.shape[1]
        planes = [
            Plane((start + run.offset,), size, run.stride, 0, run.width) for run in self._runs
        ]
        return self._layout(planes, len(records), [(start, records.nbytes)], records)

    def _layout(
        self, planes: list[Plane], pages: int, areas: list[tuple[int, int]], owner: object
    ) -> PageLayout:
        return PageLayout(tuple(planes), pages, self._span, 1, 1, tuple(areas), owner=owner)


class ByTorch:
    """On any device: by index, a run at a time."""

    def __init__(self, runs: Sequence[Run], span: int) -> None:
        self._runs = runs
        self._span = span
        self._word = _word(runs)
        self._rows = [run.buffer.view(len(run.buffer), -1).view(self._word) for run in runs]
        self._device = runs[0].buffer.device

    def to_records(self, firsts: torch.Tensor, records: torch.Tensor) -> None:
        rows = self._all_rows(firsts)
        for run, buffer in zip(self._runs, self._rows, strict=True):
            there = torch.index_select(buffer, 0, rows)
            place = self._place(run, records)
            place.copy_(there.view(place.shape))

    def to_device(self, firsts: torch.Tensor, records: torch.Tensor, chosen: torch.Tensor) -> None:
        rows = self._all_rows(firsts)
        for run, buffer in zip(self._runs, self._rows, strict=True):
            pages = torch.index_select(self._place(run, records), 0, chosen)
            buffer.index_copy_(0, rows, pages.view(len(rows), -1).to(self._device))

    def _all_rows(self, firsts: torch.Tensor) -> torch.Tensor:
        """Of all tokens of the pages, page after page."""
        rows = firsts.to(self._device)[:, None] + torch.arange(self._span, device=self._device)
        return rows.flatten()

    def _place(self, run: Run, records: torch.Tensor) -> torch.Tensor:
        """Where a run lies in records: a view [record, row, word]."""
        words, size = records.view(self._word), self._word.itemsize
        shape = (len(records), self._span, run.width // size)
        strides = (words.stride(0), run.stride // size, 1)
        return words.as_strided(shape, strides, words.storage_offset() + run.offset // size)


def _word(runs: Sequence[Run]) -> torch.dtype:
    """The longest that everything divides into."""
    sizes = []
    for run in runs:
        start = int(run.buffer.storage_offset()) * run.buffer.element_size()
        sizes += [run.width, run.offset, run.stride, run.row_stride, start]
    return _WORDS[reduce(gcd, sizes, 8)]
