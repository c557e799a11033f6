"""Every token is where it belongs, whatever the lengths of blocks and pages and the order in either."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import torch

from lmcache_sglang.hicache.form import PageForm
from lmcache_sglang.vllm_connector.block_memory import (
    BlockMemory,
    ByIndex,
    Pieces,
    by_strides,
    in_rows,
)
from lmcache_sglang.vllm_connector.cpu_packing import Packing, UnknownPackingError, require_together

LAYERS, HEADS, DIM, BLOCKS = 3, 2, 8, 12
ORDERS = {  # of [layer, block, head, token, content] in memory: vLLM's v1/kv_cache_layout.py
    "LBHNC": (0, 1, 2, 3, 4),
    "LBNHC": (0, 1, 3, 2, 4),
    "LHBNC": (0, 2, 1, 3, 4),
    "BLHNC": (1, 0, 2, 3, 4),
    "BLNHC": (1, 0, 3, 2, 4),
    "BHLNC": (1, 2, 0, 3, 4),
}
PACKED: dict[str, Callable[..., BlockMemory]] = {"strides": by_strides, "index": ByIndex}
LENGTHS = [(16, 16), (16, 64), (64, 16), (32, 64), (8, 8)]  # of blocks and pages


class Tokens:
    """What each slot of the blocks holds: K and V as [slot, layer, head, dim]."""

    def __init__(self, block_size: int, page_size: int) -> None:
        self.block_size, self.page_size = block_size, page_size
        self.k, self.v = torch.randn(2, BLOCKS * block_size, LAYERS, HEADS, DIM)

    @property
    def form(self) -> PageForm:
        return PageForm("page_first", self.page_size, (0, LAYERS), (0, HEADS), (4 * DIM, 4 * DIM))

    def in_rows(self, order: Sequence[int], *, blank: bool = False) -> list[torch.Tensor]:
        """A view [block, head, token, content] a layer, in an order of its own."""
        shape = (BLOCKS, self.block_size, LAYERS, HEADS, 2 * DIM)
        whole = torch.cat([self.k, self.v], dim=-1).view(shape).permute(2, 0, 3, 1, 4)
        memory = whole.permute(*order).contiguous()
        back = [order.index(axis) for axis in range(5)]
        return list((memory.zero_() if blank else memory).permute(*back))

    def packed(self, *, blank: bool = False) -> list[torch.Tensor]:
        """K transposed within a block and head, and V behind it."""
        k, v = (
            each.view(BLOCKS, self.block_size, LAYERS, HEADS, DIM).permute(2, 0, 3, 1, 4)
            for each in (self.k, self.v)
        )
        halves = [k.transpose(-1, -2).flatten(-2), v.flatten(-2)]
        memory = torch.cat(halves, dim=-1).contiguous()
        shape = (LAYERS, BLOCKS, HEADS, self.block_size, 2 * DIM)
        return list((memory.zero_() if blank else memory).view(shape))

    def record(self, slots: Sequence[int]) -> torch.Tensor:
        """A page of the tokens in these slots, as SGLang's page_first keeps it."""
        return torch.cat([self.k[slots].flatten(), self.v[slots].flatten()]).view(torch.uint8)


def pieces(tokens: Tokens, pages: Sequence[Sequence[int]]) -> Pieces:
    """Args: pages: the block of each run of tokens."""
    step = min(tokens.block_size, tokens.page_size)
    blocks, records = [], []
    for page, chosen in enumerate(pages):
        for at, slot in enumerate(chosen):
            blocks.append(slot)
            records.append(page * tokens.page_size + at * step)
    return Pieces(torch.tensor(blocks), torch.tensor(records), step)


def some_pages(tokens: Tokens, count: int, rng: random.Random) -> list[list[int]]:
    """Slots that the pieces of each page come from; no two of the same."""
    step = min(tokens.block_size, tokens.page_size)
    slots = list(range(0, BLOCKS * tokens.block_size, step))
    rng.shuffle(slots)
    each = tokens.page_size // step
    return [slots[i * each : (i + 1) * each] for i in range(count)]


def memories(tokens: Tokens, name: str) -> tuple[BlockMemory, BlockMemory, list[torch.Tensor]]:
    """A full one, an empty one, and the empty one's views."""
    if name in PACKED:
        size, kind = tokens.block_size, PACKED[name]
        packings = [Packing(0, 1, size), Packing(size * DIM, DIM, 1)]
        empty = tokens.packed(blank=True)
        return (
            kind(tokens.packed(), packings, tokens.form),
            kind(empty, packings, tokens.form),
            empty,
        )
    empty = tokens.in_rows(ORDERS[name], blank=True)
    dims = [DIM, DIM]
    full = tokens.in_rows(ORDERS[name])
    return in_rows(full, dims, tokens.form), in_rows(empty, dims, tokens.form), empty


@pytest.mark.parametrize(("block_size", "page_size"), LENGTHS)
@pytest.mark.parametrize("name", [*ORDERS, *PACKED])
def test_tokens_come_to_their_places_and_back(name: str, block_size: int, page_size: int) -> None:
    tokens, rng = Tokens(block_size, page_size), random.Random(f"{name} {block_size} {page_size}")
    full, empty, views = memories(tokens, name)
    pages = some_pages(tokens, 2, rng)
    moved = pieces(tokens, pages)
    records = torch.zeros((2, len(tokens.record(range(page_size)))), dtype=torch.uint8)
    full.gather(moved, records)
    for page, record in zip(pages, records, strict=True):
        slots = [slot + i for slot in page for i in range(moved.tokens)]
        assert torch.equal(record, tokens.record(slots))
    empty.scatter(moved, records)
    expected = tokens.in_rows(ORDERS["LBHNC"]) if name not in PACKED else tokens.packed()
    written = torch.zeros(BLOCKS * block_size, dtype=torch.bool)
    for slot in moved.block_slots.tolist():
        written[slot : slot + moved.tokens] = True
    again = torch.zeros_like(records)
    empty.gather(moved, again)
    assert torch.equal(again, records)
    if bool(written.all()):
        assert all(torch.equal(a, b) for a, b in zip(views, expected, strict=True))
    if name not in PACKED:  # nothing else was touched
        for view, right in zip(views, expected, strict=True):
            mask = written.view(BLOCKS, 1, block_size, 1)
            assert torch.equal(view, torch.where(mask, right, 0))


def test_a_part_of_a_page_comes_alone() -> None:
    """Of a page of two blocks the first is here already."""
    tokens = Tokens(16, 32)
    for name in ("LBNHC", *PACKED):
        _, empty, views = memories(tokens, name)
        record = tokens.record(range(32)).view(1, -1).clone()
        empty.scatter(Pieces(torch.tensor([5 * 16]), torch.tensor([16]), 16), record)
        assert views[0][5].any()
        assert not any(view[block].any() for view in views for block in range(BLOCKS) if block != 5)


def test_a_block_whose_heads_are_apart_is_refused() -> None:
    tokens = Tokens(16, 16)
    require_together(tokens.packed())
    with pytest.raises(UnknownPackingError, match="heads apart"):
        require_together(tokens.in_rows(ORDERS["LBNHC"]))
