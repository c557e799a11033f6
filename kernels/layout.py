"""Where the numbers of KV pages lie in some memory: an engine's pool, or the store's records.

A *slot* is the place of one token; slot ``s`` is token ``s % page_size`` of page ``s // page_size``. A *plane*
is K, or V, or the latent row of MLA, or the scales beside one of these. A *run* is what one token has for one
head in one layer of one plane: contiguous bytes, in every layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from operator import index
from typing import Protocol

from . import _native

AXES = "lpsthc"  # layer, page, slot, token in a page, head, content of a run

# Axes of K, and of V, in SGLang's host pools; of a pool of latent rows without the head's.
HOST_AXES = {
    "layer_first": "lshc",
    "page_first": "slhc",
    "page_first_direct": "plthc",
    "page_head": "phtlc",
}
UNIFIED_AXES = "pgl2thc"  # page_unified: g groups of heads, and K and V in one tensor

BYTES = (
    "uint8"  # of a tensor that says nothing of the numbers in it: SGLang's pools of e4m3 are such
)


class Strided(Protocol):
    """What is asked of a tensor; torch's answers."""

    @property
    def shape(self) -> Sequence[int]: ...
    def stride(self) -> Sequence[int]: ...
    @property
    def dtype(self) -> object: ...
    def data_ptr(self) -> int: ...
    def element_size(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Plane:
    """One plane's addresses; all strides in bytes.

    Attributes:
        layers: address of page 0, token 0, head 0 of each layer; offset from the page's begin where each page has
            an address of its own.
        run: bytes of one run.
    """

    layers: tuple[int, ...]
    page_stride: int
    token_stride: int
    head_stride: int
    run: int


@dataclass(frozen=True)
class PageLayout:
    """Where the pages of one pool lie.

    Attributes:
        planes: K and V, or one; all of as many layers. Where heads are kept in groups, all groups of K, then of V.
        pages: how many there are.
        page_size: tokens of a page.
        heads: of a token, in each layer and plane: those of one group.
        itemsize: bytes of a number.
        memory: ranges (address, bytes) that hold all of it; a copy touches nothing else.
        pages_at: address of each page, if pages are anywhere; else the planes' strides tell.
        owner: what must live for the addresses to stay valid.
        dtype: of the numbers, as torch calls it; None where nothing is known but their bytes.
        groups: of heads, a plane each.

    Raises:
        ValueError: something of it lies outside `memory`, or the numbers contradict each other.
    """

    planes: tuple[Plane, ...]
    pages: int
    page_size: int
    heads: int
    itemsize: int
    memory: tuple[tuple[int, int], ...]
    pages_at: tuple[int, ...] = ()
    owner: object = field(default=None, repr=False, compare=False)
    dtype: str | None = None
    groups: int = 1
    native: _native.Layout = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if require_whole("groups", self.groups, 1) and len(self.planes) % self.groups:
            raise ValueError(f"groups: {self.groups} of {len(self.planes)} planes")
        planes = [
            (p.layers, p.page_stride, p.token_stride, p.head_stride, p.run) for p in self.planes
        ]
        try:
            native = _native.Layout(
                planes,
                self.pages_at,
                self.pages,
                self.page_size,
                self.heads,
                self.itemsize,
                self.memory,
            )
        except TypeError:  # a number that no address or length is
            raise ValueError(
                f"planes, pages and sizes must be whole numbers from 0 on: {self}"
            ) from None
        object.__setattr__(self, "native", native)

    # Of what there is.

    @classmethod
    def of(
        cls, planes: Sequence[Strided | Sequence[Strided]], axes: str, *, page_size: int
    ) -> PageLayout:
        """Tensors, by what their axes stand for.

        Args:
            planes: for each plane a tensor with a layer axis, or one tensor a layer.
            axes: a letter an axis: (l)ayer, (p)age, (s)lot, (t)oken, (h)ead, (c)ontent of a run, the last one;
                either slots, or pages and tokens. Content is contiguous.

        Raises:
            ValueError: the tensors are not alike, or do not have these axes.
        """
        _require_axes(axes)
        require_whole("page_size", page_size, 1)
        seen = [_See(each, axes, page_size) for each in planes]
        if not seen:
            raise ValueError("planes: there is none")
        shapes = {(one.pages, one.heads, one.itemsize, one.dtype) for one in seen}
        if len(shapes) != 1:
            raise ValueError(
                f"planes: of different pages, heads or dtypes: {sorted(shapes, key=str)}"
            )
        (pages, heads, itemsize, dtype) = shapes.pop()
        memory = tuple(area for one in seen for area in one.memory)
        return cls(
            tuple(one.plane for one in seen),
            pages,
            page_size,
            heads,
            itemsize,
            memory,
            owner=planes,
            dtype=dtype,
        )

    @classmethod
    def device_pool(cls, planes: Sequence[Sequence[Strided]], *, page_size: int) -> PageLayout:
        """SGLang's pool on the device: for K and V, or for latent rows alone, a tensor [slot, head, dim] a layer."""
        return cls.of(planes, "shc", page_size=page_size)

    @classmethod
    def host_pool(cls, layout: str, planes: Sequence[Strided], *, page_size: int) -> PageLayout:
        """SGLang's pool in host memory.

        Args:
            layout: layer_first, page_first, page_first_direct, page_head or page_unified.
            planes: `kv_buffer`'s K and V, or the one tensor of latent rows; of page_unified always the one tensor.

        Raises:
            ValueError: another layout, or tensors that are not of it.
        """
        if layout == "page_unified":
            return _unified(planes, page_size)
        if layout not in HOST_AXES:
            raise ValueError(
                f"layout: {layout!r} is none of {sorted([*HOST_AXES, 'page_unified'])}"
            )
        return cls.of(planes, HOST_AXES[layout], page_size=page_size)

    @classmethod
    def blocks(cls, layers: Sequence[Strided], *, head_dims: Sequence[int]) -> PageLayout:
        """vLLM's views [block, head, token, content], one a layer, whose content is K and then V.

        Args:
            head_dims: numbers of a run of K and of V, or of the one latent row.

        Raises:
            ValueError: the views are not alike, or not of these axes and dimensions.
        """
        if not layers:
            raise ValueError("layers: there is none")
        if len(layers[0].shape) != 4:
            raise ValueError(
                f"layers: {tuple(layers[0].shape)} is not [block, head, token, content]"
            )
        size, itemsize = layers[0].shape[2], layers[0].element_size()
        if sum(head_dims) != layers[0].shape[3]:
            raise ValueError(f"head_dims: {list(head_dims)} do not add up to {layers[0].shape[3]}")
        whole = cls.of([layers], "phtc", page_size=size)
        (plane,), begin, planes = whole.planes, 0, []
        for dim in head_dims:
            starts = tuple(start + begin for start in plane.layers)
            planes.append(replace(plane, layers=starts, run=dim * itemsize))
            begin += dim * itemsize
        return replace(whole, planes=tuple(planes))

    @classmethod
    def records(
        cls,
        addresses: Sequence[int],
        *,
        runs: Sequence[int],
        layers: int,
        heads: int,
        page_size: int,
        itemsize: int,
        owner: object = None,
        dtype: str | None = None,
    ) -> PageLayout:
        """The store's pages, in the order of SGLang's page_first: K as [token, layer, head], then V.

        Args:
            addresses: where each record begins.
            runs: bytes of a run of K and of V.
            owner: keeps the records' memory alive.
            dtype: of the numbers, as torch calls it, if that is known.

        Raises:
            ValueError: the numbers contradict each other.
        """
        for name, value in (("layers", layers), ("heads", heads), ("page_size", page_size)):
            require_whole(name, value, 1)
        planes, begin = [], 0
        for run in runs:
            starts = tuple(begin + layer * heads * run for layer in range(layers))
            planes.append(Plane(starts, 0, layers * heads * run, run, run))
            begin += page_size * layers * heads * run
        memory = tuple((address, begin) for address in addresses)
        return cls(
            tuple(planes),
            len(addresses),
            page_size,
            heads,
            itemsize,
            memory,
            tuple(addresses),
            owner,
            dtype,
        )

    # Parts of it.

    def select(self, *, layers: range | None = None, heads: range | None = None) -> PageLayout:
        """The same pages with these layers and heads only; all of them where nothing is said.

        Args:
            heads: of each group.

        Raises:
            ValueError: there are none of these.
        """
        wanted = range(self.layers) if layers is None else layers
        some = range(self.heads) if heads is None else heads
        require_within("layers", wanted, self.layers)
        require_within("heads", some, self.heads)
        planes = tuple(
            replace(
                plane,
                layers=tuple(plane.layers[i] + some.start * plane.head_stride for i in wanted),
            )
            for plane in self.planes
        )
        return replace(self, planes=planes, heads=len(some))

    def split_heads(self, groups: int) -> PageLayout:
        """The same numbers, each plane as `groups` planes of fewer heads.

        Raises:
            ValueError: the heads do not divide so.
        """
        require_whole("groups", groups, 1)
        each, rest = divmod(self.heads, groups)
        if rest:
            raise ValueError(f"heads: {self.heads} are not {groups} groups")
        planes = tuple(
            replace(
                plane,
                layers=tuple(start + group * each * plane.head_stride for start in plane.layers),
            )
            for plane in self.planes
            for group in range(groups)
        )
        return replace(self, planes=planes, heads=each, groups=self.groups * groups)

    @property
    def layers(self) -> int:
        """Of each plane."""
        return len(self.planes[0].layers)

    @property
    def page_bytes(self) -> int:
        """Of what one page holds, gaps not counted."""
        return self.page_size * self.layers * self.heads * sum(plane.run for plane in self.planes)


class _See:
    """One plane of tensors."""

    def __init__(self, given: Strided | Sequence[Strided], axes: str, page_size: int) -> None:
        tensors = list(given) if isinstance(given, Sequence) else [given]
        if not tensors:
            raise ValueError("planes: one has no layers")
        if ("l" in axes) != (not isinstance(given, Sequence)):
            raise ValueError("planes: one tensor with a layer axis, or one without for each layer")
        kinds = {(tuple(each.shape), tuple(each.stride()), each.dtype) for each in tensors}
        if len(kinds) != 1:
            raise ValueError("planes: tensors of the layers differ in shape, strides or dtype")
        ((shape, stride, _),) = kinds
        self.itemsize, self.dtype = tensors[0].element_size(), _dtype(tensors[0])
        if len(shape) != len(axes):
            raise ValueError(f"planes: tensors have {len(shape)} axes, {axes!r} names {len(axes)}")
        self._length = dict(zip(axes, shape, strict=True))
        self._stride = {axis: each * self.itemsize for axis, each in zip(axes, stride, strict=True)}
        _require_contiguous(self._length["c"], self._stride["c"], self.itemsize)
        self.heads = self._length.get("h", 1)
        self.pages = self._pages(page_size)
        self.memory = [(each.data_ptr(), _reach(shape, stride) * self.itemsize) for each in tensors]
        starts = [each.data_ptr() for each in tensors]
        if "l" in axes:
            starts = [starts[0] + i * self._stride["l"] for i in range(self._length["l"])]
        self.plane = Plane(
            tuple(starts),
            self._stride["p"] if "p" in axes else page_size * self._stride["s"],
            self._stride["t"] if "p" in axes else self._stride["s"],
            self._stride.get("h", 0),
            self._length["c"] * self.itemsize,
        )

    def _pages(self, page_size: int) -> int:
        if "p" not in self._length:
            return self._length["s"] // page_size
        if self._length["t"] != page_size:
            raise ValueError(f"page_size: {page_size}, but tensors have {self._length['t']}")
        return self._length["p"]


def _require_axes(axes: str) -> None:
    slots = "s" in axes, "p" in axes and "t" in axes
    if set(axes) - set(AXES) or len(set(axes)) != len(axes) or not axes.endswith("c"):
        raise ValueError(f"axes: {axes!r} is not of the letters {AXES!r}, each once and c the last")
    if sum(slots) != 1 or ("s" in axes) == ("p" in axes or "t" in axes):
        raise ValueError(f"axes: {axes!r} has neither s alone nor both p and t")


def _require_contiguous(numbers: int, stride: int, itemsize: int) -> None:
    if numbers > 1 and stride != itemsize:
        raise ValueError("planes: the content of a run is not contiguous")


def _dtype(tensor: Strided) -> str | None:
    name = str(tensor.dtype).removeprefix("torch.")
    return None if name == BYTES else name


def require_whole(name: str, value: object, least: int) -> int:
    """The number, if it is one of at least so much that the native side can hold.

    Raises:
        ValueError: it is not.
    """
    try:
        number = index(value)  # type: ignore[arg-type]  # what is no number it says itself
    except TypeError:
        raise ValueError(f"{name}: {value!r} is no whole number") from None
    if not least <= number < 1 << 32:
        raise ValueError(f"{name}: {number} is not from {least} to 2^32 - 1")
    return number


def require_within(name: str, wanted: range, count: int) -> None:
    """Raises: ValueError: not some of `count`, one after another."""
    is_part = isinstance(wanted, range) and wanted.step == 1
    if not is_part or not 0 <= wanted.start < wanted.stop <= count:
        raise ValueError(f"{name}: {wanted!r} is no range of these {count}")


def _reach(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from the first to behind the last one."""
    if 0 in shape:
        return 0
    return 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))


def _unified(planes: Sequence[Strided], page_size: int) -> PageLayout:
    """page_unified: [page, group, layer, K or V, token, head, dim]; of latent rows [page, layer, token, dim]."""
    if len(planes) != 1:
        raise ValueError("planes: page_unified has one tensor")
    (tensor,) = planes
    if len(tensor.shape) == 4:
        return PageLayout.of(planes, "pltc", page_size=page_size)
    if (
        len(tensor.shape) != len(UNIFIED_AXES)
        or tensor.shape[3] != 2
        or tensor.shape[4] != page_size
    ):
        raise ValueError(
            f"planes: {tuple(tensor.shape)} is not [page, group, layer, 2, token, head, dim]"
        )
    size = tensor.element_size()
    strides = dict(zip(UNIFIED_AXES, (step * size for step in tensor.stride()), strict=True))
    _require_contiguous(tensor.shape[-1], strides["c"], size)
    return PageLayout(
        _unified_planes(tensor.data_ptr(), tensor.shape, strides, size),
        pages=tensor.shape[0],
        page_size=page_size,
        heads=tensor.shape[5],
        itemsize=size,
        memory=((tensor.data_ptr(), _reach(tensor.shape, tensor.stride()) * size),),
        owner=planes,
        dtype=_dtype(tensor),
        groups=tensor.shape[1],
    )


def _unified_planes(
    start: int, shape: Sequence[int], strides: dict[str, int], size: int
) -> tuple[Plane, ...]:
    """All groups of K, then of V. Args: strides: in bytes."""
    _, groups, layers, _, _, _, dim = shape
    return tuple(
        Plane(
            tuple(
                start + kv * strides["2"] + group * strides["g"] + i * strides["l"]
                for i in range(layers)
            ),
            strides["p"],
            strides["t"],
            strides["h"],
            dim * size,
        )
        for kv in range(2)
        for group in range(groups)
    )
