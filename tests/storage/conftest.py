"""Tiers in folders of a test's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmcache_sglang.testing.two_tiers import TwoTiers


@pytest.fixture
def tiers(tmp_path: Path, shared_memory: Path) -> TwoTiers:
    """Shared memory over a disk, both with room for all that a test puts."""
    return TwoTiers(shared_memory / "cpu", tmp_path / "disk")
