"""Where pages lie in a device pool and in records; device_copiers.py has what moves them.

A device pool is a list of buffers, mostly one for K and one for V of each layer, whose rows are tokens (or whole
pages, or states). A record is a page in one contiguous run of bytes. A `Run` says where in a record the rows of
one buffer lie, so that any order of bytes is a matter of offsets and strides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch


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

    @property
    def shape(self) -> tuple[int, int, int]:
        """What runs of one plane have in common."""
        return self.width, self.row_stride, self.stride


@dataclass(frozen=True, slots=True)
class Group:
    """Layers whose buffers are alike.

    Attributes:
        planes: for K, for V, or whatever a layer has, one run a layer: planes[plane][layer].
    """

    planes: tuple[tuple[Run, ...], ...]

    @property
    def runs(self) -> list[Run]:
        return [run for plane in self.planes for run in plane]


# Copies a layer of a group, by their numbers.
Scatter = Callable[[int, int], None]


class Copier(Protocol):
    """Copies the pages of a pool. Both return once the copies are enqueued on the current stream of the pool's device,
    or, on a CPU, done."""

    def to_records(self, firsts: torch.Tensor, records: torch.Tensor) -> None:
        """Args: firsts: int64 [page], the first row of each. records: uint8 [page, page_bytes]."""

    def to_device(
        self, firsts: torch.Tensor, records: torch.Tensor, chosen: torch.Tensor
    ) -> AbstractContextManager[Scatter]:
        """Args: chosen: int64 [page], the record of each page, in host memory."""


class MakesCopier(Protocol):
    def __call__(self, groups: Sequence[Group], span: int) -> Copier: ...


class DevicePages:
    """The pages of one device pool.

    Args:
        runs: all of its buffers.
        span: rows that a page has in each buffer.
        layers: of each layer, which of the runs hold it.
        copier: makes what copies them.

    Attributes:
        groups: the runs, by layers that are alike.
        page_bytes: of a record.

    Raises:
        NotImplementedError: a buffer whose rows are not in one piece, or two layers with a buffer in common.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        span: int,
        layers: Mapping[int, Sequence[int]],
        copier: MakesCopier,
    ) -> None:
        self.page_bytes = sum(run.width for run in runs) * span
        if any(not run.buffer[0].is_contiguous() for run in runs):
            raise NotImplementedError("lmcache: rows of a device pool are not in one piece")
        self._device = runs[0].buffer.device
        self._span = span
        self._places, self.groups = _grouped(runs, layers)
        self.copies_by(copier)

    @property
    def is_on_device(self) -> bool:
        """Whether a host's memory must be pinned for it."""
        return self._device.type != "cpu"

    def copies_by(self, copier: MakesCopier) -> None:
        """From now on."""
        self._copier = copier(self.groups, self._span)

    def gather(self, firsts: torch.Tensor, records: torch.Tensor) -> None:
        """Copy pages from the device into records.

        Args:
            firsts: int64 [page], the first row of each.
            records: uint8 [page, page_bytes].
        """
        self._copier.to_records(firsts, records)

    @contextmanager
    def scattering(
        self, firsts: torch.Tensor, records: torch.Tensor, chosen: torch.Tensor
    ) -> Iterator[Callable[[int], None]]:
        """Gives a function that copies one layer of pages from records to the device; nothing for a layer that the
        pool has not.

        Args:
            firsts: int64 [page], the first row of each.
            records: uint8 [record, page_bytes].
            chosen: int64 [page], the record of each.
        """
        with self._copier.to_device(firsts, records, chosen) as scatter:

            def one(layer: int) -> None:
                if layer in self._places:
                    scatter(*self._places[layer])

            yield one


def _grouped(
    runs: Sequence[Run], layers: Mapping[int, Sequence[int]]
) -> tuple[dict[int, tuple[int, int]], list[Group]]:
    """Of each layer its group and its number in that; the groups."""
    used = [at for chosen in layers.values() for at in chosen]
    if len(set(used)) != len(used):
        raise NotImplementedError("lmcache: two layers of a device pool have a buffer in common")
    alike: dict[object, list[int]] = {}
    for layer, chosen in layers.items():
        alike.setdefault(tuple(runs[at].shape for at in chosen), []).append(layer)
    places: dict[int, tuple[int, int]] = {}
    groups: list[Group] = []
    for members in alike.values():
        places |= {layer: (len(groups), place) for place, layer in enumerate(members)}
        rows = [[runs[at] for at in layers[layer]] for layer in members]
        groups.append(Group(tuple(zip(*rows, strict=True))))
    # What no layer waits for is stored all the same.
    groups += [Group(((run,),)) for at, run in enumerate(runs) if at not in used]
    return places, groups
