"""Copies between device buffers and records, against a copy element by element."""

from __future__ import annotations

import pytest
import torch

from lmcache_sglang.hicache.device_pages import ByKernels, ByTorch, DevicePages, Run

LAYERS, SPAN, SLOTS = 3, 4, 40
PAGES = torch.tensor([8, 0, 20])  # first rows


Copier = type[ByKernels | ByTorch]
both = pytest.mark.parametrize("copier", [ByKernels, ByTorch])


def page_first(widths: tuple[int, int], copier: Copier) -> tuple[DevicePages, list[torch.Tensor]]:
    """K and V of all layers, as SGLang's page_first host pool has them."""
    buffers, runs, start = [], [], 0
    for width in widths:
        for layer in range(LAYERS):
            buffer = torch.randint(0, 256, (SLOTS, width), dtype=torch.uint8)
            buffers.append(buffer)
            runs.append(Run(buffer, start + layer * width, LAYERS * width))
        start += SPAN * LAYERS * width
    layers = {layer: [layer, LAYERS + layer] for layer in range(LAYERS)}
    return DevicePages(runs, SPAN, layers, copier), buffers


def expected(buffers: list[torch.Tensor]) -> list[bytes]:
    """[K or V][token][layer] of each page."""
    return [
        b"".join(
            bytes(half[layer][int(first) + token].tolist())
            for half in (buffers[:LAYERS], buffers[LAYERS:])
            for token in range(SPAN)
            for layer in range(LAYERS)
        )
        for first in PAGES
    ]


@both
@pytest.mark.parametrize("widths", [(16, 16), (16, 8), (7, 5), (6, 6)])
def test_a_record_is_the_page_in_the_order_of_page_first(
    widths: tuple[int, int], copier: Copier
) -> None:
    pages, buffers = page_first(widths, copier)
    records = torch.zeros((3, pages.page_bytes), dtype=torch.uint8)
    pages.gather(PAGES, records)
    assert [bytes(record.tolist()) for record in records] == expected(buffers)


@both
def test_a_layer_is_copied_and_no_other_and_nothing_beside_it(copier: Copier) -> None:
    pages, buffers = page_first((16, 8), copier)
    records = torch.zeros((5, pages.page_bytes), dtype=torch.uint8)
    pages.gather(PAGES, records[1:4])
    before = [buffer.clone() for buffer in buffers]
    for buffer in buffers:
        buffer.fill_(0)
    pages.scatter(1, PAGES, records, torch.tensor([1, 2, 3]))
    pages.scatter(7, PAGES, records, torch.tensor([1, 2, 3]))  # a layer that the pool has not
    rows = (PAGES[:, None] + torch.arange(SPAN)).flatten()
    for number, (buffer, was) in enumerate(zip(buffers, before, strict=True)):
        wanted = torch.zeros_like(buffer)
        if number % LAYERS == 1:
            wanted[rows] = was[rows]
        assert torch.equal(buffer, wanted)


def test_the_kernels_copy_what_lies_in_host_memory() -> None:
    pages, _ = page_first((16, 8), ByTorch)
    assert isinstance(pages._all, ByTorch)
    own = DevicePages([Run(torch.zeros((SLOTS, 8)), 0, 32)], SPAN, {0: [0]})
    assert isinstance(own._all, ByKernels)
    assert isinstance(own._layers[0], ByKernels)


def test_rows_that_are_in_pieces_are_refused() -> None:
    buffer = torch.zeros((SLOTS, 4, 8), dtype=torch.float32).transpose(1, 2)
    with pytest.raises(NotImplementedError, match="not in one piece"):
        DevicePages([Run(buffer, 0, 128)], SPAN, {0: [0]})


@both
def test_a_buffer_may_be_a_part_of_another(copier: Copier) -> None:
    """As a layer of a state is of the tensor of all layers."""
    whole = torch.arange(2 * SLOTS * 3, dtype=torch.float32).view(2, SLOTS, 3)
    runs = [Run(whole[0], 0, 12), Run(whole[1], 12, 12)]
    pages = DevicePages(runs, 1, {0: [0], 1: [1]}, copier)
    records = torch.zeros((1, pages.page_bytes), dtype=torch.uint8)
    pages.gather(torch.tensor([5]), records)
    assert records.view(torch.float32).tolist() == [[*whole[0, 5].tolist(), *whole[1, 5].tolist()]]
