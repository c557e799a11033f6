"""What cannot be copied is said before anything is, by the name of the argument."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch

from lmcache_sglang.kernels.copy_plan import Convert, CopyPlan, copy_pages
from lmcache_sglang.kernels.layout import PageLayout, Plane
from lmcache_sglang.testing.guarded_memory import guarded
from lmcache_sglang.testing.kv_pools import KINDS, Pool, Shape, host_pool, padded_pool

SHAPE = Shape()
SLOTS = SHAPE.pages * SHAPE.page_size


def pool(kind: str = "page_first", **other: Any) -> Pool:
    made = KINDS[kind](replace(SHAPE, **other), guarded)
    for each in made.memory:
        each.zero_()
    return made


def refused(
    plan: CopyPlan, src: Pool, dst: Pool, error: type[Exception], words: str, **more: Any
) -> None:
    for each in src.memory:
        each.fill_(1)
    with pytest.raises(error, match=words):
        copy_pages(plan, src.layout, dst.layout, **more)
    assert not any(each.any() for each in dst.memory)


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


def test_a_source_twice_is_no_mistake() -> None:
    src, dst = pool("device"), pool()
    copy_pages(CopyPlan([3, 3], [0, 1]), src.layout, dst.layout)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"layers": 4}, "dst: layers differ, 3 in src and 4 in dst"),
        ({"heads": 1}, "dst: heads differ, 2 in src and 1 in dst"),
        ({"dims": (16, 8)}, "dst: numbers of a token and head differ, 16 in src and 8 in dst"),
        ({"dims": (16,)}, "dst: planes differ, 2 in src and 1 in dst"),
        ({"dtype": torch.float32}, "dst: numbers of 2 bytes do not become 4"),
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
    folded = replace(dst, layout=replace(dst.layout, planes=planes))
    refused(CopyPlan([0], [0]), pool("device"), folded, ValueError, "dst: its rows overlap")


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (CopyPlan([0, 1], [0]), "dst_slots: 1 for 2 src_slots"),
        (CopyPlan([0], [0], tokens=0), "tokens: 0 of pages of 8"),
        (CopyPlan([0], [0], tokens=9), "tokens: 9 of pages of 8"),
        (CopyPlan([0], [0], layers=range(2, 4)), "layers: 2 to 4 of 3"),
        (CopyPlan([0], [0], layers=range(2, 2)), "layers: range"),
        (CopyPlan([0], [0], layers=range(0, 3, 2)), "layers: range"),
        (CopyPlan([0], [0], layers=range(-1, 1)), "layers: range"),
        (CopyPlan([0.5], [0]), "src_slots: "),  # type: ignore[list-item]
        (CopyPlan([0], [1 << 63]), "dst_slots: "),
        (CopyPlan([0], [0], convert=Convert.BF16_TO_E4M3), "scales: needed"),
    ],
)
def test_a_plan_that_contradicts_itself(plan: CopyPlan, words: str) -> None:
    refused(plan, pool("device"), pool(), ValueError, words)


def test_threads_below_none() -> None:
    refused(CopyPlan([0], [0]), pool("device"), pool(), ValueError, "threads: -1", threads=-1)


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


def e4m3() -> tuple[Pool, Pool, Pool]:
    """A source, a destination, and scales beside it."""
    return pool("device"), pool(dtype=torch.uint8), pool(dims=(1, 1), dtype=torch.float32)


@pytest.mark.parametrize(
    ("scales", "words"),
    [
        ({"dims": (1, 1), "dtype": torch.bfloat16}, "scales: not one float32"),
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


# Layouts that are wrong by themselves.


def plane(**other: Any) -> Plane:
    return replace(Plane((1000,), 64, 16, 8, 8), **other)


def layout(*planes: Plane, **other: Any) -> PageLayout:
    given: dict[str, Any] = {"pages": 2, "page_size": 4, "heads": 2, "itemsize": 2}
    return PageLayout(planes, memory=((1000, 128),), **{**given, **other})


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


def test_an_address_of_a_page_outside_the_memory() -> None:
    at = plane(layers=(0,))
    layout(at, pages_at=(1000, 1064))
    for wrong in ((1000, 1065), (999, 1064), ((1 << 64) - 1, 1000)):
        with pytest.raises(ValueError, match="memory: "):
            layout(at, pages_at=wrong)


TENSOR = torch.zeros(8, 2, 4)


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
        (lambda: PageLayout.blocks([TENSOR[None]], head_dims=[2, 1]), "head_dims: \\[2, 1\\]"),
    ],
)
def test_tensors_that_are_not_what_is_said(make: Callable[[], PageLayout], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("some", [range(2, 4), range(1, 1), range(0, 3, 2), range(-1, 2)])
def test_parts_that_a_layout_does_not_have(some: range) -> None:
    whole = host_pool("page_first", SHAPE, guarded).layout
    with pytest.raises(ValueError, match="layers: range"):
        whole.select(layers=some)
    with pytest.raises(ValueError, match="heads: range"):
        whole.select(heads=some)
    with pytest.raises(ValueError, match="heads: 2 are not 3 groups"):
        whole.split_heads(3)


def test_gaps_are_told_apart() -> None:
    """What the tests of copies look at is what the pool says it is."""
    padded = padded_pool(SHAPE, guarded)
    for each in padded.memory:
        each.zero_()
    padded.memory[0].view(torch.bfloat16)[-1] = 1  # behind the last run
    assert sum(int((each != 0).sum()) for each in padded.gaps()) == 1
    assert not any(each.any() for each in padded.numbers())
