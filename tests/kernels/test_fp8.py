"""e4m3 and its scales: every 16-bit number there, every 8-bit number back, beside torch's own conversion."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from lmcache_sglang.kernels.copy_plan import Convert, CopyPlan, copy_pages
from lmcache_sglang.testing.torch_pools import (
    EVERY_KIND,
    Pool,
    PoolShape,
    dequantize_by_torch,
    quantize_by_torch,
    scales_shape,
)

DTYPES = [torch.bfloat16, torch.float16]
THERE = {torch.bfloat16: Convert.BF16_TO_E4M3, torch.float16: Convert.FP16_TO_E4M3}
BACK = {torch.bfloat16: Convert.E4M3_TO_BF16, torch.float16: Convert.E4M3_TO_FP16}


def quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """[n, dim] of 16-bit numbers to e4m3 [n, dim] and scales [n, 1], by our copy."""
    shape = PoolShape(1, len(rows), 1, 1, (rows.shape[1],), rows.dtype)
    src, dst = Pool("device", shape), Pool("device", replace(shape, dtype=torch.uint8))
    scales = Pool("device", scales_shape(shape))
    src.rows(0, 0).copy_(rows.view(src.rows(0, 0).shape))
    plan = CopyPlan(range(len(rows)), range(len(rows)), convert=THERE[rows.dtype])
    copy_pages(plan, src.layout, dst.layout, scales=scales.layout)
    made = dst.flats[0].view(torch.float8_e4m3fn).view(rows.shape)
    return made, scales.flats[0].view(-1, 1)


def dequantize(rows: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """And back."""
    shape = PoolShape(1, len(rows), 1, 1, (rows.shape[1],), torch.uint8)
    src, dst = Pool("device", shape), Pool("device", replace(shape, dtype=dtype))
    beside = Pool("device", scales_shape(shape))
    src.flats[0].copy_(rows.view(torch.uint8).flatten())
    beside.flats[0].copy_(scales.flatten())
    plan = CopyPlan(range(len(rows)), range(len(rows)), convert=BACK[dtype])
    copy_pages(plan, src.layout, dst.layout, scales=beside.layout)
    return dst.flats[0].view(rows.shape)


def every(dtype: torch.dtype) -> Tensor:
    """All 65,536 of them."""
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)


def same(made: Tensor, wanted: Tensor) -> bool:
    """Bit by bit; a NaN is equal to nothing."""
    return torch.equal(made.contiguous().view(torch.uint8), wanted.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_at_scale_1(dtype: torch.dtype) -> None:
    """A 448 beside each number makes the scale 1, but where the number is the larger one."""
    numbers = every(dtype)
    numbers = torch.where(numbers.float().abs() > 448, torch.full_like(numbers, 448), numbers)
    rows = torch.stack([numbers, torch.full_like(numbers, 448)], dim=1)
    made, scales = quantize(rows)
    assert torch.equal(scales, torch.ones_like(scales))
    assert same(made, quantize_by_torch(rows)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_alone_is_as_large_as_can_be(dtype: torch.dtype) -> None:
    rows = every(dtype).view(-1, 1)
    made, scales = quantize(rows)
    wanted, its_scales = quantize_by_torch(rows)
    assert same(scales, its_scales)
    assert same(made, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 3, 64, 128, 577])
def test_rows_of_all_sizes(dtype: torch.dtype, dim: int) -> None:
    generator = torch.Generator().manual_seed(dim)
    spread = torch.logspace(-6, 4, 100).view(-1, 1)
    rows = (torch.randn(100, dim, generator=generator) * spread).to(dtype)
    made, scales = quantize(rows)
    wanted, its_scales = quantize_by_torch(rows)
    assert torch.equal(scales, its_scales)
    assert same(made, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "scale", [1.0, 0.37, 3e-5, 0.0, -0.0, -1.5, 2000.0, math.inf, -math.inf, math.nan]
)
def test_every_e4m3_number_back(dtype: torch.dtype, scale: float) -> None:
    rows = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(torch.float8_e4m3fn)
    scales = torch.full((256, 1), scale)
    made = dequantize(rows.view(-1, 1), scales, dtype)
    assert same(made, dequantize_by_torch(rows.view(-1, 1), scales, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_there_and_back_is_within_half_a_step(dtype: torch.dtype) -> None:
    """A step of e4m3 is an eighth of its binade; below 2^-6 of the scale it is 2^-9 of it."""
    rows = torch.randn(64, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    made, scales = quantize(rows)
    back = dequantize(made, scales, dtype).float()
    step = torch.maximum(rows.float().abs() / 16, scales * 2**-10)
    assert bool(((back - rows.float()).abs() <= step * 1.02).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_stay_zeros_and_keep_their_sign(dtype: torch.dtype) -> None:
    rows = torch.tensor([[0.0, -0.0]], dtype=dtype)
    made, scales = quantize(rows)
    assert (scales.tolist(), made.view(torch.uint8).tolist()) == ([[0.0]], [[0, 0x80]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_spoils_no_other_number(dtype: torch.dtype) -> None:
    rows = torch.tensor([[math.nan, 2.0, -1.0]], dtype=dtype)
    made, _ = quantize(rows)
    assert made[0, 0].isnan()
    assert made[0, 1:].float().tolist() == [448.0, -224.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_has_its_numbers_sign_and_no_other_bits(dtype: torch.dtype) -> None:
    """Which NaN arithmetic makes is another one on each processor: x86 has inf/inf negative, a GPU positive."""
    nan = {torch.bfloat16: 0x7FC0, torch.float16: 0x7E00}[dtype]
    rows = torch.tensor([[math.inf, -math.inf, 0.0, 0.0, 1.0, -1.0]], dtype=dtype)
    rows.view(torch.uint16)[0, 2:4] = torch.tensor([nan | 1, nan | 0x8001], dtype=torch.uint16)
    made, scales = quantize(rows)
    assert made.view(torch.uint8).tolist() == [[0x7F, 0xFF, 0x7F, 0xFF, 0, 0x80]]
    back = dequantize(made, scales, dtype).view(torch.uint16).tolist()
    assert back == [[nan, nan | 0x8000] * 3]


@pytest.mark.parametrize("wide", EVERY_KIND)
@pytest.mark.parametrize("narrow", ["page_unified", "device", "records"])
@pytest.mark.parametrize("beside", ["page_unified", "page_first"])
def test_every_layout_there_and_back(wide: str, narrow: str, beside: str) -> None:
    """page_unified keeps heads in groups, with which neither of the others need be laid out."""
    shape = PoolShape(dims=(16, 16))
    src, again = Pool(wide, shape), Pool(wide, shape)
    small, scales = (
        Pool(narrow, replace(shape, dtype=torch.uint8)),
        Pool(beside, scales_shape(shape)),
    )
    for flat in src.flats:
        flat.copy_(torch.randn(flat.shape, generator=torch.Generator().manual_seed(1)))
    pages, there = [4, 0, 2], [1, 3, 2]
    plan = CopyPlan.of_pages(pages, there, page_size=4, convert=Convert.BF16_TO_E4M3)
    copy_pages(plan, src.layout, small.layout, scales=scales.layout)
    plan = CopyPlan.of_pages(there, pages, page_size=4, convert=Convert.E4M3_TO_BF16)
    copy_pages(plan, small.layout, again.layout, scales=scales.layout)
    for plane, layer in product(range(2), range(shape.layers)):
        wanted, its_scales = quantize_by_torch(src.rows(plane, layer)[pages])
        assert same(small.rows(plane, layer)[there], wanted)
        assert torch.equal(scales.rows(plane, layer)[there], its_scales)
        back = dequantize_by_torch(wanted, its_scales, torch.bfloat16)
        assert same(again.rows(plane, layer)[pages], back)
