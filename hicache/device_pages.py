"""Where pages move between a device pool and records: every copy of the direct path is here.

A device pool is a list of buffers, mostly one for K and one for V of each layer, whose rows are tokens (or whole
pages, or states). A record is a page in one contiguous run of bytes. A `Run` says where in a record the rows of
one buffer lie, so that any order of bytes is a matter of offsets and strides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import gcd

import torch

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


@dataclass(frozen=True, slots=True)
class Run:
    """One buffer of a device pool, and where its rows lie in a record.

    Attributes:
        buffer: [row, ...], a row a token or a page.
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


class DevicePages:
    """The pages of one device pool.

    Args:
        runs: all of its buffers.
        span: rows that a page has in each buffer.
        layers: of each layer, which of the runs hold it.

    Raises:
        NotImplementedError: a buffer whose rows are not in one piece.
    """

    def __init__(self, runs: Sequence[Run], span: int, layers: Mapping[int, Sequence[int]]) -> None:
        self.page_bytes = sum(run.width for run in runs) * span
        self._span = span
        self._layers = layers
        self._word = _word(runs, self.page_bytes)
        self._runs = runs
        self._rows = [self._words_of(run.buffer) for run in runs]
        self._device = runs[0].buffer.device

    def gather(self, firsts: torch.Tensor, records: torch.Tensor) -> None:
        """Copy pages from the device into records.

        Args:
            firsts: int64 [page], the first row of each.
            records: uint8 [page, page_bytes].
        """
        rows = self._all_rows(firsts)
        for run, buffer in zip(self._runs, self._rows, strict=True):
            there = torch.index_select(buffer, 0, rows)
            place = self._place(run, records)
            place.copy_(there.view(place.shape))

    def scatter(
        self, layer: int, firsts: torch.Tensor, records: torch.Tensor, chosen: torch.Tensor
    ) -> None:
        """Copy one layer of pages from records to the device; nothing for a layer that the pool has not.

        Args:
            firsts: int64 [page], the first row of each.
            records: uint8 [record, page_bytes].
            chosen: int64 [page], the record of each.
        """
        runs = self._layers.get(layer, ())
        if not runs:
            return
        rows = self._all_rows(firsts)
        for number in runs:
            place = self._place(self._runs[number], records)
            pages = torch.index_select(place, 0, chosen).view(len(rows), -1)
            self._rows[number].index_copy_(0, rows, pages.to(self._device))

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

    def _words_of(self, buffer: torch.Tensor) -> torch.Tensor:
        try:
            return buffer.view(len(buffer), -1).view(self._word)
        except RuntimeError as error:
            raise NotImplementedError(
                f"lmcache: rows of a device pool are not in one piece ({error})"
            ) from error


def _word(runs: Sequence[Run], page_bytes: int) -> torch.dtype:
    """The longest that everything divides into."""
    sizes = [page_bytes]
    for run in runs:
        item = run.buffer.element_size()
        sizes += [run.width, run.offset, run.stride, run.buffer.stride(0) * item]
        sizes.append(int(run.buffer.storage_offset()) * item)
    return _WORDS[reduce(gcd, sizes, 8)]
