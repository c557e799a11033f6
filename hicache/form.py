"""In what order the bytes of a page lie, so that a page of one form can be made from pages of others.

A form is a *rectangle* of the model's KV (layers x heads, all tokens of the page) and a *layout*. Two ranks
of different topologies hold different rectangles of the same page, two layouts the same numbers in another
order; their bytes are the same numbers all the same. `PageForm.lay_out` says where each of them lies in records, so
that a copy between two forms is one of `copy_pages`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..kernels.copy_plan import CopyPlan, copy_pages
from ..kernels.layout import PageLayout, Plane

if TYPE_CHECKING:
    from .identity import PageIdentity

Range = tuple[int, int]  # first, and one past the last

# The order of a page's axes in each layout of SGLang's host pools.
_AXES = {
    "page_first": ("token", "layer", "head"),
    "page_first_direct": ("layer", "token", "head"),
    "page_head": ("head", "token", "layer"),
    "layer_first": ("layer", "token", "head"),  # K and V of a layer side by side
}


class Untileable(ValueError):
    """A page's bytes cannot be told apart by layer and head; the message says why."""


@dataclass(frozen=True, slots=True)
class PageForm:
    """A page's rectangle and layout.

    Attributes:
        layout: SGLang's name for it.
        tokens: of a page.
        layers: of the model.
        heads: KV heads of the model; (0, 1) where every rank holds all there is, as MLA's latent row.
        runs: bytes of one token's K and of its V, for one head in one layer; one of both where K and V are one row.
    """

    layout: str
    tokens: int
    layers: Range
    heads: Range
    runs: tuple[int, ...]

    @classmethod
    def of(cls, page: PageIdentity) -> PageForm:
        """Raises: Untileable."""
        if page.layout not in _AXES:
            raise Untileable(f"layout {page.layout}")
        if page.slices:
            raise Untileable(f"cut by {', '.join(sorted(page.slices))}")
        if page.shape:
            raise Untileable("state that is no plain K and V")
        layers = page.layers[1] - page.layers[0]
        if layers <= 0 or layers != page.stored_layers:
            raise Untileable(f"{page.stored_layers} of the layers {page.layers} are in it")
        heads = page.heads if page.total_heads else (0, 1)
        cells = page.page_size * layers * (heads[1] - heads[0])
        row, rest = divmod(page.page_bytes, cells)
        if rest:
            raise Untileable(f"{page.page_bytes} bytes are no {cells} rows")
        return cls(page.layout, page.page_size, page.layers, heads, _runs(page, row))

    @property
    def page_bytes(self) -> int:
        layers, heads = (end - start for start, end in (self.layers, self.heads))
        return self.tokens * layers * heads * sum(self.runs)

    def lay_out(self, records: torch.Tensor) -> PageLayout:
        """Where the numbers of some pages are.

        Args:
            records: uint8 [pages, page_bytes], contiguous, in host memory.
        """
        planes, before = [], 0
        for run in self.runs:
            strides, cells = self._strides(run, sum(self.runs))
            start = records.data_ptr() + before * cells
            layers = tuple(start + i * strides["layer"] for i in range(self._length("layer")))
            planes.append(Plane(layers, self.page_bytes, strides["token"], strides["head"], run))
            before += run
        return PageLayout(
            tuple(planes),
            pages=len(records),
            page_size=self.tokens,
            heads=self._length("head"),
            itemsize=1,
            memory=((records.data_ptr(), records.nbytes),),
            owner=records,
        )

    def _strides(self, run: int, runs: int) -> tuple[dict[str, int], int]:
        """Bytes from one token, layer and head to the next, and how many runs of K lie before the first of V."""
        outer, middle, inner = _AXES[self.layout]
        cells = self._length(middle) * self._length(inner)
        strides = {inner: run, middle: self._length(inner) * run, outer: cells * run}
        if self.layout == "layer_first":  # K and V of each layer side by side
            return strides | {outer: cells * runs}, cells
        return strides, cells * self._length(outer)

    def _length(self, axis: str) -> int:
        spans = {"token": (0, self.tokens), "layer": self.layers, "head": self.heads}
        start, end = spans[axis]
        return end - start


def _runs(page: PageIdentity, row: int) -> tuple[int, ...]:
    """Args: row: bytes of all that one token has for one head in one layer."""
    if not page.total_heads:
        return (row,)
    k, v = page.head_dims
    size = getattr(torch, page.dtype).itemsize
    if min(k, v) <= 0 or row != (k + v) * size:
        raise Untileable(f"a row of {row} bytes is no K of {k} and V of {v} {page.dtype}")
    return k * size, v * size


def overlap(one: Range, other: Range) -> Range:
    """What two ranges share; empty ones end where they begin."""
    start = max(one[0], other[0])
    return start, max(start, min(one[1], other[1]))


def copy(
    source: PageForm, records: torch.Tensor, target: PageForm, into: torch.Tensor, rows: list[int]
) -> None:
    """Copy what two forms of the same pages share.

    Args:
        records: uint8 [pages, source.page_bytes].
        into: uint8 [pages, target.page_bytes]; what `source` does not hold of it stays.
        rows: which pages.
    """
    layers = overlap(source.layers, target.layers)
    heads = overlap(source.heads, target.heads)
    if source.tokens != target.tokens or source.runs != target.runs:
        raise ValueError(f"{source} and {target} are not of the same page")
    there, here = (
        form.lay_out(each).select(
            layers=_within(layers, form.layers), heads=_within(heads, form.heads)
        )
        for form, each in ((source, records), (target, into))
    )
    copy_pages(CopyPlan.of_pages(rows, rows, page_size=source.tokens), there, here)


def _within(span: Range, whole: Range) -> range:
    return range(span[0] - whole[0], span[1] - whole[0])
