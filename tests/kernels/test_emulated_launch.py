"""What a GPU would do, thread by thread, with the parameters and the geometry that the CUDA driver launches.

The emulation (csrc/emulate.hpp) runs the kernels' bodies and counts the writes of each byte.
"""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_sglang.kernels import _native
from lmcache_sglang.kernels.copy_plan import Convert, CopyPlan
from lmcache_sglang.kernels.cuda.prepared import Launch, PreparedCopy
from lmcache_sglang.testing.torch_pools import (
    EVERY_KIND,
    Pool,
    PoolShape,
    copy_by_torch,
    dequantize_by_torch,
    quantize_by_torch,
    scales_shape,
)

SHAPES = {
    "K and V": PoolShape(),
    "latent rows": PoolShape(heads=1, dims=(9,), page_size=2),
    "K longer than V": PoolShape(heads=3, dims=(24, 8), page_size=8, layers=2),
    "one layer": PoolShape(layers=1, heads=2, dims=(16, 16)),
    "odd heads": PoolShape(heads=5, dims=(7, 7), page_size=3),
}
PAGES = [4, 0, 2], [1, 3, 2]  # some follow one another in no pool


@cache
def workers() -> _native.Workers:
    return _native.Workers(3)  # blocks run beside each other, for ThreadSanitizer's eyes


@dataclass
class Emulated:
    """What an emulated copy did.

    Attributes:
        counts: of each of the destination's flats, how often each byte was written.
        strays: accesses beside the memory, or not aligned.
    """

    launches: list[Launch]
    counts: list[torch.Tensor]
    strays: int


def emulate(
    prepared: PreparedCopy, reads: Sequence[Pool], writes: Sequence[Pool], most_blocks: int
) -> Emulated:
    """All launches of a copy, with tables in memory of their own, as the driver puts them."""
    tables = ctypes.create_string_buffer(prepared.table_bytes + 8)
    at = ctypes.addressof(tables)
    launches = prepared.launches(at, at, most_blocks)
    areas = [area for pool in writes for area in pool.memory()]
    counts = [torch.zeros(size, dtype=torch.uint8) for _, size in areas]
    strays = 0
    for launch in launches:
        written, beside = _native.emulate(
            launch.kernel,
            launch.params,
            launch.blocks,
            [area for pool in reads for area in pool.memory()],
            areas,
            workers(),
        )
        for total, each in zip(counts, written, strict=True):
            total += torch.frombuffer(bytearray(each), dtype=torch.uint8)
        strays += beside
    return Emulated(launches, counts, strays)


def written_once(dst: Pool, pages: Sequence[int], layers: range) -> list[torch.Tensor]:
    """Of each flat, 1 for every byte of these pages and layers."""
    marks = Pool(dst.kind, dst.shape, shift=dst.shift)
    ones = Pool(dst.kind, dst.shape, shift=dst.shift)
    for flat in ones.flats:
        flat.view(torch.uint8).fill_(1)
    copy_by_torch(ones, marks, pages, pages, layers)
    return [flat.view(torch.uint8) for flat in marks.flats]


def pages_of(slots: object, pool: Pool) -> list[int]:
    assert isinstance(slots, list)
    return [slot // pool.shape.page_size for slot in slots]


def check_copy(src: Pool, dst: Pool, plan: CopyPlan, most_blocks: int) -> Emulated:
    """The right bytes, each written once, and nothing else."""
    src.fill(1)
    dst.fill(2)
    wanted = dst.twin()
    layers = range(src.shape.layers) if plan.layers is None else plan.layers
    from_pages, to_pages = pages_of(plan.src_slots, src), pages_of(plan.dst_slots, dst)
    copy_by_torch(src, wanted, from_pages, to_pages, layers)
    done = emulate(PreparedCopy(plan, src.layout, dst.layout, None), [src], [dst], most_blocks)
    assert done.strays == 0
    assert all(
        torch.equal(count, once)
        for count, once in zip(done.counts, written_once(dst, to_pages, layers), strict=True)
    )
    assert dst.same(wanted)
    return done


def pairs() -> list[tuple[str, str, str]]:
    return [
        (name, a, b)
        for name, shape in SHAPES.items()
        for a in EVERY_KIND
        for b in EVERY_KIND
        if shape.has(a) and shape.has(b)
    ]


@pytest.mark.parametrize(("shape", "src", "dst"), pairs())
def test_every_byte_is_written_once_and_no_other(shape: str, src: str, dst: str) -> None:
    wanted = SHAPES[shape]
    for shift, most_blocks in [(0, 1000), (1, 2)]:
        plan = CopyPlan.of_pages(*PAGES, page_size=wanted.page_size)
        check_copy(Pool(src, wanted, shift=shift), Pool(dst, wanted), plan, most_blocks)


@pytest.mark.parametrize("off", [-1, 0, 1, 8])
@pytest.mark.parametrize("bits", range(16))
def test_runs_of_any_length(bits: int, off: int) -> None:
    size = (1 << bits) + off
    if size < 1:
        pytest.skip("no run has no bytes")
    shape = PoolShape(layers=2, pages=3, page_size=2, heads=1, dims=(size,), dtype=torch.uint8)
    plan = CopyPlan.of_pages([2, 0], [0, 1], page_size=2)
    check_copy(Pool("device", shape), Pool("records", shape), plan, 4)


@pytest.mark.parametrize("width", [1, 2, 4, 8, 16])
def test_the_widest_word_that_fits_is_moved(width: int) -> None:
    shape = PoolShape(heads=1, dims=(64,), dtype=torch.uint8)
    plan = CopyPlan.of_pages([0], [1], page_size=shape.page_size)
    src, dst = Pool("device", shape, shift=64 + width % 16), Pool("page_first", shape)
    done = check_copy(src, dst, plan, 8)
    assert [launch.kernel for launch in done.launches] == [f"lmcache_copy_{width}"]


def pieces(pool: Pool, tokens: int) -> list[int]:
    """First slots of so many tokens of one page, none over another."""
    size = pool.shape.page_size
    within = range(0, size - tokens + 1, tokens)
    return [page * size + first for page in range(pool.shape.pages) for first in within]


@st.composite
def ragged(draw: st.DrawFn) -> tuple[Pool, Pool, list[int], list[int], int]:
    """Pools of different page sizes, and pieces of pages: from anywhere, some twice, to anywhere else."""
    dims = tuple(draw(st.lists(st.sampled_from([1, 3, 8, 40]), min_size=1, max_size=2)))
    layers, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3)) if len(dims) > 1 else 1
    dtype = draw(st.sampled_from([torch.uint8, torch.bfloat16, torch.float32]))
    tokens = draw(st.integers(1, 4))
    pools = []
    for _ in range(2):
        page_size = tokens * draw(st.integers(1, 3)) + draw(st.integers(0, 1))
        shape = PoolShape(layers, draw(st.integers(1, 4)), page_size, heads, dims, dtype)
        kind = draw(st.sampled_from([each for each in EVERY_KIND if shape.has(each)]))
        pools.append(Pool(kind, shape, shift=draw(st.integers(0, 3))))
    to = draw(st.lists(st.sampled_from(pieces(pools[1], tokens)), unique=True, min_size=1))
    choose = st.lists(st.sampled_from(pieces(pools[0], tokens)), min_size=len(to), max_size=len(to))
    return pools[0], pools[1], draw(choose), to, tokens


@given(ragged(), st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_ragged_lists_of_pieces(
    case: tuple[Pool, Pool, list[int], list[int], int], most_blocks: int
) -> None:
    src, dst, come_from, go_to, tokens = case
    src.fill(1)
    dst.fill(2)
    wanted, marks = dst.twin(), Pool(dst.kind, dst.shape, shift=dst.shift)
    ones = torch.ones(8, dtype=torch.uint8).view(src.shape.dtype)[0]  # of each byte
    for plane, layer in product(range(src.planes), range(src.shape.layers)):
        for a, b in zip(come_from, go_to, strict=True):
            for i in range(tokens):
                at = place(dst, b + i)
                wanted.rows(plane, layer)[at] = src.rows(plane, layer)[place(src, a + i)]
                marks.rows(plane, layer)[at] = ones
    plan = CopyPlan(come_from, go_to, tokens)
    done = emulate(PreparedCopy(plan, src.layout, dst.layout, None), [src], [dst], most_blocks)
    assert done.strays == 0
    once = [flat.view(torch.uint8) for flat in marks.flats]
    assert all(map(torch.equal, done.counts, once))
    assert dst.same(wanted)


def place(pool: Pool, slot: int) -> tuple[int, int]:
    return divmod(slot, pool.shape.page_size)


@pytest.mark.parametrize("most_blocks", [1, 2, 3, 7, 64, 1 << 20])
@pytest.mark.parametrize("pages", [[0], [3, 1], [6, 5, 4, 3, 2, 1, 0]])
def test_any_number_of_blocks_covers_it(pages: list[int], most_blocks: int) -> None:
    shape = PoolShape(layers=5, pages=7, page_size=16, heads=2, dims=(64, 64))
    plan = CopyPlan.of_pages(pages, pages[::-1], page_size=16)
    for src, dst in [("device", "page_first"), ("page_head", "blocks"), ("records", "page_first")]:
        done = check_copy(Pool(src, shape), Pool(dst, shape), plan, most_blocks)
        assert all(1 <= launch.blocks <= most_blocks for launch in done.launches)


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_one_layer_is_one_launch(kind: str) -> None:
    shape = PoolShape(layers=4)
    src, dst = Pool(kind, shape), Pool("device", shape)
    for layer in range(shape.layers):
        plan = CopyPlan.of_pages(*PAGES, page_size=4, layers=range(layer, layer + 1))
        assert len(check_copy(src, dst, plan, 16).launches) == 1


def test_a_whole_batch_is_one_launch() -> None:
    shape = PoolShape(layers=8, pages=32, page_size=16, heads=2, dims=(64, 64))
    plan = CopyPlan.of_pages(list(range(0, 32, 3)), list(range(11)), page_size=16)
    assert len(check_copy(Pool("page_first", shape), Pool("device", shape), plan, 64).launches) == 1


def lanes_of(launch: Launch) -> int:
    """The field behind `CopyParams` (csrc/launch.hpp)."""
    (lanes,) = struct.unpack_from("I", launch.params, 192)
    return int(lanes)


def test_a_long_run_keeps_more_than_a_warp_busy() -> None:
    shape = PoolShape(layers=4, pages=2, page_size=64, heads=8, dims=(128, 128))
    plan = CopyPlan.of_pages([1], [0], page_size=64)
    done = check_copy(Pool("page_first", shape), Pool("page_first", shape), plan, 1000)
    (launch,) = done.launches
    assert lanes_of(launch) > 32
    assert launch.blocks * _native.THREADS * 4 * 16 >= shape.layers * 64 * 8 * 128 * 2


def test_short_items_get_no_more_lanes_than_they_have_words() -> None:
    shape = PoolShape(layers=1, heads=1, dims=(48,), dtype=torch.uint8)  # 3 words of 16 bytes
    plan = CopyPlan(list(range(0, 20, 2)), list(range(1, 20, 2)), 1)
    prepared = PreparedCopy(
        plan, Pool("device", shape).layout, Pool("layer_first", shape).layout, None
    )
    tables = ctypes.create_string_buffer(prepared.table_bytes)
    at = ctypes.addressof(tables)
    assert [lanes_of(launch) for launch in prepared.launches(at, at, 8)] == [2]


def test_tables_may_lie_elsewhere_for_the_gpu() -> None:
    """Written at one address, read at another: what the driver does with a copy of them on the GPU."""
    shape = PoolShape()
    src, dst = Pool("device", shape), Pool("records", shape)
    src.fill(1)
    prepared = PreparedCopy(CopyPlan.of_pages(*PAGES, page_size=4), src.layout, dst.layout, None)
    host = ctypes.create_string_buffer(prepared.table_bytes)
    device = ctypes.create_string_buffer(prepared.table_bytes)
    launches = prepared.launches(ctypes.addressof(host), ctypes.addressof(device), 8)
    ctypes.memmove(device, host, prepared.table_bytes)
    ctypes.memset(host, 0xFF, prepared.table_bytes)
    for launch in launches:
        _, strays = _native.emulate(
            launch.kernel, launch.params, launch.blocks, src.memory(), dst.memory(), workers()
        )
        assert strays == 0
    wanted = Pool("records", shape)
    copy_by_torch(src, wanted, *PAGES, range(shape.layers))
    assert dst.same(wanted)


def test_the_watch_sees_what_goes_beside_the_memory() -> None:
    """Or the tests above would prove nothing."""
    shape = PoolShape()
    src, dst = Pool("device", shape), Pool("records", shape)
    prepared = PreparedCopy(CopyPlan.of_pages(*PAGES, page_size=4), src.layout, dst.layout, None)
    tables = ctypes.create_string_buffer(prepared.table_bytes)
    at = ctypes.addressof(tables)
    (launch,) = prepared.launches(at, at, 8)
    ((start, size),) = dst.memory()
    args = launch.kernel, launch.params, launch.blocks
    assert _native.emulate(*args, src.memory(), [(start, size // 2)], workers())[1] > 0
    assert _native.emulate(*args, src.memory()[1:], dst.memory(), workers())[1] > 0
    same = bytearray(launch.params)
    for axis in range(3):  # no stride in the destination
        struct.pack_into("q", same, 48 + 40 * axis + 24, 0)
    args = launch.kernel, bytes(same), launch.blocks
    (counts,), _ = _native.emulate(*args, src.memory(), dst.memory(), workers())
    assert any(count > 1 for count in counts)


SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, -math.nan, 1e-7, -448.0, 65504.0]


def any_numbers(pool: Pool) -> None:
    """Rows of ordinary numbers, and some that have the others among them, at any place."""
    generator = torch.Generator().manual_seed(3)
    for flat in pool.flats:
        flat.copy_(torch.randn(flat.shape, generator=generator) * 3)
        at = torch.randint(len(flat), (max(1, len(flat) // 50),), generator=generator)
        which = torch.randint(len(SPECIAL), at.shape, generator=generator)
        flat[at] = torch.tensor(SPECIAL, dtype=flat.dtype)[which]


CONVERT = {
    torch.bfloat16: (Convert.BF16_TO_E4M3, Convert.E4M3_TO_BF16),
    torch.float16: (Convert.FP16_TO_E4M3, Convert.E4M3_TO_FP16),
}


@pytest.mark.parametrize("dtype", CONVERT)
@pytest.mark.parametrize("dims", [(8, 8), (128, 64), (7, 7), (12,), (1,), (576,)])
@pytest.mark.parametrize(
    ("wide", "narrow", "scale"),
    [
        ("device", "records", "device"),
        ("page_head", "blocks", "page_first"),
        ("layer_first", "page_first_direct", "page_head"),
        ("page_first", "layer_first", "layer_first"),
    ],
)
def test_conversions_there_and_back(
    wide: str, narrow: str, scale: str, dims: tuple[int, ...], dtype: torch.dtype
) -> None:
    shape = PoolShape(dims=dims, dtype=dtype, heads=1 if len(dims) == 1 else 4)
    eight = replace(shape, dtype=torch.uint8)
    scales = Pool(scale, scales_shape(shape))
    there, back = CONVERT[dtype]
    for shift in [0, 1]:
        src, dst = Pool(wide, shape, shift=shift), Pool(narrow, eight, shift=shift)
        any_numbers(src)
        plan = CopyPlan.of_pages(*PAGES, page_size=4, convert=there)
        prepared = PreparedCopy(plan, src.layout, dst.layout, scales.layout)
        done = emulate(prepared, [src], [dst, scales], 3)
        assert done.strays == 0
        marks = [
            *written_once(dst, PAGES[1], range(3)),
            *written_once(scales, PAGES[1], range(3)),
        ]
        assert all(map(torch.equal, done.counts, marks))
        for plane in range(len(dims)):
            for layer in range(3):
                wanted, its_scales = quantize_by_torch(src.rows(plane, layer)[PAGES[0]])
                made = dst.rows(plane, layer)[PAGES[1]]
                assert torch.equal(made, wanted.view(torch.uint8))
                assert torch.equal(scales.rows(plane, layer)[PAGES[1]], its_scales)
        again = Pool(wide, shape, shift=shift)
        plan = CopyPlan.of_pages(PAGES[1], PAGES[0], page_size=4, convert=back)
        prepared = PreparedCopy(plan, dst.layout, again.layout, scales.layout)
        done = emulate(prepared, [dst, scales], [again], 3)
        assert done.strays == 0
        assert all(map(torch.equal, done.counts, written_once(again, PAGES[0], range(3))))
        for plane in range(len(dims)):
            for layer in range(3):
                rows = dst.rows(plane, layer)[PAGES[1]].view(torch.float8_e4m3fn)
                wanted = dequantize_by_torch(rows, scales.rows(plane, layer)[PAGES[1]], dtype)
                made = again.rows(plane, layer)[PAGES[0]]
                assert torch.equal(made.view(torch.int16), wanted.view(torch.int16))
