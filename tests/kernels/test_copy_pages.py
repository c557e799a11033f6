"""Pages copied between every two layouts are what torch's own indexing makes of them, and nothing else changes."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_sglang.kernels.copy_plan import CopyPlan, Part, copy_pages, parts_of
from lmcache_sglang.kernels.layout import PageLayout
from lmcache_sglang.testing.guarded_memory import guarded
from lmcache_sglang.testing.torch_pools import (
    EVERY_KIND,
    Allocate,
    Pool,
    PoolShape,
    copy_slots_by_torch,
)

SMALL = PoolShape(page_size=8, heads=2, dims=(16, 16))
PAIRS = list(product(EVERY_KIND, repeat=2))


def make(kind: str, shape: PoolShape, seed: int, allocate: Allocate = guarded) -> Pool:
    pool = Pool(kind, shape, allocate=allocate)
    pool.fill(seed)
    return pool


def check(src: Pool, dst: Pool, plan: CopyPlan, *, threads: int = 1) -> None:
    """Copies, and compares with an assignment."""
    wanted, source = dst.twin(), src.twin()
    copy_slots_by_torch(src, wanted, plan)
    copied = copy_pages(plan, src.layout, dst.layout, threads=threads)
    assert dst.same(wanted)
    assert src.same(source)
    shape, layers = src.shape, src.shape.layers if plan.layers is None else len(plan.layers)
    slots = len(plan.src_slots) * plan.tokens  # type: ignore[arg-type]  # none of them is a buffer
    assert copied * shape.layers * shape.page_size == slots * layers * shape.page_bytes


@pytest.mark.parametrize(("one", "other"), PAIRS)
@pytest.mark.usefixtures("simd")
def test_whole_pages_between_any_two_layouts(one: str, other: str) -> None:
    plan = CopyPlan.of_pages([4, 0, 2], [1, 3, 0], page_size=SMALL.page_size)
    check(make(one, SMALL, 1), make(other, SMALL, 2), plan)


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_a_layer_of_some_tokens(one: str, other: str) -> None:
    shape = replace(SMALL, dims=(3, 5), heads=3, page_size=7)
    if "page_unified" in (one, other):
        shape = replace(shape, dims=(3, 3))
    plan = CopyPlan([0, 34, 8, 9], [20, 21, 0, 14], layers=range(1, 2))
    check(make(one, shape, 1), make(other, shape, 2), plan)


@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize("to_it", [True, False])
def test_latent_rows_are_one_plane(kind: str, to_it: bool) -> None:
    shape = replace(SMALL, heads=1, dims=(36,))
    one, other = ("device", kind) if to_it else (kind, "device")
    plan = CopyPlan.of_pages([4, 1], [0, 4], page_size=shape.page_size)
    check(make(one, shape, 1), make(other, shape, 2), plan)


@pytest.mark.parametrize("to_it", [True, False])
@pytest.mark.parametrize("kind", ["device", "page_first", "page_head", "LBHNC"])
def test_groups_of_several_heads(kind: str, to_it: bool) -> None:
    shape = replace(SMALL, heads=6)
    pools = [make(kind, shape, 1), make("page_unified", shape, 3)]
    src, dst = pools if to_it else pools[::-1]
    check(src, dst, CopyPlan.of_pages([4, 1], [0, 4], page_size=shape.page_size))


def test_records_may_be_anywhere() -> None:
    shape = SMALL
    records = [guarded(shape.page_bytes) for _ in range(shape.pages)][::-1]
    layout = PageLayout.records(
        [each.data_ptr() for each in records],
        runs=[32, 32],
        layers=shape.layers,
        heads=shape.heads,
        page_size=shape.page_size,
        itemsize=2,
        owner=records,
    )
    src, dst, slots = make("page_head", shape, 1), make("device", shape, 2), Pool("slots", shape)
    plan = CopyPlan.of_pages(range(5), [3, 0, 4, 1, 2], page_size=shape.page_size)
    copy_pages(plan, src.layout, layout)
    copy_slots_by_torch(src, slots, plan)
    assert torch.equal(torch.cat(records), slots.flats[0].view(torch.uint8))
    copy_pages(
        replace(plan, src_slots=plan.dst_slots, dst_slots=plan.src_slots), layout, dst.layout
    )
    wanted = Pool("device", shape)
    copy_slots_by_torch(src, wanted, replace(plan, dst_slots=plan.src_slots))
    assert dst.same(wanted)


@pytest.mark.parametrize("size", [1 << n for n in range(16)])
@pytest.mark.parametrize(
    ("one", "other"), [("device", "page_head"), ("page_head", "device"), ("padded", "records")]
)
@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.usefixtures("simd")
def test_runs_of_any_size(one: str, other: str, size: int, at_end: bool) -> None:
    shape = PoolShape(pages=3, page_size=2, layers=2, heads=2, dims=(size, size), dtype=torch.uint8)
    allocate = partial(guarded, at_end=at_end)
    plan = CopyPlan.of_pages([2, 0], [0, 1], page_size=2)
    check(make(one, shape, 1, allocate), make(other, shape, 2, allocate), plan)


@pytest.mark.parametrize(
    ("one", "other"), [("device", "page_first"), ("LBHNC", "device"), ("records", "page_head")]
)
@pytest.mark.usefixtures("simd")
def test_threads_share_what_goes_past_the_caches(one: str, other: str) -> None:
    shape = PoolShape(pages=24, page_size=16, layers=8, heads=3, dims=(65, 65))
    rng = random.Random(0)
    pages, others = rng.sample(range(24), 20), rng.sample(range(24), 20)
    assert 20 * shape.page_bytes > 1 << 20, "or it would not stream"
    plan = CopyPlan.of_pages(pages, others, page_size=shape.page_size)
    check(make(one, shape, 1), make(other, shape, 2), plan, threads=3)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_ragged_lists_of_slots(data: st.DataObject) -> None:
    shape = PoolShape(
        pages=data.draw(st.integers(1, 4)),
        page_size=data.draw(st.sampled_from([1, 2, 3, 4, 8, 16])),
        layers=data.draw(st.integers(1, 3)),
        heads=data.draw(st.integers(1, 3)),
        dims=(data.draw(st.integers(1, 33)),) * 2,
        dtype=data.draw(st.sampled_from([torch.uint8, torch.bfloat16, torch.float32])),
    )
    slots = shape.pages * shape.page_size
    targets = data.draw(st.lists(st.integers(0, slots - 1), unique=True))
    sources = [data.draw(st.integers(0, slots - 1)) for _ in targets]
    one, other = data.draw(st.sampled_from(PAIRS))
    plan = CopyPlan(sources, targets)
    check(make(one, shape, 1), make(other, shape, 2), plan)


def test_pages_of_two_sizes() -> None:
    """An engine's blocks of 16 tokens are what another's page of 64 is."""
    large = replace(SMALL, pages=2)
    small = replace(large, pages=4, page_size=4)
    plan = CopyPlan([8, 12, 0], [4, 0, 12], tokens=4)
    check(make("page_first", large, 1), make("LBHNC", small, 2), plan)


def test_some_layers_and_heads_of_another_rank() -> None:
    """A rank that has half of the heads and the upper layers takes its part of a whole page."""
    whole = replace(SMALL, heads=4, layers=4)
    part = replace(whole, heads=2, layers=2)
    src, dst = make("records", whole, 1), make("device", part, 2)
    mine = src.layout.select(layers=range(2, 4), heads=range(2, 4))
    copy_pages(CopyPlan.of_pages([3], [1], page_size=8), mine, dst.layout)
    for plane, layer in product(range(2), range(2)):
        wanted = src.rows(plane, layer + 2)[3].flatten(1, 2)[:, 2:]
        made = dst.rows(plane, layer)[1].flatten(1, 2)
        assert torch.equal(made.view(torch.int16), wanted.view(torch.int16))


def test_nothing_to_copy_is_nothing() -> None:
    src, dst = make("device", SMALL, 1), make("page_first", SMALL, 2)
    check(src, dst, CopyPlan([], []))


def test_slots_may_be_a_tensor() -> None:
    src, dst = make("device", SMALL, 1), make("page_first", SMALL, 2)
    check(src, dst, CopyPlan(torch.tensor([3, 1]), torch.tensor([9, 8])))


@pytest.mark.parametrize(
    ("one", "other", "part"),
    [
        ("page_first", "records", Part(8 * 3 * 2 * 32, 16, 2, 3)),  # K, and V, of a whole page
        ("records", "BLHNC", Part(32, 16, 8, 2 * 3 * 3 * 2)),
        ("device", "layer_first", Part(8 * 2 * 32, 16, 6, 3)),  # a page of a layer: 6 rows
        ("device", "page_first", Part(2 * 32, 16, 6, 3 * 8)),
        ("device", "page_head", Part(32, 16, 6, 3 * 2 * 8)),
        ("padded", "device", Part(32, 2, 2, 3 * 6 * 8)),
    ],
)
def test_what_is_contiguous_on_both_sides_is_moved_at_once(
    one: str, other: str, part: Part
) -> None:
    src, dst = make(one, SMALL, 1), make(other, SMALL, 2)
    plan = CopyPlan.of_pages([4, 0, 2], [1, 3, 0], page_size=SMALL.page_size)
    (found,) = parts_of(plan, src.layout, dst.layout)
    assert found == part
    assert found.run * found.runs * found.items == 3 * SMALL.page_bytes


@pytest.mark.parametrize(
    ("dim", "word"), [(1, 1), (2, 2), (4, 4), (8, 8), (16, 16), (48, 16), (6, 2), (12, 4)]
)
def test_the_longest_word_that_fits_is_chosen_once_a_plan(dim: int, word: int) -> None:
    shape = replace(SMALL, dims=(dim, dim), dtype=torch.uint8)
    src, dst = make("page_head", shape, 1), make("device", shape, 2)
    (part,) = parts_of(CopyPlan.of_pages([1], [2], page_size=8), src.layout, dst.layout)
    assert part.word == word


@pytest.mark.parametrize(
    ("dim", "part"),
    [
        (4096, Part(4096, 16, 1, 8 * 6)),
        (32 << 10, Part(32 << 10, 16, 1, 8 * 6)),
        (64 << 10, Part(32 << 10, 16, 2, 8 * 6)),
        (5 * (32 << 10) // 4, Part((5 * (32 << 10) // 4) // 2, 16, 2, 8 * 6)),
        (16 * 2053, Part(16 * 2053, 16, 1, 8 * 6)),  # a prime number of words
        (32771, Part(32771, 1, 1, 8 * 6)),
        (8 * 5125, Part(8 * 1025, 8, 5, 8 * 6)),  # two halves would be of words of 4 bytes
        (7 * (32 << 10), Part(32 << 10, 16, 7, 8 * 6)),
    ],
)
def test_a_long_run_is_cut_for_threads_to_share(dim: int, part: Part) -> None:
    shape = replace(SMALL, heads=1, dims=(dim, dim), dtype=torch.uint8)
    src, dst = make("device", shape, 1), make("page_first", shape, 2)
    plan = CopyPlan.of_pages([1], [2], page_size=8)
    (found,) = parts_of(plan, src.layout, dst.layout)
    assert found == part
    check(src, dst, plan)


def test_a_page_that_is_one_run_is_cut_too() -> None:
    shape = PoolShape(layers=8, page_size=64, heads=2, dims=(64, 64))
    src, dst = make("page_first", shape, 1), make("records", shape, 2)
    plan = CopyPlan.of_pages([1], [2], page_size=64)
    (found,) = parts_of(plan, src.layout, dst.layout)
    assert found == Part(32 << 10, 16, 1, 2 * 4)
    check(src, dst, plan, threads=2)


def test_planes_of_two_shapes_are_two_parts() -> None:
    shape = replace(SMALL, dims=(16, 24))
    src, dst = make("device", shape, 1), make("page_first", shape, 2)
    plan = CopyPlan.of_pages([1], [2], page_size=8)
    assert [part.run for part in parts_of(plan, src.layout, dst.layout)] == [64, 96]
    check(src, dst, plan)


def test_tokens_one_by_one_are_pages_where_they_follow_one_another() -> None:
    src, dst = make("device", SMALL, 1), make("layer_first", SMALL, 2)
    plan = CopyPlan(range(16, 32), range(8, 24))
    assert [part.run for part in parts_of(plan, src.layout, dst.layout)] == [8 * 2 * 32]
    check(src, dst, plan)


def test_tokens_left_over_do_not_take_pages_apart() -> None:
    """65 tokens: a page of 64, and one."""
    shape = PoolShape(layers=2, pages=3, page_size=64, heads=1, dims=(8, 8))
    src, dst = make("device", shape, 1), make("layer_first", shape, 2)
    plan = CopyPlan([*range(64, 128), 5], [*range(128, 192), 63])
    parts = parts_of(plan, src.layout, dst.layout)
    assert [(part.run, part.runs * part.items) for part in parts] == [(64 * 16, 4), (16, 4)]
    check(src, dst, plan)
    halves = CopyPlan(range(96), range(32, 128))
    assert [part.run for part in parts_of(halves, src.layout, dst.layout)] == [32 * 16]
    check(src, dst, halves)
