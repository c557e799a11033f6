"""Pages put together from pages that engines of another topology or layout stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast

import torch

from ..kernels.pages import PageSegments, place
from ..storage.base import NO_LIMITS, Limits
from . import form as forms
from .form import PageForm

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from ..storage.chain import Chain
    from .stored_pool import Standing
    from .tiling import Cover, Piece

STAGE_BYTES = 32 << 20  # of the pages that are put together at once


def fill_gaps(
    chain: Chain,
    standing: Standing,
    page_hashes: Sequence[bytes],
    before: bytes,
    into: PageSegments,
    held: list[bool],
    limits: Limits,
) -> list[bool]:
    """Put those pages together that are not stored whole, and that there are all pieces of.

    Args:
        page_hashes: one run of a chain.
        before: the hash of the page before them.
        held: which of them the engine's memory has already; and afterwards.
    """
    if not standing.tiling.covers:
        return held
    held, form = list(held), PageForm.of(standing.kind.page)
    for cover in standing.tiling.covers:
        for run in _gaps(held):
            parent = page_hashes[run.start - 1] if run.start else before
            chosen, places = page_hashes[run.start : run.stop], into.select(run)
            held[run.start : run.stop] = assemble(
                chain, cover, form, chosen, places, before=parent, limits=limits
            )
    return held


def _gaps(held: Sequence[bool]) -> list[range]:
    """The runs of pages that are missing."""
    edges = [i for i in range(len(held) + 1) if _at(held, i) != _at(held, i - 1)]
    return [range(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True)]


def _at(held: Sequence[bool], i: int) -> bool:
    return held[i] if 0 <= i < len(held) else True


def assemble(
    chain: Chain,
    cover: Cover,
    form: PageForm,
    page_hashes: Sequence[bytes],
    into: PageSegments,
    *,
    before: bytes = b"",
    limits: Limits = NO_LIMITS,
) -> list[bool]:
    """Read every piece of some pages and put each whole page into the engine's memory; which of them it holds.

    A page of which a piece is missing is left as it was.

    Args:
        form: of the pages to make.
        page_hashes: one run of a chain.
        before: the hash of the page before it.
    """
    made: list[bool] = []
    for span in _groups(len(page_hashes), form.page_bytes):
        hashes = page_hashes[span.start : span.stop]
        records = torch.empty((len(span), form.page_bytes), dtype=torch.uint8)
        whole = list(range(len(span)))
        for piece in cover:
            whole = _read(chain, piece, hashes, whole, form, records, before, limits)
            if not whole:
                break
        made += _deliver(records, whole, into.select(span))
        before = hashes[-1]
    return made


def _groups(pages: int, page_bytes: int) -> Iterator[range]:
    step = max(1, STAGE_BYTES // page_bytes)
    return (range(start, min(start + step, pages)) for start in range(0, pages, step))


def _read(
    chain: Chain,
    piece: Piece,
    hashes: Sequence[bytes],
    rows: list[int],
    form: PageForm,
    records: torch.Tensor,
    before: bytes,
    limits: Limits,
) -> list[int]:
    """Bring one piece of the pages in `rows` to its place in their records; the rows that it came for."""
    parent = piece.namespace + before if before else b""
    keys = [piece.namespace + page_hash for page_hash in hashes]
    stage = torch.empty((len(hashes), piece.form.page_bytes), dtype=torch.uint8)
    held = chain.get(keys, _rows(stage), parent=parent, limits=limits)
    came = [row for row in rows if held[row]]
    if came:
        forms.copy(piece.form, stage, form, records, came)
    return came


def _deliver(records: torch.Tensor, rows: list[int], into: PageSegments) -> list[bool]:
    """Put the records of these rows into the engine's memory; of each page whether it is there now."""
    place([_buffer(records[row]) for row in rows], into.select(rows))
    made = set(rows)
    return [row in made for row in range(len(records))]


def _buffer(record: torch.Tensor) -> Buffer:
    return cast("Buffer", record.numpy())  # an array is one; its stubs do not say so


def _rows(stage: torch.Tensor) -> PageSegments:
    size = stage.shape[1]
    start = stage.data_ptr()
    addresses = [start + row * size for row in range(stage.shape[0])]
    return PageSegments(addresses, [size] * len(addresses), 1, stage)
