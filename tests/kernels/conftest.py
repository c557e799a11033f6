"""What tests of the native data plane need; and at the end how many registers the CUDA kernels take, which a test only
bounds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import pytest

from lmcache_sglang.kernels import _native

PREFIX = "registers by "


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def simd(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each vector unit of this processor in turn."""
    unit: str = request.param
    if unit not in _native.simd_units():
        pytest.skip(f"this processor has no {unit}")
    _native.use_simd(unit)
    yield unit
    _native.use_simd(_native.simd_units()[-1])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts: defaultdict[str, list[int]] = defaultdict(list)
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if name.startswith(PREFIX):
                built = name.removeprefix(PREFIX).partition(" of ")[0]
                counts[built].append(value)
    for built, values in sorted(counts.items()):
        said = f"CUDA kernels by {built}: {min(values)} to {max(values)} registers a thread"
        terminalreporter.write_line(said)
