"""What is checked and timed of page copies on a GPU. `gpu_check.py` is the command.

Nothing here asks for a GPU by itself: who copies, where pools lie and how time is taken are given, so that the checks
themselves can be tested without one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import product
from typing import Protocol

import torch
from torch import Tensor

from lmcache_sglang.kernels.copy_plan import Convert, CopyPlan
from lmcache_sglang.kernels.cuda.choice import Way
from lmcache_sglang.kernels.cuda.prepared import PreparedCopy
from lmcache_sglang.kernels.cuda.staging import Passed
from lmcache_sglang.kernels.layout import PageLayout
from lmcache_sglang.testing.torch_pools import (
    KINDS,
    Pool,
    PoolShape,
    copy_by_torch,
    dequantize_by_torch,
    quantize_by_torch,
    scales_shape,
)

SHAPES = {
    "K and V": PoolShape(),
    "latent rows of 576": PoolShape(heads=1, dims=(576,), page_size=8),
    "K longer than V": PoolShape(heads=3, dims=(24, 8), page_size=8, layers=2),
    "odd heads": PoolShape(heads=5, dims=(7, 7), page_size=3),
    "heads of 128": PoolShape(layers=2, heads=8, dims=(128, 128), page_size=64),
}
PAGES = [4, 0, 2], [1, 3, 2]
CONVERSIONS = {
    torch.bfloat16: (Convert.BF16_TO_E4M3, Convert.E4M3_TO_BF16),
    torch.float16: (Convert.FP16_TO_E4M3, Convert.E4M3_TO_FP16),
}

# Llama 3 8B: 8 MiB a page.
LARGE = PoolShape(layers=32, pages=64, page_size=64, heads=8, dims=(128, 128))
BLOCKS = (4, 8, 16, 32, 64, 128, 256, 512)
RUNS = tuple(1 << bits for bits in range(12, 23))  # bytes, 4 KiB to 4 MiB
RUNS_BYTES = 256 << 20
MOST_RUNS_TIMED = 1 << 16


class Mover(Protocol):
    """What copies: a `CudaCopier`."""

    def copy(
        self,
        plan: CopyPlan,
        src: PageLayout,
        dst: PageLayout,
        *,
        scales: PageLayout | None = None,
        way: Way | None = None,
        most_blocks: int | None = None,
    ) -> int: ...
    def copy_by_layer(
        self, plan: CopyPlan, src: PageLayout, dst: PageLayout
    ) -> Sequence[Passed]: ...


@dataclass(frozen=True, slots=True)
class Place:
    """Where a pool is: on the GPU, or in pinned memory of the host."""

    name: str
    device: str = "cpu"
    pinned: bool = False

    def pool(self, kind: str, shape: PoolShape, shift: int = 0) -> Pool:
        return Pool(kind, shape, device=self.device, pinned=self.pinned, shift=shift)


@dataclass(frozen=True, slots=True)
class Machine:
    """What a check runs on.

    Attributes:
        finish: waits until all copies are done.
        seconds: what one call takes, everything that it enqueues included.
        read_behind: copies of tensors, made as soon as the event is passed, and not later.
        registered: pins memory that was not, by address and bytes, while the context lasts.
    """

    mover: Mover
    host: Place
    gpu: Place
    finish: Callable[[], None]
    seconds: Callable[[Callable[[], object]], float]
    read_behind: Callable[[Passed, Sequence[Tensor]], list[Tensor]]
    registered: Callable[[Sequence[tuple[int, int]]], AbstractContextManager[None]]

    def directions(self) -> Iterator[tuple[str, Place, Place]]:
        yield "H2D", self.host, self.gpu
        yield "D2H", self.gpu, self.host
        yield "D2D", self.gpu, self.gpu


@dataclass(slots=True)
class Checked:
    """How many copies of a kind were right, and which were not."""

    name: str
    right: int = 0
    wrong: list[str] | None = None

    def add(self, what: str, is_right: bool) -> None:
        if is_right:
            self.right += 1
        else:
            self.wrong = [*(self.wrong or []), what]

    def line(self) -> str:
        return f"{self.name}: {self.right} right, {len(self.wrong or [])} wrong"


@dataclass(frozen=True, slots=True)
class Timed:
    """One measurement.

    Attributes:
        what: of what, in words.
        gbps: 10^9 bytes a second.
        baseline: of a plain copy of as many bytes, the same way.
        right: the bytes were compared afterwards.
    """

    what: str
    gbps: float
    baseline: float
    right: bool


# Correctness.


def check_layouts(machine: Machine, say: Callable[[str], None]) -> list[Checked]:
    """Every pair of layouts, in each direction, by kernel and by copy engine, aligned and not."""
    done = []
    for shape_name, shape in SHAPES.items():
        for direction, source, target in machine.directions():
            checked = Checked(f"{shape_name}, {direction}")
            for a, b in product(KINDS, KINDS):
                if shape.has(a) and shape.has(b):
                    for shift, way in product([0, 1], Way):
                        src, dst = source.pool(a, shape, shift), target.pool(b, shape)
                        what = f"{a} to {b} by {way.value}, shifted by {shift}"
                        checked.add(what, copies_pages(machine, src, dst, way))
            say(checked.line())
            done.append(checked)
    return done


def copies_pages(machine: Machine, src: Pool, dst: Pool, way: Way) -> bool:
    """Whether a copy of some pages gives what torch gives."""
    src.fill(1)
    dst.fill(2)
    wanted = dst.twin()
    copy_by_torch(src, wanted, *PAGES, range(src.shape.layers))
    machine.finish()  # what fills is not behind the copy's stream
    plan = CopyPlan.of_pages(*PAGES, page_size=src.shape.page_size)
    machine.mover.copy(plan, src.layout, dst.layout, way=way)
    machine.finish()
    return dst.same(wanted)


def check_conversions(machine: Machine, say: Callable[[str], None]) -> list[Checked]:
    """To e4m3 and back, bit by bit as torch on the CPU would."""
    done = []
    for dtype, dims in product(CONVERSIONS, [(8, 8), (128, 128), (7, 7), (576,)]):
        shape = PoolShape(dims=dims, dtype=dtype, heads=1 if len(dims) == 1 else 4)
        checked = Checked(f"{str(dtype).removeprefix('torch.')} {dims} and e4m3")
        for wide, narrow in product(["device", "page_head"], ["page_first", "records"]):
            for direction, source, target in machine.directions():
                src, again = source.pool(wide, shape), source.pool(wide, shape)
                small = target.pool(narrow, replace(shape, dtype=torch.uint8))
                scales = target.pool(narrow, scales_shape(shape))
                what = f"{wide} to {narrow}, {direction}"
                checked.add(what, _converts(machine, src, small, scales, again))
        say(checked.line())
        done.append(checked)
    return done


def _converts(machine: Machine, src: Pool, small: Pool, scales: Pool, again: Pool) -> bool:
    generator = torch.Generator().manual_seed(3)
    for flat in src.flats:
        flat.copy_(torch.randn(flat.shape, generator=generator) * 3)
    _plant(src)
    machine.finish()
    there, back = CONVERSIONS[src.shape.dtype]
    size = src.shape.page_size
    plan = CopyPlan.of_pages(*PAGES, page_size=size, convert=there)
    machine.mover.copy(plan, src.layout, small.layout, scales=scales.layout)
    plan = CopyPlan.of_pages(*PAGES[::-1], page_size=size, convert=back)
    machine.mover.copy(plan, small.layout, again.layout, scales=scales.layout)
    machine.finish()
    return all(
        _converted(src, small, scales, again, plane, layer)
        for plane, layer in product(range(src.planes), range(src.shape.layers))
    )


def _plant(src: Pool) -> None:
    """Into the first page that is copied, and the next ones: runs of what no normal number is."""
    info = torch.finfo(src.shape.dtype)
    smallest = info.smallest_normal * info.eps
    nan, inf = float("nan"), float("inf")
    # What a whole run is, unless None, and what its last number is.
    special: list[tuple[float | None, float]] = [
        (0.0, 0.0),
        (-0.0, -0.0),
        (nan, nan),
        (None, nan),
        (None, inf),
        (None, -inf),
        (inf, nan),
        (smallest, -smallest),
        (0.0, smallest),
        (info.smallest_normal, smallest),
        (info.max, info.min),
        (0.0, info.max),
    ]
    size = src.shape.page_size
    for (number, (whole, last)), plane, layer in product(
        enumerate(special), range(src.planes), range(src.shape.layers)
    ):
        run = src.rows(plane, layer)[PAGES[0][number // size % len(PAGES[0])], number % size]
        if whole is not None:
            run.fill_(whole)
        run[..., -1] = last


def _converted(src: Pool, small: Pool, scales: Pool, again: Pool, plane: int, layer: int) -> bool:
    def pages(pool: Pool, which: Sequence[int]) -> Tensor:
        return pool.rows(plane, layer)[list(which)].cpu()

    numbers, its_scales = quantize_by_torch(pages(src, PAGES[0]))
    back = dequantize_by_torch(numbers, its_scales, src.shape.dtype)
    return (
        same_numbers(pages(small, PAGES[1]).view(torch.float8_e4m3fn), numbers)
        and same_numbers(pages(scales, PAGES[1]), its_scales)
        and same_numbers(pages(again, PAGES[0]), back)
    )


def same_numbers(some: Tensor, other: Tensor) -> bool:
    """Bit by bit, but that any NaN is as good as another: processors keep different bits of them."""
    nan = some.float().isnan()
    if not torch.equal(nan, other.float().isnan()):
        return False
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[some.element_size()]
    return torch.equal(*(each.contiguous().view(bits)[~nan] for each in (some, other)))


# Speed.


def time_layouts(machine: Machine, shape: PoolShape, say: Callable[[str], None]) -> list[Timed]:
    """SGLang's device pool and vLLM's blocks, to and from each layout of the host, by either way."""
    done = []
    for kind, device_kind in product([*KINDS[1:6], "records"], ["device", "blocks"]):
        host, gpu = machine.host.pool(kind, shape), machine.gpu.pool(device_kind, shape)
        for direction, src, dst in [("H2D", host, gpu), ("D2H", gpu, host)]:
            baseline = _plain(machine, src, dst)
            for way in [None, Way.KERNEL, *_engine_if_it_ends(src, dst)]:
                name = way.value if way else "as chosen"
                what = f"{direction} {src.kind} to {dst.kind}, {name}"
                done.append(_timed(machine, what, src, dst, baseline, way))
                say(_line(done[-1]))
    return done


def _engine_if_it_ends(src: Pool, dst: Pool) -> list[Way]:
    """Millions of runs would take a copy engine minutes."""
    runs = PreparedCopy(_shuffled(src), src.layout, dst.layout, None).run_count
    return [Way.ENGINE] if runs <= MOST_RUNS_TIMED else []


def time_blocks(machine: Machine, shape: PoolShape, say: Callable[[str], None]) -> list[Timed]:
    """How many blocks keep the link busy: what `choice.BLOCKS_OVER_A_LINK` should be."""
    host, gpu = machine.host.pool("page_first", shape), machine.gpu.pool("device", shape)
    done = []
    for direction, src, dst in [("H2D", host, gpu), ("D2H", gpu, host)]:
        baseline = _plain(machine, src, dst)
        for blocks in BLOCKS:
            what = f"{direction} {src.kind} to {dst.kind}, {blocks} blocks"
            done.append(_timed(machine, what, src, dst, baseline, Way.KERNEL, blocks))
            say(_line(done[-1]))
    return done


def time_runs(machine: Machine, total: int, say: Callable[[str], None]) -> list[Timed]:
    """From which length of a run the copy engine is the faster one: `choice.SHORTEST_OF_A_BATCH`."""
    done = []
    for run in RUNS:
        shape = PoolShape(1, max(2, total // run), 1, 1, (run,), torch.uint8)
        src, dst = machine.host.pool("device", shape), machine.gpu.pool("device", shape)
        baseline = _plain(machine, src, dst)
        for way in Way:
            what = f"H2D runs of {run >> 10} KiB, {way.value}"
            done.append(_timed(machine, what, src, dst, baseline, way))
            say(_line(done[-1]))
    return done


def _timed(
    machine: Machine,
    what: str,
    src: Pool,
    dst: Pool,
    baseline: float,
    way: Way | None,
    most_blocks: int | None = None,
) -> Timed:
    order = _another_order(src.shape.pages)
    plan = _shuffled(src)

    def copy() -> int:
        return machine.mover.copy(plan, src.layout, dst.layout, way=way, most_blocks=most_blocks)

    src.fill(1)
    moved = copy()
    seconds = machine.seconds(copy)
    machine.finish()
    right = all(
        torch.equal(
            src.rows(plane, layer).cpu().contiguous().view(torch.uint8),
            dst.rows(plane, layer)[order].cpu().view(torch.uint8),
        )
        for plane, layer in product(range(src.planes), range(src.shape.layers))
    )
    return Timed(what, moved / seconds / 1e9, baseline, right)


def _shuffled(src: Pool) -> CopyPlan:
    """All pages, in another order on each side, so that hardly any runs follow one another."""
    pages = src.shape.pages
    return CopyPlan.of_pages(range(pages), _another_order(pages), page_size=src.shape.page_size)


def _another_order(pages: int) -> list[int]:
    return random.Random(1).sample(range(pages), pages)


def _plain(machine: Machine, src: Pool, dst: Pool) -> float:
    """GB/s of one `cudaMemcpyAsync` of as many bytes, which is what torch makes of it."""
    size = src.layout.page_bytes * src.shape.pages
    one, other = _bytes_like(src, size), _bytes_like(dst, size)
    return size / machine.seconds(lambda: other.copy_(one, non_blocking=True)) / 1e9


def _bytes_like(pool: Pool, size: int) -> Tensor:
    """Plain memory where a pool has its own."""
    flat = pool.flats[0]
    return torch.empty(size, dtype=torch.uint8, device=flat.device, pin_memory=pool.pinned)


def _line(timed: Timed) -> str:
    wrong = "" if timed.right else "  WRONG BYTES"
    return f"{timed.what}: {timed.gbps:.1f} GB/s, plain copy {timed.baseline:.1f}{wrong}"
