"""What cannot be copied is said before anything is, by the name of the argument."""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise, permutations, product
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_sglang.kernels import _native
from lmcache_sglang.kernels.copy_plan import (
    Convert,
    CopyPlan,
    copy_pages,
    native_arguments,
    parts_of,
)
from lmcache_sglang.kernels.layout import PageLayout, Plane
from lmcache_sglang.testing.guarded_memory import guarded
from lmcache_sglang.testing.torch_pools import Pool, PoolShape, copy_slots_by_torch

SHAPE = PoolShape(page_size=8, heads=2, dims=(16, 16))
SLOTS = SHAPE.pages * SHAPE.page_size


def pool(kind: str = "page_first", **other: Any) -> Pool:
    return Pool(kind, replace(SHAPE, **other), allocate=guarded)


def refused(
    plan: CopyPlan,
    src: Pool,
    dst: Pool,
    error: type[Exception],
    words: str,
    *,
    into: PageLayout | None = None,
    **more: Any,
) -> None:
    """Nothing of `dst` is written, whose layout may be said to be `into`."""
    for each in src.flats:
        each.fill_(1)
    with pytest.raises(error, match=words):
        copy_pages(plan, src.layout, into or dst.layout, **more)
    assert not any(each.any() for each in dst.flats)


@pytest.mark.parametrize("slot", [-1, SLOTS, -(1 << 63), (1 << 63) - 1])
@pytest.mark.parametrize("name", ["src_slots", "dst_slots"])
def test_a_slot_out_of_range(slot: int, name: str) -> None:
    slots: dict[str, Any] = {"src_slots": [0, 1], "dst_slots": [0, 1], name: [0, slot]}
    refused(
        CopyPlan(**slots),
        pool("device"),
        pool(),
        IndexError,
        f"{name}: {slot} is not one of {SLOTS}",
    )


@pytest.mark.parametrize("name", ["src_slots", "dst_slots"])
def test_a_piece_that_ends_in_the_next_page(name: str) -> None:
    slots: dict[str, Any] = {"src_slots": [0], "dst_slots": [0], name: [5]}
    refused(
        CopyPlan(**slots, tokens=4), pool("device"), pool(), IndexError, f"{name}: 4 tokens from 5"
    )


@pytest.mark.parametrize(
    ("slots", "tokens", "twice"), [([7, 3, 7], 1, 7), ([8, 0, 11], 4, 11), ([0, 2], 4, 2)]
)
def test_a_destination_twice(slots: list[int], tokens: int, twice: int) -> None:
    plan = CopyPlan([0, 8, 16][: len(slots)], slots, tokens)
    refused(plan, pool("device"), pool(), IndexError, f"dst_slots: slot {twice} is in it twice")


def test_a_destination_twice_of_a_pool_that_is_too_large_to_mark() -> None:
    pages = 1 << 40
    dst = rows(0, pages=pages, memory=((0, 32 * pages),))
    src = Pool("device", PoolShape(1, 5, 2, 1, (2,), torch.int16)).layout
    assert parts_of(CopyPlan([0, 0, 0], [7, 3, 9]), src, dst)
    with pytest.raises(IndexError, match="dst_slots: slot 7 is in it twice"):
        parts_of(CopyPlan([0, 0, 0], [7, 3, 7]), src, dst)
    with pytest.raises(IndexError, match="dst_slots: slot 6 is in it twice"):
        parts_of(CopyPlan([0, 0], [6, 6], tokens=2), src, dst)


def test_a_source_twice_is_no_mistake() -> None:
    src, dst, wanted = pool("device"), pool(), pool()
    src.fill(1)
    plan = CopyPlan([3, 3], [0, 1])
    copy_pages(plan, src.layout, dst.layout)
    copy_slots_by_torch(src, wanted, plan)
    assert dst.same(wanted)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"layers": 4}, "dst: layers differ, 3 in src and 4 in dst"),
        ({"heads": 1}, "dst: heads differ, 2 in src and 1 in dst"),
        ({"dims": (16, 8)}, "dst: numbers of a token and head differ, 16 in src and 8 in dst"),
        ({"dims": (16,)}, "dst: planes differ, 2 in src and 1 in dst"),
        ({"dtype": torch.float32}, "dst: has numbers of float32, the other side has bfloat16"),
        ({"dtype": torch.float16}, "dst: has numbers of float16, the other side has bfloat16"),
        ({"dtype": torch.uint8}, "dst: numbers of 2 bytes do not become 1"),
        ({"page_size": 4}, "tokens: 8 of pages of 4"),
    ],
)
def test_layouts_that_are_not_alike(other: dict[str, Any], words: str) -> None:
    plan = CopyPlan.of_pages([0], [0], page_size=8)
    refused(plan, pool("device"), pool(**other), ValueError, words)


def test_memory_that_both_have() -> None:
    src = pool("device")
    with pytest.raises(ValueError, match="dst: shares memory with src"):
        copy_pages(CopyPlan([0], [8]), src.layout, src.layout)
    upper = src.layout.select(layers=range(1, 2))
    with pytest.raises(ValueError, match="dst: shares memory with src"):
        copy_pages(CopyPlan([0], [8]), src.layout.select(layers=range(1)), upper)


@pytest.mark.parametrize("stride", ["token_stride", "head_stride"])
@pytest.mark.parametrize("bytes_", [0, 31])
def test_a_destination_whose_rows_overlap(stride: str, bytes_: int) -> None:
    dst = pool()
    stretched: dict[str, Any] = {stride: bytes_}
    planes = tuple(replace(plane, **stretched) for plane in dst.layout.planes)
    folded = replace(dst.layout, planes=planes)
    plan = CopyPlan([0], [0])
    refused(plan, pool("device"), dst, ValueError, "dst: its rows overlap", into=folded)


def stored(addresses: list[int], run: int = 4) -> PageLayout:
    return PageLayout.records(addresses, runs=[run], layers=2, heads=1, page_size=2, itemsize=2)


def rows(
    *starts: int,
    pages: int = 4,
    page: int = 32,
    token: int = 8,
    memory: tuple[tuple[int, int], ...] = ((0, 1 << 12),),
) -> PageLayout:
    """A plane a start, of runs of 4 bytes."""
    planes = tuple(Plane((start,), page, token, 0, 4) for start in starts)
    return PageLayout(planes, pages, page_size=2, heads=1, itemsize=2, memory=memory)


@pytest.mark.parametrize(
    ("apart", "over"),
    [
        (stored([0, 16, 32]), stored([0, 16, 0])),  # a page twice
        (stored([32, 0, 16]), stored([32, 0, 17])),
        (rows(0, 128), rows(0, 0)),  # K is V
        (rows(0, 108), rows(0, 106)),  # its last run
        (rows(0, 4), rows(0, 3)),  # planes that take turns by token
        (rows(0, 16, 4, 20), rows(0, 16, 4, 18)),  # and by page
        (rows(0, 4, 16), rows(0, 4, 12)),
        (rows(0), rows(0, page=0)),
        (rows(0, page=12), rows(0, page=11)),
        (rows(0, page=0, pages=1), rows(0, page=0, pages=2)),
        (rows(20, 0), rows(26, 0)),  # a page's end lies in the next one
        (rows(0, token=16, page=4), rows(0, token=16, page=3)),  # pages take turns
    ],
)
def test_a_destination_that_lies_over_itself(apart: PageLayout, over: PageLayout) -> None:
    """Beside one that just does not. These are planned alone, as there is no memory."""
    shape = PoolShape(apart.layers, apart.pages, 2, 1, (2,) * len(apart.planes), torch.int16)
    src, plan = Pool("device", shape), CopyPlan([0, 1], [0, 1])
    assert parts_of(plan, src.layout, apart)
    assert parts_of(plan, over, src.layout), "a source may"
    with pytest.raises(ValueError, match="dst: its rows overlap"):
        parts_of(plan, src.layout, over)


@pytest.mark.parametrize("planes", [[[0, 0]], [[0], [0]], [[0, 1], [1, 0]]])
def test_a_tensor_that_is_a_pools_twice(planes: list[list[int]]) -> None:
    tensors = [torch.zeros(SLOTS, 2, 16, dtype=torch.bfloat16) for _ in range(2)]
    made = [[tensors[i] for i in layers] for layers in planes]
    dst = PageLayout.device_pool(made, page_size=8)
    src = Pool("device", replace(SHAPE, layers=len(made[0]), dims=(16,) * len(made)))
    src.fill(1)
    with pytest.raises(ValueError, match="dst: its rows overlap"):
        copy_pages(CopyPlan([0], [0]), src.layout, dst)
    assert not any(each.any() for each in tensors)


@pytest.mark.parametrize("axes", ["".join(each) + "c" for each in permutations("lpth")])
@pytest.mark.parametrize("gap", [0, 2])
def test_no_order_of_axes_is_taken_for_an_overlap(axes: str, gap: int) -> None:
    sizes = {"l": 3, "p": 5, "t": 4, "h": 2, "c": 6}
    whole = torch.zeros([2, *(sizes[axis] + gap for axis in axes)])
    whole = whole[(slice(None), *(slice(sizes[axis]) for axis in axes))]
    dst = PageLayout.of(list(whole.unbind(0)), axes, page_size=4)
    src = Pool("device", PoolShape(3, 5, 4, 2, (6, 6), torch.float32))
    assert parts_of(CopyPlan([0], [0]), src.layout, dst)


@st.composite
def scattered(draw: st.DrawFn) -> PageLayout:
    """Runs of two bytes, mostly over one another."""
    number, count = st.integers(0, 24), st.integers(1, 3)
    pages, layers = draw(count), draw(st.integers(1, 2))
    starts = st.lists(st.integers(0, 60), min_size=layers, max_size=layers).map(tuple)
    plane = st.builds(Plane, starts, number, number, number, st.just(2))
    at = st.lists(number, min_size=pages, max_size=pages).map(tuple)
    return PageLayout(
        tuple(draw(st.lists(plane, min_size=1, max_size=2))),
        pages,
        page_size=draw(count),
        heads=draw(count),
        itemsize=2,
        memory=((0, 1 << 12),),
        pages_at=draw(st.just(()) | at),
    )


def starts_of(layout: PageLayout) -> list[int]:
    """Where all of its runs begin, one by one."""
    within = product(range(layout.pages), range(layout.page_size), range(layout.heads))
    return [
        start
        + (layout.pages_at[page] if layout.pages_at else page * plane.page_stride)
        + token * plane.token_stride
        + head * plane.head_stride
        for page, token, head in within
        for plane in layout.planes
        for start in plane.layers
    ]


@settings(max_examples=300, deadline=None)
@given(scattered())
def test_no_overlap_is_overlooked(dst: PageLayout) -> None:
    dims = (1,) * len(dst.planes)
    src = Pool("device", PoolShape(dst.layers, 3, 3, dst.heads, dims, torch.int16))
    try:
        parts_of(CopyPlan([0], [0]), src.layout, dst)
    except ValueError as error:
        assert "dst: its rows overlap" in str(error)
    else:
        assert all(b - a >= 2 for a, b in pairwise(sorted(starts_of(dst))))


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (CopyPlan([0, 1], [0]), "dst_slots: 1 for 2 src_slots"),
        (CopyPlan([0], [0], tokens=0), "tokens: 0 is not from 1"),
        (CopyPlan([0], [0], tokens=9), "tokens: 9 of pages of 8"),
        (CopyPlan([0], [0], layers=range(2, 4)), "layers: range\\(2, 4\\) is no range of these 3"),
        (CopyPlan([0], [0], layers=range(2, 2)), "layers: range"),
        (CopyPlan([0], [0], layers=range(0, 3, 2)), "layers: range"),
        (CopyPlan([0], [0], layers=range(-1, 1)), "layers: range"),
        (CopyPlan([0], [0], layers=range(1 << 33)), "layers: range"),
        (CopyPlan([0], [0], layers=[0]), "layers: \\[0\\]"),  # type: ignore[arg-type]
        (CopyPlan([0], [0], tokens=-1), "tokens: -1"),
        (CopyPlan([0], [0], tokens=1 << 32), "tokens: 4294967296"),
        (CopyPlan([0], [0], tokens=1.5), "tokens: 1.5"),  # type: ignore[arg-type]
        (CopyPlan([0], [0], convert=9), "convert: 9"),  # type: ignore[arg-type]
        (CopyPlan([0], [0], convert=256), "convert: 256"),  # type: ignore[arg-type]
        (CopyPlan([0.5], [0]), "src_slots: "),  # type: ignore[list-item]
        (CopyPlan([0], [1 << 63]), "dst_slots: "),
        (CopyPlan([0], [0], convert=Convert.BF16_TO_E4M3), "scales: needed"),
    ],
)
def test_a_plan_that_contradicts_itself(plan: CopyPlan, words: str) -> None:
    refused(plan, pool("device"), pool(), ValueError, words)


@pytest.mark.parametrize("threads", [-1, 257, 10**6, 1 << 40, 1.5])
def test_threads_that_nobody_has(threads: Any) -> None:
    words = f"threads: {threads}"
    refused(CopyPlan([0], [0]), pool("device"), pool(), ValueError, words, threads=threads)


@pytest.mark.parametrize(
    "slots",
    [
        torch.tensor([0, 1], dtype=torch.int32),
        torch.tensor([0.0, 1.0]),
        torch.tensor([[0], [1]]),
        torch.tensor([0, 9, 1])[::2],
        torch.tensor([0, 1], device="meta"),
        b"01234567",
    ],
)
@pytest.mark.parametrize("name", ["src_slots", "dst_slots"])
def test_slots_of_another_kind(
    slots: torch.Tensor, name: Literal["src_slots", "dst_slots"]
) -> None:
    plan = replace(CopyPlan([0, 1], [0, 1]), **{name: slots})  # type: ignore[arg-type]
    refused(plan, pool("device"), pool(), ValueError, f"{name}: not int64")


def test_no_layers_are_refused_by_the_native_side_too() -> None:
    arguments = list(
        native_arguments(CopyPlan([0], [0]), pool("device").layout, pool().layout, None)
    )
    arguments[6:8] = 1, 1
    with pytest.raises(ValueError, match="layers: 1 to 1 of 3"):
        _native.Plan(*arguments)  # type: ignore[arg-type]


def test_many_records_on_both_sides_take_no_more_than_their_share() -> None:
    """Each beside each would take 64 times as long for 8 times as many."""

    def seconds(count: int) -> float:
        src, dst = (stored([at + 32 * i for i in range(count)]) for at in (0, 1 << 30))
        plan, taken = CopyPlan([0], [0]), []
        for _ in range(5):
            begun = time.process_time()
            parts_of(plan, src, dst)
            taken.append(time.process_time() - begun)
        return min(taken)

    assert seconds(32_000) < 24 * seconds(4_000)


def e4m3() -> tuple[Pool, Pool, Pool]:
    """A source, a destination, and scales beside it."""
    return pool("device"), pool(dtype=torch.uint8), pool(dims=(1, 1), dtype=torch.float32)


@pytest.mark.parametrize(
    ("scales", "words"),
    [
        ({"dims": (1, 1), "dtype": torch.bfloat16}, "scales: not one float32"),
        ({"dims": (1, 1), "dtype": torch.int32}, "scales: not one float32"),
        ({"dims": (2, 2), "dtype": torch.float32}, "scales: not one float32"),
        ({"dims": (1, 1), "dtype": torch.float32, "pages": 4}, "scales: not of the same pages"),
        ({"dims": (1, 1), "dtype": torch.float32, "heads": 1}, "scales: not of the same pages"),
        ({"dims": (1,), "dtype": torch.float32}, "scales: not of the same pages"),
    ],
)
def test_scales_that_do_not_fit(scales: dict[str, Any], words: str) -> None:
    src, dst, _ = e4m3()
    plan = CopyPlan([0], [0], convert=Convert.BF16_TO_E4M3)
    refused(plan, src, dst, ValueError, words, scales=pool(**scales).layout)


def test_scales_that_nobody_needs() -> None:
    *_, scales = e4m3()
    refused(
        CopyPlan([0], [0]), pool("device"), pool(), ValueError, "scales: ", scales=scales.layout
    )


def test_scales_in_the_destination() -> None:
    src, dst, scales = e4m3()
    there = replace(scales.layout, memory=scales.layout.memory + dst.layout.memory)
    plan = CopyPlan([0], [0], convert=Convert.BF16_TO_E4M3)
    refused(plan, src, dst, ValueError, "scales: shares memory", scales=there)


NARROW = PoolShape(layers=1, pages=2, page_size=2, heads=1, dims=(3,), dtype=torch.uint8)


def records_at(by: int, run: int, itemsize: int, memory: torch.Tensor) -> PageLayout:
    """Two, of two tokens, so many bytes off."""
    return PageLayout.records(
        [memory[by:].data_ptr(), memory[by + 24 :].data_ptr()],
        runs=[run],
        layers=1,
        heads=1,
        page_size=2,
        itemsize=itemsize,
    )


@pytest.mark.parametrize("by", [1, 2, 3])
def test_scales_at_addresses_that_a_gpu_does_not_take(by: int) -> None:
    src, dst = Pool("device", replace(NARROW, dtype=torch.bfloat16)), Pool("device", NARROW)
    plan = CopyPlan([0, 2], [2, 0], convert=Convert.BF16_TO_E4M3)
    memory = torch.zeros(64, dtype=torch.uint8)
    copy_pages(plan, src.layout, dst.layout, scales=records_at(0, 4, 4, memory))
    with pytest.raises(ValueError, match="scales: not aligned, numbers of 4 bytes"):
        copy_pages(plan, src.layout, dst.layout, scales=records_at(by, 4, 4, memory))


@pytest.mark.parametrize("to_it", [True, False])
def test_numbers_at_addresses_that_a_gpu_does_not_take(to_it: bool) -> None:
    convert = Convert.E4M3_TO_BF16 if to_it else Convert.BF16_TO_E4M3
    plan = CopyPlan([0, 2], [2, 0], convert=convert)
    scales = Pool("device", replace(NARROW, dims=(1,), dtype=torch.float32))
    narrow, memory = Pool("device", NARROW), torch.zeros(64, dtype=torch.uint8)

    def copy(by: int) -> None:
        wide = records_at(by, 6, 2, memory)
        src, dst = (narrow.layout, wide) if to_it else (wide, narrow.layout)
        copy_pages(plan, src, dst, scales=scales.layout)

    copy(2)
    with pytest.raises(ValueError, match=f"{'dst' if to_it else 'src'}: not aligned, numbers of 2"):
        copy(1)


@pytest.mark.parametrize(
    ("convert", "src", "dst", "words"),
    [
        (
            Convert.BF16_TO_E4M3,
            torch.float16,
            torch.uint8,
            "src: has numbers of float16, is for bf",
        ),
        (Convert.BF16_TO_E4M3, torch.bfloat16, torch.int8, "dst: has numbers of int8, is for floa"),
        (Convert.E4M3_TO_FP16, torch.float8_e5m2, torch.float16, "src: has numbers of float8_e5m2"),
        (Convert.E4M3_TO_FP16, torch.uint8, torch.bfloat16, "dst: has numbers of bfloat16"),
    ],
)
def test_numbers_that_a_conversion_is_not_for(
    convert: Convert, src: torch.dtype, dst: torch.dtype, words: str
) -> None:
    scales = pool(dims=(1, 1), dtype=torch.float32).layout
    plan = CopyPlan([0], [0], convert=convert)
    refused(plan, pool(dtype=src), pool(dtype=dst), ValueError, words, scales=scales)


def test_numbers_that_nobody_names_are_taken_for_any() -> None:
    plan = CopyPlan([0], [0])
    src, dst = pool(dtype=torch.float8_e4m3fn), pool("device", dtype=torch.uint8)
    assert parts_of(plan, src.layout, dst.layout)
    unnamed = replace(pool(dtype=torch.float16).layout, dtype=None)
    assert parts_of(plan, unnamed, pool("device").layout)


def test_heads_are_not_taken_for_k_and_v() -> None:
    """One plane of two heads has as many runs as K and V of one."""
    one = pool("device", dims=(16,))
    plan = CopyPlan([0], [0])
    refused(plan, one, pool(heads=1), ValueError, "dst: planes differ, 1 in src and 2 in dst")


def test_slots_that_somebody_writes_meanwhile() -> None:
    """They are looked at once: what is copied by is what was found right."""
    slots, beyond = 1 << 19, 1 << 20
    src = torch.ones(slots, 1, 1, dtype=torch.uint8)
    memory = torch.zeros(beyond + 1, dtype=torch.uint8)
    whole, part = (
        PageLayout.device_pool([[each.view(-1, 1, 1)]], page_size=1)
        for each in (src, memory[:slots])
    )
    order = torch.arange(slots)
    ends, end = array("q", order.tolist()), threading.Event()

    def write() -> None:
        while not end.is_set():
            for value in (beyond, 0):
                ends[0] = value

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(30):
            with suppress(IndexError):
                copy_pages(CopyPlan(order, np.frombuffer(ends, np.int64)), whole, part, threads=1)
    finally:
        end.set()
        writer.join()
    assert not memory[slots:].any()


# Layouts that are wrong by themselves.


def plane(**other: Any) -> Plane:
    return replace(Plane((1000,), 64, 16, 8, 8), **other)


def layout(*planes: Plane, **other: Any) -> PageLayout:
    given: dict[str, Any] = {"pages": 2, "page_size": 4, "heads": 2, "itemsize": 2}
    return PageLayout(planes, **{**given, "memory": ((1000, 128),), **other})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: layout(), "planes: there is none"),
        (lambda: layout(plane(layers=())), "planes: one has no layers"),
        (
            lambda: layout(plane(), plane(layers=(1000, 1064))),
            "planes: one has 2 layers, another 1",
        ),
        (lambda: layout(plane(), page_size=0), "page_size: "),
        (lambda: layout(plane(), heads=0), "heads: "),
        (lambda: layout(plane(), itemsize=0), "itemsize: "),
        (lambda: layout(plane(run=7)), "run: 7 bytes are no numbers of 2"),
        (lambda: layout(plane(run=0)), "run: 0"),
        (lambda: layout(plane(), pages_at=(1000,)), "pages_at: 1 addresses for 2 pages"),
        (lambda: layout(plane(), groups=0), "groups: 0"),
        (lambda: layout(plane(), groups=2), "groups: 2 of 1 planes"),
        (lambda: layout(plane(), pages=1 << 61), "pages: 2305843009213693952 of 4 tokens"),
        (
            lambda: layout(plane(), pages=(1 << 64) - 1 - (1 << 32), page_size=1 << 31),
            "pages: .* more than slots have numbers",
        ),
        (lambda: layout(plane(), pages=-1), "must be whole numbers from 0 on"),
        (lambda: layout(plane(token_stride=-16)), "must be whole numbers from 0 on"),
    ],
)
def test_a_layout_that_contradicts_itself(make: Callable[[], PageLayout], words: str) -> None:
    layout(plane())  # is right
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    "other",
    [
        {"layers": (999,)},
        {"layers": (1001,)},
        {"page_stride": 65},
        {"token_stride": 17},
        {"head_stride": 9},
        {"run": 10},
        {"page_stride": (1 << 64) - 64},  # or an address would wrap around to where it began
        {"token_stride": (1 << 64) - 1},
    ],
)
def test_a_layout_that_reaches_outside_its_memory(other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="memory: pages, layers, tokens or heads reach outside it"):
        layout(plane(**other))


@pytest.mark.parametrize(
    "memory",
    [
        ((1000, 128), (1000, 64)),
        ((1000, 64), (1000, 128)),
        ((1000, 64), (1064, 64)),
        ((1000, 100), (1050, 78), (1010, 0)),
    ],
)
def test_ranges_of_memory_that_overlap_or_touch_are_one(
    memory: tuple[tuple[int, int], ...],
) -> None:
    layout(plane(), memory=memory)
    with pytest.raises(ValueError, match="memory: "):
        layout(plane(), memory=((1000, 63), (1064, 64)))


def test_a_range_of_memory_that_wraps_around() -> None:
    with pytest.raises(ValueError, match="memory: a range ends before it begins"):
        layout(plane(), memory=((1000, 128), ((1 << 64) - 16, 32)))


def test_a_run_that_has_too_many_bytes_to_count() -> None:
    size = (1 << 32) + 15  # of which no piece is a part
    long = [
        layout(
            Plane((at,), size, size, size, size),
            pages=1,
            page_size=1,
            heads=1,
            itemsize=1,
            memory=((at, size),),
        )
        for at in (1 << 40, 1 << 44)
    ]
    with pytest.raises(ValueError, match=f"src: a run of {size} bytes is too long"):
        parts_of(CopyPlan([0], [0]), *long)


def test_an_address_of_a_page_outside_the_memory() -> None:
    at = plane(layers=(0,))
    layout(at, pages_at=(1000, 1064))
    for wrong in ((1000, 1065), (999, 1064), ((1 << 64) - 1, 1000)):
        with pytest.raises(ValueError, match="memory: "):
            layout(at, pages_at=wrong)


TENSOR = torch.zeros(8, 2, 4)
UNIFIED = torch.zeros(2, 1, 2, 2, 4, 6, 6)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PageLayout.of([[TENSOR]], "shq", page_size=4), "axes: 'shq'"),
        (lambda: PageLayout.of([[TENSOR]], "hcs", page_size=4), "axes: 'hcs'"),
        (lambda: PageLayout.of([[TENSOR]], "phc", page_size=4), "axes: 'phc' has neither"),
        (lambda: PageLayout.of([[TENSOR]], "sphc", page_size=4), "axes: 'sphc' has neither"),
        (lambda: PageLayout.of([[TENSOR]], "sc", page_size=4), "tensors have 3 axes, 'sc' names 2"),
        (lambda: PageLayout.of([[TENSOR]], "pthc", page_size=4), "tensors have 3 axes"),
        (
            lambda: PageLayout.of([TENSOR], "shc", page_size=4),
            "planes: one tensor with a layer axis",
        ),
        (
            lambda: PageLayout.of([[TENSOR]], "lsc", page_size=4),
            "planes: one tensor with a layer axis",
        ),
        (lambda: PageLayout.of([], "shc", page_size=4), "planes: there is none"),
        (lambda: PageLayout.of([[]], "shc", page_size=4), "planes: one has no layers"),
        (lambda: PageLayout.of([[TENSOR.mT]], "shc", page_size=4), "not contiguous"),
        (
            lambda: PageLayout.of([[TENSOR, TENSOR[1:]]], "shc", page_size=4),
            "layers differ in shape",
        ),
        (lambda: PageLayout.of([[TENSOR], [TENSOR[:4]]], "shc", page_size=4), "of different pages"),
        (
            lambda: PageLayout.of([[TENSOR]], "pt" + "c", page_size=4),
            "page_size: 4, but tensors have 2",
        ),
        (lambda: PageLayout.host_pool("page_last", [TENSOR], page_size=4), "layout: 'page_last'"),
        (
            lambda: PageLayout.host_pool("page_unified", [TENSOR], page_size=4),
            "planes: \\(8, 2, 4\\)",
        ),
        (lambda: PageLayout.host_pool("page_unified", [TENSOR] * 2, page_size=4), "has one tensor"),
        (lambda: PageLayout.blocks([], head_dims=[2, 2]), "layers: there is none"),
        (lambda: PageLayout.blocks([TENSOR], head_dims=[2, 2]), "layers: \\(8, 2, 4\\) is not"),
        (lambda: PageLayout.of([[TENSOR]], "shc", page_size=0), "page_size: 0"),
        (lambda: PageLayout.device_pool([[TENSOR]], page_size=-1), "page_size: -1"),
        (lambda: PageLayout.host_pool("page_first", [TENSOR[:, None]], page_size=0), "page_size"),
        (
            lambda: PageLayout.of([[TENSOR], [TENSOR.int()]], "shc", page_size=4),
            "of different pages, heads or dtypes",
        ),
        (lambda: PageLayout.of([[TENSOR, TENSOR.int()]], "shc", page_size=4), "layers differ in"),
        (
            lambda: PageLayout.host_pool("page_unified", [UNIFIED.mT], page_size=4),
            "content of a run is not contiguous",
        ),
        (
            lambda: PageLayout.host_pool("page_unified", [UNIFIED[..., ::2]], page_size=4),
            "content of a run is not contiguous",
        ),
        (lambda: PageLayout.blocks([TENSOR[None]], head_dims=[2, 1]), "head_dims: \\[2, 1\\]"),
    ],
)
def test_tensors_that_are_not_what_is_said(make: Callable[[], PageLayout], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("some", [range(2, 4), range(1, 1), range(0, 3, 2), range(-1, 2)])
def test_parts_that_a_layout_does_not_have(some: range) -> None:
    whole = pool("page_first").layout
    with pytest.raises(ValueError, match="layers: range"):
        whole.select(layers=some)
    with pytest.raises(ValueError, match="heads: range"):
        whole.select(heads=some)
    with pytest.raises(ValueError, match="heads: 2 are not 3 groups"):
        whole.split_heads(3)
    for groups in (0, -1, 0.5):
        with pytest.raises(ValueError, match=f"groups: {groups}"):
            whole.split_heads(groups)  # type: ignore[arg-type]
