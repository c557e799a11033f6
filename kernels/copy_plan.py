"""Copies of pages between two layouts, on a CPU: one native call a batch, the GIL released.

    plan = CopyPlan.of_pages([3, 4], [0, 1], page_size=64)
    copy_pages(plan, PageLayout.host_pool(...), PageLayout.device_pool(...))

There is one function for all pairs of layouts. What is contiguous on both sides is found once a plan and moved as one
run; `csrc/copy_params.hpp` says how the rest is counted. Where a run lies a GPU finds by the same code
(`csrc/copy_body.hpp`); how a CPU moves it is `csrc/copy_cpu.hpp`.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

from . import _native
from .layout import PageLayout, require_whole, require_within

if TYPE_CHECKING:
    from typing_extensions import Buffer

    Slots: TypeAlias = "Sequence[int] | Buffer | Tensor"
    _Layout: TypeAlias = _native.Layout
    NativeArguments: TypeAlias = tuple[
        _Layout, _Layout, _Layout, object, object, int, int, int, int
    ]


class Tensor(Protocol):
    """Numbers in host memory that other libraries can look at; a tensor of torch's, an array of NumPy's."""

    def __len__(self) -> int: ...
    def __dlpack__(self, *_: Any, **__: Any) -> object: ...
    def __dlpack_device__(self) -> Any: ...


MOST_THREADS = 8  # more than fill the memory's bandwidth
THREADS_LIMIT = 256  # that may be asked for all the same


class Convert(IntEnum):
    """What becomes of the numbers on the way. The values are those of the native side.

    To e4m3, each run (one token's head in one layer) is divided by its largest magnitude over 448, which is its
    scale; back, it is multiplied by it. Rounding is to nearest, ties to even.
    """

    NONE = 0
    BF16_TO_E4M3 = 1
    FP16_TO_E4M3 = 2
    E4M3_TO_BF16 = 3
    E4M3_TO_FP16 = 4


# What each conversion reads and writes.
DTYPES = {
    Convert.BF16_TO_E4M3: ("bfloat16", "float8_e4m3fn"),
    Convert.FP16_TO_E4M3: ("float16", "float8_e4m3fn"),
    Convert.E4M3_TO_BF16: ("float8_e4m3fn", "bfloat16"),
    Convert.E4M3_TO_FP16: ("float8_e4m3fn", "float16"),
}
SCALE_DTYPE = "float32"


@dataclass(frozen=True, slots=True)
class CopyPlan:
    """Which tokens go where.

    Attributes:
        src_slots: int64 [n], in host memory: the first slot of each piece, in the source's layout. A slot may be in it
            more than once.
        dst_slots: int64 [n]: where each piece goes; no slot twice.
        tokens: of a piece, all of one page on either side.
        layers: which of both layouts' layers; None: all.
        convert: of the numbers.
    """

    src_slots: Slots
    dst_slots: Slots
    tokens: int = 1
    layers: range | None = None
    convert: Convert = Convert.NONE

    @classmethod
    def of_pages(
        cls,
        src_pages: Sequence[int],
        dst_pages: Sequence[int],
        *,
        page_size: int,
        layers: range | None = None,
        convert: Convert = Convert.NONE,
    ) -> CopyPlan:
        """Whole pages, of as many tokens on both sides."""
        first = [page * page_size for page in src_pages]
        return cls(first, [page * page_size for page in dst_pages], page_size, layers, convert)


def copy_pages(
    plan: CopyPlan,
    src: PageLayout,
    dst: PageLayout,
    *,
    scales: PageLayout | None = None,
    threads: int = 0,
) -> int:
    """Copy; all of it is done when this returns.

    Args:
        scales: one float32 a run, of the same slots as the e4m3 side: written on the way there, read on the way back.
        threads: at work on it, 256 at most; 0: as the machine has cores, up to 8.

    Returns:
        Bytes that were read.

    Raises:
        ValueError: layouts that are not alike, that share memory, or an argument that contradicts another one.
        IndexError: a slot that is not in its layout, or twice in `dst_slots`.
        Both name the argument; nothing was copied then.
    """
    return _native.copy(*native_arguments(plan, src, dst, scales), _workers(threads))


class Part(NamedTuple):
    """What is moved in one way: of planes of the same strides.

    Attributes:
        run: bytes that are contiguous on both sides; of converted numbers, how many they are.
        word: bytes of one load and store of a GPU's thread: what all addresses and the run are multiples of.
        runs: of an item, along the innermost axis of the destination.
        items: what threads share.
    """

    run: int
    word: int
    runs: int
    items: int


def parts_of(
    plan: CopyPlan, src: PageLayout, dst: PageLayout, *, scales: PageLayout | None = None
) -> list[Part]:
    """How `copy_pages` would do it; nothing is copied. Raises what it would raise."""
    return [Part(*each) for each in _native.Plan(*native_arguments(plan, src, dst, scales)).parts()]


def native_arguments(
    plan: CopyPlan, src: PageLayout, dst: PageLayout, scales: PageLayout | None
) -> NativeArguments:
    """What the native side plans a copy from, on a CPU and for a GPU. Raises what `copy_pages` raises of it."""
    convert = _convert(plan.convert)
    if (convert == Convert.NONE) != (scales is None):
        raise ValueError("scales: needed for conversions to and from e4m3, and for them alone")
    _require_dtypes(convert, src, dst, scales)
    src, dst, beside = _alike(src, dst, scales or src)
    chosen = range(src.layers) if plan.layers is None else plan.layers
    require_within("layers", chosen, src.layers)
    return (
        src.native,
        dst.native,
        beside.native,
        _slots(plan.src_slots, "src_slots"),
        _slots(plan.dst_slots, "dst_slots"),
        require_whole("tokens", plan.tokens, 1),
        chosen.start,
        chosen.stop,
        convert,
    )


def _convert(given: int) -> Convert:
    try:
        return Convert(given)
    except ValueError:
        raise ValueError(
            f"convert: {given!r} is none of {[each.name for each in Convert]}"
        ) from None


def _require_dtypes(
    convert: Convert, src: PageLayout, dst: PageLayout, scales: PageLayout | None
) -> None:
    """Numbers of one size are told apart where both sides say what they are."""
    reads, writes = DTYPES.get(convert, (dst.dtype, src.dtype))
    for name, layout, wanted in (("dst", dst, writes), ("src", src, reads)):
        if None not in (layout.dtype, wanted) and layout.dtype != wanted:
            other = f"is for {wanted}" if convert else f"the other side has {wanted}"
            raise ValueError(f"{name}: has numbers of {layout.dtype}, {other}")
    if scales is not None and scales.dtype not in (None, SCALE_DTYPE):
        raise ValueError(f"scales: not one {SCALE_DTYPE} a token and head, but {scales.dtype}")


def _alike(*layouts: PageLayout) -> tuple[PageLayout, ...]:
    """All with their heads in as many groups: page_unified keeps each group apart."""
    groups = {each.groups for each in layouts}
    if len(groups) == 1:
        return layouts
    most = max(groups)
    return tuple(
        each if most % each.groups else each.split_heads(most // each.groups) for each in layouts
    )


def _slots(given: Slots, name: str) -> Buffer | Tensor:
    if isinstance(given, list | tuple | range):
        try:
            return array("q", given)
        except (TypeError, OverflowError) as error:
            raise ValueError(f"{name}: {error}") from None
    return given  # type: ignore[return-value]  # no other kind of sequence; the native side looks at its type


def _workers(threads: int) -> _native.Workers:
    if require_whole("threads", threads, 0) > THREADS_LIMIT:
        raise ValueError(f"threads: {threads} are more than {THREADS_LIMIT}")
    return _pool(threads or min(MOST_THREADS, len(os.sched_getaffinity(0))), os.getpid())


@lru_cache(maxsize=4)
def _pool(threads: int, _process: int) -> _native.Workers:
    """A forked child has none of its parent's threads, so it makes its own."""
    return _native.Workers(threads)
