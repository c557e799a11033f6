"""KV pools of every layout, small, and the plain torch way to copy between them.

What a test or a check of the copies compares with: each pool shows its numbers as [page, token, group, head, content]
views, whatever its layout, so that a copy is one assignment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod

import torch
from torch import Tensor

from ..kernels.copy_plan import CopyPlan
from ..kernels.layout import HOST_AXES, PageLayout

RECORD_GAP = 16  # numbers between records

Allocate = Callable[[int], Tensor]  # bytes -> uint8 [bytes]


@dataclass(frozen=True, slots=True)
class PoolShape:
    """Of a pool's numbers.

    Attributes:
        dims: numbers of a run of K and of V, or of the one latent row.
    """

    layers: int = 3
    pages: int = 5
    page_size: int = 4
    heads: int = 4
    dims: tuple[int, ...] = (8, 8)
    dtype: torch.dtype = torch.bfloat16

    @property
    def groups(self) -> int:
        """Of heads, in page_unified."""
        return 2 if self.heads % 2 == 0 else 1

    @property
    def page_bytes(self) -> int:
        """Of the numbers of one page."""
        cells = self.page_size * self.layers * self.heads
        return cells * sum(self.dims) * self.dtype.itemsize

    def has(self, kind: str) -> bool:
        """page_unified has K and V in one tensor, so they are alike."""
        return kind != "page_unified" or len(set(self.dims)) == 1


class Pool:
    """One pool.

    Args:
        kind: one of EVERY_KIND.
        shift: numbers before each tensor's first, so that addresses are no better aligned than a number is.
        pinned: host memory that a GPU reads.
        allocate: makes the memory, instead of torch.

    Attributes:
        flats: all its memory.
        layout: where its pages lie.
    """

    def __init__(
        self,
        kind: str,
        shape: PoolShape,
        *,
        device: str = "cpu",
        pinned: bool = False,
        shift: int = 0,
        allocate: Allocate | None = None,
    ) -> None:
        self.kind, self.shape = kind, shape
        self.device, self.pinned, self.shift = device, pinned, shift
        self._allocate = allocate
        self.flats: list[Tensor] = []
        self._rows: list[list[Tensor]] = []  # [plane][layer]
        self.layout: PageLayout = _MAKERS[kind](self)

    def rows(self, plane: int, layer: int) -> Tensor:
        """[page, token, group, head, content] of one plane and layer, in place."""
        return self._rows[plane][layer]

    @property
    def planes(self) -> int:
        return len(self.shape.dims)

    def fill(self, seed: int) -> None:
        """Any bytes, numbers or not."""
        generator = torch.Generator(self.device).manual_seed(seed)
        for flat in self.flats:
            flat.view(torch.uint8).random_(0, 256, generator=generator)

    def twin(self) -> Pool:
        """Another one with the same content."""
        other = Pool(
            self.kind, self.shape, device=self.device, pinned=self.pinned, shift=self.shift
        )
        for mine, its in zip(self.flats, other.flats, strict=True):
            its.copy_(mine)
        return other

    def same(self, other: Pool) -> bool:
        """Bit by bit, and beside the pages too."""
        return all(
            torch.equal(mine.view(torch.uint8), its.view(torch.uint8))
            for mine, its in zip(self.flats, other.flats, strict=True)
        )

    def memory(self) -> list[tuple[int, int]]:
        """Address and bytes of each of `flats`."""
        return [(flat.data_ptr(), flat.numel() * flat.element_size()) for flat in self.flats]

    # For the makers below.

    def new(self, *sizes: int) -> Tensor:
        """Memory of this shape, its numbers 0 unless the caller's `allocate` made it."""
        dtype, numbers = self.shape.dtype, prod(sizes) + self.shift
        if self._allocate is None:
            flat = torch.zeros(numbers, dtype=dtype, device=self.device, pin_memory=self.pinned)
        else:
            flat = self._allocate(numbers * dtype.itemsize).view(dtype)
        self.flats.append(flat)
        return flat[self.shift :].view(sizes)

    def show(self, layers: Sequence[Tensor], axes: str) -> None:
        """One plane's tensors of these axes: p, t, h, c, or s instead of p and t."""
        split = axes.replace("s", "pt")
        order = [split.index(axis) for axis in "pthc"]
        for each in layers:
            paged = (
                split_axis(each, axes.index("s"), (self.shape.pages, -1)) if "s" in axes else each
            )
            rows = split_axis(paged.permute(order), 2, (self.shape.groups, -1))
            self.show_groups(rows)

    def show_groups(self, rows: Tensor) -> None:
        """The next layer, as `rows` gives it."""
        if not self._rows or len(self._rows[-1]) == self.shape.layers:
            self._rows.append([])
        self._rows[-1].append(rows)


def split_axis(tensor: Tensor, axis: int, sizes: tuple[int, ...]) -> Tensor:
    """One axis as several, in place; one of the sizes may be -1."""
    shape = tensor.shape
    return tensor.view(*shape[:axis], *sizes, *shape[axis + 1 :])


def _device(pool: Pool) -> PageLayout:
    """SGLang's: [slot, head, dim], a buffer a layer."""
    s, planes = pool.shape, []
    for dim in s.dims:
        planes.append([pool.new(s.pages * s.page_size, s.heads, dim) for _ in range(s.layers)])
        pool.show(planes[-1], "shc")
    return PageLayout.device_pool(planes, page_size=s.page_size)


def _host(pool: Pool) -> PageLayout:
    """SGLang's host pools that have K and V apart."""
    s, axes = pool.shape, HOST_AXES[pool.kind]
    length = {"l": s.layers, "p": s.pages, "t": s.page_size, "h": s.heads}
    length["s"] = s.pages * s.page_size
    tensors = [pool.new(*(length.get(axis, dim) for axis in axes)) for dim in s.dims]
    for tensor in tensors:
        pool.show(tensor.unbind(axes.index("l")), axes.replace("l", ""))
    return PageLayout.host_pool(pool.kind, tensors, page_size=s.page_size)


def _unified(pool: Pool) -> PageLayout:
    """SGLang's page_unified: [page, group, layer, K or V, token, head, dim]; of latent rows [page, layer, token, dim]."""
    s = pool.shape
    (dim,) = set(s.dims)
    if len(s.dims) == 1:
        tensor = pool.new(s.pages, s.layers, s.page_size, dim)
        pool.show([each.unsqueeze(2) for each in tensor.unbind(1)], "pthc")
    else:
        heads = s.heads // s.groups
        tensor = pool.new(s.pages, s.groups, s.layers, 2, s.page_size, heads, dim)
        for plane in range(2):
            for layer in tensor[:, :, :, plane].unbind(2):  # [page, group, token, head, dim]
                pool.show_groups(layer.transpose(1, 2))
    return PageLayout.host_pool("page_unified", [tensor], page_size=s.page_size)


def _padded(pool: Pool) -> PageLayout:
    """[page, head, token, dim], a buffer a layer, with three numbers unused behind each run and a head a token."""
    s, planes = pool.shape, []
    for dim in s.dims:
        whole = [pool.new(s.pages, s.heads + 1, s.page_size, dim + 3) for _ in range(s.layers)]
        planes.append([each[:, 1:, :, :-3] for each in whole])
        pool.show(planes[-1], "phtc")
    return PageLayout.of(planes, "phtc", page_size=s.page_size)


def _blocks(pool: Pool) -> PageLayout:
    """vLLM's views [block, head, token, K and V], an allocation a layer."""
    s = pool.shape
    layers = [pool.new(s.pages, s.heads, s.page_size, sum(s.dims)) for _ in range(s.layers)]
    return _of_views(pool, layers)


def _ordered_blocks(pool: Pool) -> PageLayout:
    """vLLM's views, all layers in one allocation, in the order of L, B, H, N, C that is the kind's name."""
    s, order = pool.shape, pool.kind
    length = {"L": s.layers, "B": s.pages, "H": s.heads, "N": s.page_size, "C": sum(s.dims)}
    whole = pool.new(*(length[axis] for axis in order))
    return _of_views(pool, whole.permute([order.index(axis) for axis in "LBHNC"]).unbind(0))


def _of_views(pool: Pool, layers: Sequence[Tensor]) -> PageLayout:
    begin = 0
    for dim in pool.shape.dims:
        pool.show([each[..., begin : begin + dim] for each in layers], "phtc")
        begin += dim
    return PageLayout.blocks(layers, head_dims=pool.shape.dims)


def _records(pool: Pool, gap: int) -> PageLayout:
    """The store's pages, one behind another."""
    s = pool.shape
    numbers = s.page_bytes // s.dtype.itemsize
    return _of_records(pool, pool.new(s.pages, numbers + gap)[:, :numbers])


def _of_records(pool: Pool, whole: Tensor) -> PageLayout:
    """Args: whole: [page, number]."""
    s, begin = pool.shape, 0
    for dim in s.dims:
        end = begin + s.page_size * s.layers * s.heads * dim
        split = split_axis(whole[:, begin:end], 1, (s.page_size, s.layers, s.heads, dim))
        pool.show(split.unbind(2), "pthc")
        begin = end
    return PageLayout.records(
        [page.data_ptr() for page in whole],
        runs=[dim * s.dtype.itemsize for dim in s.dims],
        layers=s.layers,
        heads=s.heads,
        page_size=s.page_size,
        itemsize=s.dtype.itemsize,
        owner=whole,
        dtype=str(s.dtype).removeprefix("torch.") if s.dtype != torch.uint8 else None,
    )


BLOCK_ORDERS = ("LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")
_MAKERS: dict[str, Callable[[Pool], PageLayout]] = {
    "device": _device,
    **dict.fromkeys(HOST_AXES, _host),
    "page_unified": _unified,
    "blocks": _blocks,
    "records": partial(_records, gap=RECORD_GAP),
    "slots": partial(_records, gap=0),  # as a tier has them
    "padded": _padded,
    **dict.fromkeys(BLOCK_ORDERS, _ordered_blocks),
}
KINDS = ("device", *HOST_AXES, "page_unified", "blocks", "records")  # what a GPU is checked with
EVERY_KIND = tuple(_MAKERS)


def copy_by_torch(
    src: Pool, dst: Pool, src_pages: Sequence[int], dst_pages: Sequence[int], layers: range
) -> None:
    """The reference: whole pages, by indexing."""
    for plane in range(src.planes):
        for layer in layers:
            dst.rows(plane, layer)[list(dst_pages)] = src.rows(plane, layer)[list(src_pages)].to(
                dst.flats[0].device
            )


def copy_slots_by_torch(src: Pool, dst: Pool, plan: CopyPlan) -> None:
    """The reference: any plan that converts nothing, of pools in host memory."""
    within = torch.arange(plan.tokens)
    here, there = (
        (torch.as_tensor(slots, dtype=torch.int64).view(-1, 1) + within).flatten()
        for slots in (plan.src_slots, plan.dst_slots)
    )
    size, other = src.shape.page_size, dst.shape.page_size
    for plane in range(src.planes):
        for layer in plan.layers or range(src.shape.layers):
            moved = src.rows(plane, layer)[here // size, here % size]
            dst.rows(plane, layer)[there // other, there % other] = moved


def quantize_by_torch(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The reference: e4m3 numbers, and the float32 scale of each run: its largest magnitude over 448.

    The formula is that of SGLang's and vLLM's per-token quantisation. Runs of zeros stay zeros; their scale is 0.
    """
    numbers = rows.float()
    magnitudes = numbers.abs().nan_to_num(nan=0.0, posinf=float("inf"))
    scales = magnitudes.amax(-1, keepdim=True) / 448.0
    quotients = torch.where(scales > 0, numbers / scales, numbers)
    made = quotients.clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    return _one_nan(made, quotients.isnan(), rows.signbit(), 0x7F), scales


def dequantize_by_torch(rows: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The reference, back."""
    numbers = rows.float()
    products = numbers * scales
    negative = numbers.signbit() ^ scales.signbit()
    nan = {torch.bfloat16: 0x7FC0, torch.float16: 0x7E00}[dtype]
    return _one_nan(products.to(dtype), products.isnan(), negative, nan)


def _one_nan(made: Tensor, where: Tensor, negative: Tensor, nan: int) -> Tensor:
    """The same, with NaNs of one mantissa, which have their sign from the numbers."""
    bits = {1: torch.uint8, 2: torch.int16}[made.element_size()]
    sign = torch.tensor(1 << 8 * made.element_size() - 1)
    its = torch.where(negative, sign | nan, torch.tensor(nan)).to(bits)
    return torch.where(where, its, made.view(bits)).view(made.dtype)


def scales_shape(shape: PoolShape) -> PoolShape:
    """Of the pool of scales beside one of e4m3 numbers."""
    return replace(shape, dims=(1,) * len(shape.dims), dtype=torch.float32)
