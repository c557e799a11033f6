"""KV pools of every layout, small, and the plain torch way to copy between them.

What a test or a check of the copies compares with: each pool shows its numbers as [page, token, group, head, content]
views, whatever its layout, so that a copy is one assignment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from lmcache_sglang.kernels.layout import HOST_AXES, PageLayout

KINDS = ("device", *HOST_AXES, "page_unified", "blocks", "records")
RECORD_GAP = 16  # numbers between records


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

    def has(self, kind: str) -> bool:
        """page_unified has K and V in one tensor, so they are alike."""
        return kind != "page_unified" or len(set(self.dims)) == 1


class Pool:
    """One pool.

    Args:
        kind: one of KINDS.
        shift: numbers before each tensor's first, so that addresses are no better aligned than a number is.
        pinned: host memory that a GPU reads.

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
    ) -> None:
        self.kind, self.shape = kind, shape
        self.device, self.pinned, self.shift = device, pinned, shift
        self.flats: list[Tensor] = []
        self._rows: list[list[Tensor]] = []  # [plane][layer]
        make = {"device": self._as_device, "blocks": self._as_blocks, "records": self._as_records}
        self.layout: PageLayout = make.get(kind, self._as_host)()

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

    def _new(self, *sizes: int) -> Tensor:
        numbers = prod(sizes) + self.shift
        flat = torch.zeros(
            numbers, dtype=self.shape.dtype, device=self.device, pin_memory=self.pinned
        )
        self.flats.append(flat)
        return flat[self.shift :].view(sizes)

    def _show(self, layers: Sequence[Tensor], order: Sequence[int]) -> None:
        """One plane's tensors, whose axes in this order are page, token, head, content."""
        groups = self.shape.groups
        self._rows.append([_split(each.permute(*order), 2, (groups, -1)) for each in layers])

    def _as_device(self) -> PageLayout:
        s = self.shape
        planes = []
        for dim in s.dims:
            tensors = [self._new(s.pages * s.page_size, s.heads, dim) for _ in range(s.layers)]
            self._show([_split(each, 0, (s.pages, -1)) for each in tensors], (0, 1, 2, 3))
            planes.append(tensors)
        return PageLayout.device_pool(planes, page_size=s.page_size)

    def _as_host(self) -> PageLayout:
        s = self.shape
        if self.kind == "page_unified":
            return self._as_unified()
        axes = HOST_AXES[self.kind]
        slots = s.pages * s.page_size
        length = {"l": s.layers, "p": s.pages, "t": s.page_size, "s": slots, "h": s.heads}
        tensors = [self._new(*(length.get(axis, dim) for axis in axes)) for dim in s.dims]
        for tensor in tensors:
            split, names = tensor, axes
            if "s" in axes:
                split = _split(tensor, axes.index("s"), (s.pages, s.page_size))
                names = axes.replace("s", "pt")
            layers = split.unbind(names.index("l"))
            names = names.replace("l", "")
            self._show(layers, [names.index(axis) for axis in "pthc"])
        return PageLayout.host_pool(self.kind, tensors, page_size=s.page_size)

    def _as_unified(self) -> PageLayout:
        s = self.shape
        (dim,) = set(s.dims)
        if len(s.dims) == 1:
            tensor = self._new(s.pages, s.layers, s.page_size, dim)
            self._show([each.unsqueeze(2) for each in tensor.unbind(1)], (0, 1, 2, 3))
        else:
            heads = s.heads // s.groups
            tensor = self._new(s.pages, s.groups, s.layers, 2, s.page_size, heads, dim)
            for plane in range(2):
                layers = tensor[:, :, :, plane].unbind(2)  # each [page, group, token, head, dim]
                self._rows.append([each.transpose(1, 2) for each in layers])
        return PageLayout.host_pool("page_unified", [tensor], page_size=s.page_size)

    def _as_blocks(self) -> PageLayout:
        s = self.shape
        layers = [self._new(s.pages, s.heads, s.page_size, sum(s.dims)) for _ in range(s.layers)]
        begin = 0
        for dim in s.dims:
            self._show([each[..., begin : begin + dim] for each in layers], (0, 2, 1, 3))
            begin += dim
        return PageLayout.blocks(layers, head_dims=s.dims)

    def _as_records(self) -> PageLayout:
        s = self.shape
        row = s.layers * s.heads * sum(s.dims)
        whole = self._new(s.pages, s.page_size * row + RECORD_GAP)
        begin = 0
        for dim in s.dims:
            plane = whole[:, begin : begin + s.page_size * s.layers * s.heads * dim]
            split = _split(plane, 1, (s.page_size, s.layers, s.heads, dim))
            self._show(split.unbind(2), (0, 1, 2, 3))
            begin += s.page_size * s.layers * s.heads * dim
        size = s.dtype.itemsize
        return PageLayout.records(
            [page.data_ptr() for page in whole],
            runs=[dim * size for dim in s.dims],
            layers=s.layers,
            heads=s.heads,
            page_size=s.page_size,
            itemsize=size,
            owner=whole,
        )


def _split(tensor: Tensor, axis: int, sizes: tuple[int, ...]) -> Tensor:
    """One axis as several, in place; one of the sizes may be -1."""
    shape = tensor.shape
    return tensor.view(*shape[:axis], *sizes, *shape[axis + 1 :])


def copy_by_torch(
    src: Pool, dst: Pool, src_pages: Sequence[int], dst_pages: Sequence[int], layers: range
) -> None:
    """The reference: whole pages, by indexing."""
    for plane in range(src.planes):
        for layer in layers:
            dst.rows(plane, layer)[list(dst_pages)] = src.rows(plane, layer)[list(src_pages)].to(
                dst.flats[0].device
            )


def quantize_by_torch(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The reference: e4m3 numbers, and the float32 scale of each run: its largest magnitude over 448.

    The formula is that of SGLang's and vLLM's per-token quantisation. Runs of zeros stay zeros; their scale is 0.
    """
    numbers = rows.float()
    magnitudes = numbers.abs().nan_to_num(nan=0.0, posinf=float("inf"))
    scales = magnitudes.amax(-1, keepdim=True) / 448.0
    quotients = torch.where(scales > 0, numbers / scales, numbers)
    return quotients.clamp(-448.0, 448.0).to(torch.float8_e4m3fn), scales


def dequantize_by_torch(rows: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The reference, back."""
    return (rows.float() * scales).to(dtype)


def scales_shape(shape: PoolShape) -> PoolShape:
    """Of the pool of scales beside one of e4m3 numbers."""
    return replace(shape, dims=(1,) * len(shape.dims), dtype=torch.float32)
