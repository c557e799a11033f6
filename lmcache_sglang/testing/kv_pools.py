"""Small KV pools of every layout, whose numbers can be looked at in one order.

What the tests and benchmarks of `copy_pages` copy between. Memory comes from the caller, so that a test can put
a pool next to memory that must not be touched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor

from ..kernels.layout import HOST_AXES, PageLayout

Allocate = Callable[[int], Tensor]  # bytes -> uint8 [bytes]


@dataclass(frozen=True)
class Shape:
    """What two pools must have in common.

    Attributes:
        dims: numbers of a run of K and of V; one of latent rows.
    """

    pages: int = 5
    page_size: int = 8
    layers: int = 3
    heads: int = 2
    dims: tuple[int, ...] = (16, 16)
    dtype: torch.dtype = torch.bfloat16

    @property
    def runs(self) -> tuple[int, ...]:
        """Bytes of a run of each plane."""
        return tuple(dim * self.dtype.itemsize for dim in self.dims)

    @property
    def page_bytes(self) -> int:
        return self.page_size * self.layers * self.heads * sum(self.runs)


@dataclass(frozen=True)
class Pool:
    """A pool and its numbers.

    Attributes:
        numbers: copies each plane, as [page, token, layer, head, dim].
        memory: uint8, all that was allocated for it.
        gaps: copies what lies between its numbers.
        views: of each plane and layer, [page, token, head, dim] of the pool's own memory; where these are tensors.
    """

    layout: PageLayout
    numbers: Callable[[], list[Tensor]]
    memory: Sequence[Tensor]
    gaps: Callable[[], list[Tensor]] = list
    views: Sequence[Sequence[Tensor]] = ()


class _Memory:
    """Tensors of one dtype, and the bytes they lie in."""

    def __init__(self, shape: Shape, allocate: Allocate) -> None:
        self._dtype, self._allocate = shape.dtype, allocate
        self.taken: list[Tensor] = []

    def tensor(self, *sizes: int) -> Tensor:
        self.taken.append(self._allocate(prod(sizes) * self._dtype.itemsize))
        return self.taken[-1].view(self._dtype).view(sizes)


def device_pool(shape: Shape, allocate: Allocate) -> Pool:
    """SGLang's: [slot, head, dim], a buffer a layer."""
    memory, slots = _Memory(shape, allocate), shape.pages * shape.page_size
    planes = [
        [memory.tensor(slots, shape.heads, dim) for _ in range(shape.layers)] for dim in shape.dims
    ]

    views = [[each.view(shape.pages, -1, *each.shape[1:]) for each in plane] for plane in planes]

    def numbers() -> list[Tensor]:
        return [torch.stack(plane, 2) for plane in views]

    layout = PageLayout.device_pool(planes, page_size=shape.page_size)
    return Pool(layout, numbers, memory.taken, views=views)


def padded_pool(shape: Shape, allocate: Allocate) -> Pool:
    """[page, head, token, dim], a buffer a layer, with three numbers unused behind each run and a head a token."""
    memory = _Memory(shape, allocate)
    whole = [
        [
            memory.tensor(shape.pages, shape.heads + 1, shape.page_size, dim + 3)
            for _ in range(shape.layers)
        ]
        for dim in shape.dims
    ]
    planes = [[each[:, 1:, :, :-3] for each in plane] for plane in whole]

    def numbers() -> list[Tensor]:
        return [torch.stack(plane).permute(1, 3, 0, 2, 4).clone() for plane in planes]

    def gaps() -> list[Tensor]:
        every = [each for plane in whole for each in plane]
        return [each[:, :1].clone() for each in every] + [each[..., -3:].clone() for each in every]

    layout = PageLayout.of(planes, "phtc", page_size=shape.page_size)
    return Pool(layout, numbers, memory.taken, gaps)


def host_pool(kind: str, shape: Shape, allocate: Allocate) -> Pool:
    """SGLang's host pool of one of the four layouts that have K and V apart."""
    memory, axes = _Memory(shape, allocate), HOST_AXES[kind]
    length = {"l": shape.layers, "p": shape.pages, "t": shape.page_size, "h": shape.heads}
    length["s"] = shape.pages * shape.page_size
    tensors = [memory.tensor(*(length[axis] for axis in axes[:-1]), dim) for dim in shape.dims]

    at, order = axes.find("s"), axes.replace("s", "pt")
    split = [
        each.view(*each.shape[:at], shape.pages, -1, *each.shape[at + 1 :]) if at >= 0 else each
        for each in tensors
    ]
    ordered = [each.permute([order.index(axis) for axis in "ptlhc"]) for each in split]
    layout = PageLayout.host_pool(kind, tensors, page_size=shape.page_size)
    return _viewed(layout, ordered, memory)


def unified_pool(groups: int, shape: Shape, allocate: Allocate) -> Pool:
    """SGLang's page_unified: [page, group, layer, K or V, token, head, dim]; K and V are of one size."""
    memory, heads = _Memory(shape, allocate), shape.heads // groups
    whole = memory.tensor(
        shape.pages, groups, shape.layers, 2, shape.page_size, heads, shape.dims[0]
    )

    def numbers() -> list[Tensor]:
        return [each.permute(0, 3, 2, 1, 4, 5).flatten(3, 4) for each in whole.unbind(3)]

    layout = PageLayout.host_pool("page_unified", [whole], page_size=shape.page_size)
    return Pool(layout, numbers, memory.taken)


def block_pool(order: str, shape: Shape, allocate: Allocate) -> Pool:
    """vLLM's: views [block, head, token, K and V], all layers in one allocation in this order of L, B, H, N, C."""
    memory = _Memory(shape, allocate)
    length = {"L": shape.layers, "B": shape.pages, "H": shape.heads, "N": shape.page_size}
    length["C"] = sum(shape.dims)
    whole = memory.tensor(*(length[axis] for axis in order))
    blocks = whole.permute([order.index(axis) for axis in "LBHNC"])

    ordered = torch.split(blocks.permute(1, 3, 0, 2, 4), list(shape.dims), dim=-1)
    layout = PageLayout.blocks(list(blocks.unbind(0)), head_dims=shape.dims)
    return _viewed(layout, ordered, memory)


def slots(shape: Shape, allocate: Allocate) -> Pool:
    """The store's pages, one behind another, as a tier has them."""
    memory = _Memory(shape, allocate)
    whole = memory.tensor(shape.pages, shape.page_bytes // shape.dtype.itemsize)
    heads = shape.page_size * shape.layers * shape.heads
    planes = torch.split(whole, [heads * dim for dim in shape.dims], dim=1)
    places = (shape.pages, shape.page_size, shape.layers, shape.heads)
    layout = _records([each.data_ptr() for each in whole], shape, memory.taken)
    return _viewed(layout, [each.view(*places, -1) for each in planes], memory)


def records(shape: Shape, allocate: Allocate) -> Pool:
    """The store's pages, each one in memory of its own, in no order."""
    whole = [allocate(shape.page_bytes) for _ in range(shape.pages)][::-1]
    sizes = [shape.page_bytes // sum(shape.runs) * run for run in shape.runs]

    def numbers() -> list[Tensor]:
        places = (shape.pages, shape.page_size, shape.layers, shape.heads, -1)
        planes = torch.split(torch.stack(list(whole)), sizes, dim=1)
        return [each.contiguous().view(shape.dtype).view(places) for each in planes]

    return Pool(_records([each.data_ptr() for each in whole], shape, whole), numbers, whole)


def _records(addresses: Sequence[int], shape: Shape, owner: object) -> PageLayout:
    return PageLayout.records(
        addresses,
        runs=shape.runs,
        layers=shape.layers,
        heads=shape.heads,
        page_size=shape.page_size,
        itemsize=shape.dtype.itemsize,
        owner=owner,
    )


def _viewed(layout: PageLayout, planes: Sequence[Tensor], memory: _Memory) -> Pool:
    """Args: planes: [page, token, layer, head, dim], of the pool's own memory."""
    views = [list(plane.unbind(2)) for plane in planes]
    return Pool(layout, lambda: [each.clone() for each in planes], memory.taken, views=views)


BLOCK_ORDERS = ("LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")
KINDS: dict[str, Callable[[Shape, Allocate], Pool]] = {
    "device": device_pool,
    "padded": padded_pool,
    **{kind: partial(host_pool, kind) for kind in HOST_AXES},
    "page_unified": partial(unified_pool, 1),
    **{order: partial(block_pool, order) for order in BLOCK_ORDERS},
    "slots": slots,
    "records": records,
}
