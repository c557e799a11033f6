"""Copies between device buffers and records, against a copy element by element."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lmcache_sglang.errors import CudaUnavailableError
from lmcache_sglang.hicache import device_copiers
from lmcache_sglang.hicache.device_copiers import ByCuda, ByEngine, ByKernels, ByTorch, on_gpu
from lmcache_sglang.hicache.device_pages import DevicePages, MakesCopier, Run

LAYERS, SPAN, SLOTS = 3, 4, 40
PAGES = torch.tensor([8, 0, 20])  # first rows
CHOSEN = torch.tensor([1, 2, 3])  # their records

# The last are SGLang's own, as its page_first host pools would call them: on a CPU the stand-ins of testing/sglang_cpu.
COPIERS = [ByKernels, ByTorch, ByEngine]


@pytest.fixture
def _engine(sglang: None) -> None:
    from lmcache_sglang.testing.sglang_cpu.plugin import offer_transfers

    offer_transfers()


every = pytest.mark.usefixtures("_engine")


def page_first(
    widths: tuple[int, int], copier: MakesCopier
) -> tuple[DevicePages, list[torch.Tensor]]:
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


def scatter(pages: DevicePages, records: torch.Tensor, *layers: int) -> None:
    with pages.scattering(PAGES, records, CHOSEN) as one:
        for layer in layers:
            one(layer)


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


# SGLang's kernels take rows of eight bytes, of which records are a whole number, for K and for V.
SHAPES = [((16, 16), COPIERS), ((16, 8), COPIERS), ((24, 16), COPIERS[:2]), ((7, 5), COPIERS[:2])]


@every
@pytest.mark.parametrize(
    ("widths", "copier"), [(widths, copier) for widths, copiers in SHAPES for copier in copiers]
)
def test_a_record_is_the_page_in_the_order_of_page_first(
    widths: tuple[int, int], copier: MakesCopier
) -> None:
    pages, buffers = page_first(widths, copier)
    records = torch.zeros((3, pages.page_bytes), dtype=torch.uint8)
    pages.gather(PAGES, records)
    assert [bytes(record.tolist()) for record in records] == expected(buffers)


@every
@pytest.mark.parametrize(
    ("widths", "copier"), [(widths, copier) for widths, copiers in SHAPES for copier in copiers]
)
def test_a_layer_is_copied_and_no_other_and_nothing_beside_it(
    widths: tuple[int, int], copier: MakesCopier
) -> None:
    pages, buffers = page_first(widths, copier)
    records = torch.zeros((5, pages.page_bytes), dtype=torch.uint8)
    pages.gather(PAGES, records[1:4])
    before = [buffer.clone() for buffer in buffers]
    for buffer in buffers:
        buffer.fill_(0)
    scatter(pages, records, 1, 7)  # the pool has no layer 7
    rows = (PAGES[:, None] + torch.arange(SPAN)).flatten()
    for number, (buffer, was) in enumerate(zip(buffers, before, strict=True)):
        wanted = torch.zeros_like(buffer)
        if number % LAYERS == 1:
            wanted[rows] = was[rows]
        assert torch.equal(buffer, wanted)


@every
@pytest.mark.parametrize(
    ("widths", "shift"), [((24, 16), 0), ((6, 6), 0), ((16, 16), 8), ((16, 16), 48)]
)
def test_sglangs_own_copies_are_left_alone_with_what_they_do_not_know(
    widths: tuple[int, int], shift: int
) -> None:
    pages, _ = page_first(widths, ByTorch)
    (group,) = pages.groups
    moved = [
        Run(run.buffer, run.offset + shift * (run.offset > 0), run.stride) for run in group.runs
    ]
    layers = {layer: [layer, LAYERS + layer] for layer in range(LAYERS)}
    with pytest.raises(NotImplementedError, match="order of bytes"):
        DevicePages(moved, SPAN, layers, ByEngine)


@pytest.mark.parametrize("copier", COPIERS[:2])
def test_layers_of_different_widths_and_a_buffer_of_no_layer_are_copied(
    copier: MakesCopier,
) -> None:
    """As where only some layers have another pool beside theirs."""
    widths = [8, 12, 8, 4]
    buffers = [torch.randint(0, 256, (SLOTS, width), dtype=torch.uint8) for width in widths]
    offsets = [sum(widths[:at]) * SPAN for at in range(4)]
    runs = [Run(*each) for each in zip(buffers, offsets, widths, strict=True)]
    pages = DevicePages(runs, SPAN, {0: [0], 2: [2], 5: [1]}, copier)
    assert [len(group.runs) for group in pages.groups] == [2, 1, 1]
    records = torch.zeros((5, pages.page_bytes), dtype=torch.uint8)
    pages.gather(PAGES, records[1:4])
    before = [buffer.clone() for buffer in buffers]
    for layer, changed in ((0, 0), (2, 2), (5, 1)):
        for buffer in buffers:
            buffer.fill_(0)
        scatter(pages, records, layer)
        rows = (PAGES[:, None] + torch.arange(SPAN)).flatten()
        for number, (buffer, was) in enumerate(zip(buffers, before, strict=True)):
            wanted = torch.zeros_like(buffer)
            if number == changed:
                wanted[rows] = was[rows]
            assert torch.equal(buffer, wanted)
    place = records[1:4, offsets[3] :].view(3, SPAN, widths[3])
    assert torch.equal(place[0], before[3][8 : 8 + SPAN])


def test_layers_that_share_a_buffer_are_refused() -> None:
    runs = [Run(torch.zeros((SLOTS, 8)), 0, 32)]
    with pytest.raises(NotImplementedError, match="in common"):
        DevicePages(runs, SPAN, {0: [0], 1: [0]}, ByTorch)


def test_rows_that_are_in_pieces_are_refused() -> None:
    buffer = torch.zeros((SLOTS, 4, 8), dtype=torch.float32).transpose(1, 2)
    with pytest.raises(NotImplementedError, match="not in one piece"):
        DevicePages([Run(buffer, 0, 128)], SPAN, {0: [0]}, ByTorch)


@pytest.mark.parametrize("copier", COPIERS[:2])
def test_a_buffer_may_be_a_part_of_another(copier: MakesCopier) -> None:
    """As a layer of a state is of the tensor of all layers."""
    whole = torch.arange(2 * SLOTS * 3, dtype=torch.float32).view(2, SLOTS, 3)
    runs = [Run(whole[0], 0, 12), Run(whole[1], 12, 12)]
    pages = DevicePages(runs, 1, {0: [0], 1: [1]}, copier)
    records = torch.zeros((1, pages.page_bytes), dtype=torch.uint8)
    pages.gather(torch.tensor([5]), records)
    assert records.view(torch.float32).tolist() == [[*whole[0, 5].tolist(), *whole[1, 5].tolist()]]


@every
def test_where_our_kernels_cannot_be_had_sglangs_are_taken_and_else_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise CudaUnavailableError("no compiler; install one")

    monkeypatch.setattr(device_copiers, "CudaCopier", refuse)
    theirs, odd = page_first((16, 16), ByTorch)[0], page_first((7, 5), ByTorch)[0]
    with ExitStack() as opened:
        on_gpu([theirs, odd], torch.device("cuda", 0), tmp_path, opened)
    assert isinstance(theirs._copier, ByEngine)
    assert isinstance(odd._copier, ByTorch)
    said = caplog.messages
    assert "no compiler; install one" in said[0]
    assert "copied by torch" in said[1]


def test_on_a_gpu_our_kernels_are_taken_and_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[object, Path]] = []
    closed: list[bool] = []

    def make(device: torch.device, *, cubins: Path) -> SimpleNamespace:
        made.append((device, cubins))
        return SimpleNamespace(
            built=SimpleNamespace(source="a test"), close=lambda: closed.append(True)
        )

    monkeypatch.setattr(device_copiers, "CudaCopier", make)
    pages, _ = page_first((16, 16), ByTorch)
    device = torch.device("cuda", 1)
    with ExitStack() as opened:
        on_gpu([pages], device, tmp_path, opened)
        assert isinstance(pages._copier, ByCuda)
        assert (made, closed) == ([(device, tmp_path)], [])
    assert closed == [True]


def test_a_device_that_is_no_nvidia_gpu_is_left_to_torch(tmp_path: Path) -> None:
    pages, _ = page_first((16, 16), ByTorch)
    with ExitStack() as opened:
        on_gpu([pages], torch.device("xpu", 0), tmp_path, opened)
    assert isinstance(pages._copier, ByTorch)
