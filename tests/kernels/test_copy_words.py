"""Runs of one number each, which are transposed tile by tile on a CPU: all of them arrive, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_sglang.kernels.copy_plan import CopyPlan, copy_pages, parts_of
from lmcache_sglang.kernels.layout import PageLayout, Plane
from lmcache_sglang.testing.guarded_memory import guarded

DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Order = tuple[str, ...]
ORDERS: tuple[Order, ...] = (
    ("page", "token", "row", "dim"),  # as SGLang's records
    ("page", "row", "dim", "token"),  # as vLLM keeps K on x86
    ("page", "dim", "row", "token"),
    ("row", "page", "token", "dim"),
)


class Memory:
    """Numbers [page, token, row, dim], which lie in another order. Args: seed: of what they are; 0: nothing."""

    def __init__(self, order: Order, sizes: dict[str, int], itemsize: int, seed: int) -> None:
        lengths = [sizes[axis] for axis in order]
        count = torch.Size(lengths).numel()
        self.flat = guarded(count * itemsize).view(DTYPES[itemsize])
        generator = torch.Generator().manual_seed(seed)
        self.flat.copy_(torch.randint(0, 120, (count,), generator=generator))
        natural = ("page", "token", "row", "dim")
        laid = self.flat.view(lengths)
        self.numbers = laid.permute([order.index(axis) for axis in natural])
        page, token, row, dim = (stride * itemsize for stride in self.numbers.stride())
        start = self.flat.data_ptr()
        plane = Plane(
            tuple(start + row * at for at in range(sizes["row"])), page, token, dim, itemsize
        )
        areas = ((start, self.flat.nbytes),)
        self.layout = PageLayout(
            (plane,), sizes["page"], sizes["token"], sizes["dim"], itemsize, areas, owner=self.flat
        )

    def at(self, slot: int) -> torch.Tensor:
        """[row, dim] of one token."""
        tokens = self.numbers.shape[1]
        return self.numbers[slot // tokens, slot % tokens]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_numbers_arrive_in_any_order(data: st.DataObject) -> None:
    itemsize = data.draw(st.sampled_from(sorted(DTYPES)))
    rows, dims = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 3, 16, 33, 64, 70]))
    tokens = data.draw(st.sampled_from([1, 5, 8, 16, 32, 35, 64]))
    lengths = data.draw(st.sampled_from([(tokens, tokens), (tokens, 2 * tokens)]))
    sides = [
        Memory(
            data.draw(st.sampled_from(ORDERS)),
            {"page": 3, "token": length, "row": rows, "dim": dims},
            itemsize,
            seed,
        )
        for seed, length in enumerate(lengths, 1)
    ]
    src, dst = sides if data.draw(st.booleans()) else sides[::-1]
    starts = [
        data.draw(st.permutations(range(0, 3 * side.numbers.shape[1], tokens)))[:2]
        for side in (src, dst)
    ]
    pieces = min(len(each) for each in starts)
    source, wanted = src.flat.clone(), dst.numbers.clone()
    for from_, to in zip(*starts, strict=False):
        for i in range(tokens):
            place = divmod(to + i, dst.numbers.shape[1])
            wanted[place] = src.at(from_ + i)
    plan = CopyPlan(starts[0][:pieces], starts[1][:pieces], tokens)
    copy_pages(plan, src.layout, dst.layout, threads=data.draw(st.integers(1, 2)))
    assert torch.equal(dst.numbers, wanted)
    assert torch.equal(src.flat, source)


@pytest.mark.parametrize("itemsize", DTYPES)
@pytest.mark.parametrize("to_rows", [True, False])
def test_what_takes_several_jobs(itemsize: int, to_rows: bool) -> None:
    sizes = {"page": 9, "token": 64, "row": 5, "dim": 120}
    sides = [Memory(order, sizes, itemsize, seed) for seed, order in enumerate(ORDERS[:2], 1)]
    src, dst = sides[::-1] if to_rows else sides
    plan = CopyPlan.of_pages(range(9), [3, 0, 4, 8, 1, 2, 7, 6, 5], page_size=64)
    (part,) = parts_of(plan, src.layout, dst.layout)
    assert part.run == itemsize, "or they would not be single numbers"
    copy_pages(plan, src.layout, dst.layout, threads=2)
    assert torch.equal(dst.numbers[[plan.dst_slots[i] // 64 for i in range(9)]], src.numbers)  # type: ignore[index]
