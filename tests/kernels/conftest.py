"""What tests of the native data plane need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lmcache_sglang.kernels import _native


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def simd(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each vector unit of this processor in turn."""
    unit: str = request.param
    if unit not in _native.simd_units():
        pytest.skip(f"this processor has no {unit}")
    _native.use_simd(unit)
    yield unit
    _native.use_simd(_native.simd_units()[-1])
