"""What moves pages between a device pool and records.

    ByKernels   in host memory: the kernels' one native call
    ByCuda      on an NVIDIA GPU: the kernels compiled for it, one launch a layer
    ByEngine    on a GPU where these cannot be built or run: SGLang's own copies of page_first pools
    ByTorch     on any device, and of any order of bytes: by index, a buffer at a time

All but the first were never run on a device; tests run the last two on a CPU, and ByCuda on a stand-in of the driver.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import reduce
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import CudaUnavailableError
from ..kernels.copy_plan import CopyPlan, copy_pages
from ..kernels.cuda.copier import CudaCopier
from ..kernels.layout import PageLayout, Plane
from .device_pages import Group, MakesCopier, Run, Scatter

if TYPE_CHECKING:
    from .device_pages import DevicePages

logger = logging.getLogger(__name__)

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
_LOAD = "transfer_kv_per_layer_mla_pf_lf"
_STORE = "transfer_kv_all_layer_mla_lf_pf"
_ENGINE_WORD = 8  # bytes; SGLang's kernels move rows of these


class _Layouts:
    """A group as the kernels see it: each plane is one of one head, whose slots are rows."""

    def __init__(self, group: Group, span: int) -> None:
        self._group = group
        self._span = span
        planes = [
            self._plane(plane, [run.buffer.data_ptr() for run in plane], span * plane[0].row_stride)
            for plane in group.planes
        ]
        areas = [
            (run.buffer.data_ptr(), (len(run.buffer) - 1) * run.row_stride + run.width)
            for run in group.runs
        ]
        pages = min(len(run.buffer) for run in group.runs) // span
        self.device = self._layout(planes, pages, areas, group)

    def records(self, records: torch.Tensor) -> PageLayout:
        """Args: records: uint8 [record, page_bytes]."""
        start, size = records.data_ptr(), records.shape[1]
        planes = [
            Plane(
                tuple(start + run.offset for run in plane), size, plane[0].stride, 0, plane[0].width
            )
            for plane in self._group.planes
        ]
        return self._layout(planes, len(records), [(start, records.nbytes)], records)

    @staticmethod
    def _plane(plane: Sequence[Run], layers: Sequence[int], page_stride: int) -> Plane:
        return Plane(tuple(layers), page_stride, plane[0].row_stride, 0, plane[0].width)

    def _layout(
        self, planes: list[Plane], pages: int, areas: list[tuple[int, int]], owner: object
    ) -> PageLayout:
        return PageLayout(tuple(planes), pages, self._span, 1, 1, tuple(areas), owner=owner)


class ByKernels:
    """In host memory."""

    def __init__(self, groups: Sequence[Group], span: int) -> None:
        self._layouts = [_Layouts(group, span) for group in groups]
        self._span = span

    def to_records(self, firsts: torch.Tensor, records: torch.Tensor) -> None:
        plan = _storing(firsts, len(records), self._span)
        for each in self._layouts:
            copy_pages(plan, each.device, each.records(records))

    @contextmanager
    def to_device(
        self, firsts: torch.Tensor, records: torch.Tensor, chosen: torch.Tensor
    ) -> Iterator[Scatter]:
        src_slots, dst_slots = chosen * self._span, _on_host(firsts)
        sources = [each.records(records) for each in self._layouts]

        def scatter(group: int, place: int) -> None:
            layer = range(place, place + 1)
            plan = CopyPlan(src_slots, dst_slots, self._span, layer)
            copy_pages(plan, sources[group], self._layouts[group].device)

        yield scatter


class ByCuda:
    """On a GPU, from and to pinned memory.

    Args:
        copier: of that GPU.
    """

    def __init__(self, groups: Sequence[Group], span: int, copier: CudaCopier) -> None:
        self._layouts = [_Layouts(group, span) for group in groups]
        self._span = span
        self._copier = copier

    def to_records(self, firsts: torch.Tensor, records: torch.Tensor) -> None:
        plan = _storing(firsts, len(records), self._span)
        for each in self._layouts:
            self._copier.copy(plan, each.device, each.records(records))

    @contextmanager
    def to_device(
        self, firsts: torch.Tensor, records: torch.Tensor, chosen: torch.Tensor
    ) -> Iterator[Scatter]:
        plan = CopyPlan(chosen * self._span, _on_host(firsts), self._span)
        with ExitStack() as copies:
            layered = [
                copies.enter_context(self._copier.layered(plan, each.records(records), each.device))
                for each in self._layouts
            ]
            yield lambda group, place: layered[group].copy(place)


class ByEngine:
    """By SGLang's kernels for its own page_first host pools, which records of the same order are.

    A plane's row of all layers is one of theirs; where a plane begins is so many such rows from a record's begin.

    Raises:
        NotImplementedError: some plane is not of that order.
    """

    def __init__(self, groups: Sequence[Group], span: int) -> None:
        from sglang.srt.mem_cache.pool_host import mha

        if not (hasattr(mha, _LOAD) and hasattr(mha, _STORE)):
            raise NotImplementedError("lmcache: SGLang has no copies of its own here")
        self._load: Callable[..., None] = getattr(mha, _LOAD)
        self._store: Callable[..., None] = getattr(mha, _STORE)
        self._groups = groups
        self._device = groups[0].planes[0][0].buffer.device
        self._page_bytes = sum(run.width for group in groups for run in group.runs) * span
        self._within = torch.arange(span, device=self._device)
        if not all(self._is_page_first(plane) for group in groups for plane in group.planes):
            raise NotImplementedError("lmcache: SGLang's own copies know no such order of bytes")
        self._tables = [[self._table(plane) for plane in group.planes] for group in groups]

    def to_records(self, firsts: torch.Tensor, records: torch.Tensor) -> None:
        chosen, rows = torch.arange(len(records)), self._rows(firsts, 1)
        for group, tables in zip(self._groups, self._tables, strict=True):
            for plane, table in zip(group.planes, tables, strict=True):
                self._store(
                    src_layers=table,
                    dst=records.flatten(),
                    src_indices=rows,
                    dst_indices=self._places(plane, chosen),
                    item_size=plane[0].width,
                    dst_layout_dim=plane[0].stride,
                    num_layers=len(plane),
                )

    @contextmanager
    def to_device(
        self, firsts: torch.Tensor, records: torch.Tensor, chosen: torch.Tensor
    ) -> Iterator[Scatter]:
        rows, flat = self._rows(firsts, 1), records.flatten()
        places = [[self._places(plane, chosen) for plane in group.planes] for group in self._groups]

        def scatter(group: int, place: int) -> None:
            for plane, src_rows in zip(self._groups[group].planes, places[group], strict=True):
                self._load(
                    src=flat,
                    dst=plane[place].buffer,
                    src_indices=src_rows,
                    dst_indices=rows,
                    layer_id=place,
                    item_size=plane[0].width,
                    src_layout_dim=plane[0].stride,
                )

        yield scatter

    def _is_page_first(self, plane: Sequence[Run]) -> bool:
        width, row_stride, stride = plane[0].shape
        begin = plane[0].offset
        return (
            stride == width * len(plane)
            and begin % stride == 0
            and self._page_bytes % stride == 0
            and row_stride == width
            and width % _ENGINE_WORD == 0
            and all(run.offset == begin + width * at for at, run in enumerate(plane))
        )

    def _table(self, plane: Sequence[Run]) -> torch.Tensor:
        addresses = [run.buffer.data_ptr() for run in plane]
        return torch.tensor(addresses, dtype=torch.uint64, device=self._device)

    def _places(self, plane: Sequence[Run], chosen: torch.Tensor) -> torch.Tensor:
        """Of each token its row in the records."""
        stride = plane[0].stride
        return self._rows(chosen, self._page_bytes // stride) + plane[0].offset // stride

    def _rows(self, pages: torch.Tensor, step: int) -> torch.Tensor:
        return ((pages.to(self._device) * step)[:, None] + self._within).flatten()


class ByTorch:
    """By index."""

    def __init__(self, groups: Sequence[Group], span: int) -> None:
        self._groups = groups
        self._span = span
        self._word = _word([run for group in groups for run in group.runs])
        self._device = groups[0].planes[0][0].buffer.device

    def to_records(self, firsts: torch.Tensor, records: torch.Tensor) -> None:
        rows = self._all_rows(firsts)
        for group in self._groups:
            for run in group.runs:
                place = self._place(run, records)
                there = torch.index_select(self._rows(run), 0, rows)
                place.copy_(there.view(place.shape))

    @contextmanager
    def to_device(
        self, firsts: torch.Tensor, records: torch.Tensor, chosen: torch.Tensor
    ) -> Iterator[Scatter]:
        rows = self._all_rows(firsts)

        def scatter(group: int, place: int) -> None:
            for plane in self._groups[group].planes:
                pages = torch.index_select(self._place(plane[place], records), 0, chosen)
                new = pages.view(len(rows), -1).to(self._device)
                self._rows(plane[place]).index_copy_(0, rows, new)

        yield scatter

    def _rows(self, run: Run) -> torch.Tensor:
        return run.buffer.view(len(run.buffer), -1).view(self._word)

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


def by_device(device: torch.device) -> MakesCopier:
    """What needs nothing to be set up."""
    return ByKernels if device.type == "cpu" else ByTorch


def on_gpu(
    pools: Sequence[DevicePages], device: torch.device, cubins: Path, opened: ExitStack
) -> None:
    """Let our kernels copy these pools of a GPU, or SGLang's where ours cannot.

    Args:
        cubins: folder in which compiled kernels are kept.
        opened: gets what is to be closed in the end.
    """
    if device.type != "cuda":
        return
    try:
        copier = CudaCopier(device, cubins=cubins)
    except CudaUnavailableError as error:
        logger.warning("lmcache: pages are copied by SGLang's own kernels: %s", error)
        for pool in pools:
            _by_engine(pool)
        return
    opened.callback(copier.close)
    logger.info("lmcache: pages are copied by kernels of %s", copier.built.source)

    def ours(groups: Sequence[Group], span: int) -> ByCuda:
        return ByCuda(groups, span, copier)

    for pool in pools:
        pool.copies_by(ours)


def _by_engine(pool: DevicePages) -> None:
    try:
        pool.copies_by(ByEngine)
    except NotImplementedError as error:
        logger.warning("%s; this pool is copied by torch, layer by layer", error)


def _storing(firsts: torch.Tensor, pages: int, span: int) -> CopyPlan:
    return CopyPlan(_on_host(firsts), torch.arange(pages) * span, span)


def _on_host(firsts: torch.Tensor) -> torch.Tensor:
    return firsts.cpu().contiguous()


def _word(runs: Sequence[Run]) -> torch.dtype:
    """The longest that everything divides into."""
    sizes = []
    for run in runs:
        start = int(run.buffer.storage_offset()) * run.buffer.element_size()
        sizes += [run.width, run.offset, run.stride, run.row_stride, start]
    return _WORDS[reduce(gcd, sizes, 8)]
