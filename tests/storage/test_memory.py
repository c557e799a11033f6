"""The plain tier keeps every obligation of a tier."""

from __future__ import annotations

from typing import cast

import pytest

from lmcache_sglang.storage.base import Tier
from lmcache_sglang.storage.memory import MemoryTier
from lmcache_sglang.testing.tier_suite import Maker, TierSuite


class TestMemoryTier(TierSuite):
    evicts = False

    @pytest.fixture
    def make(self) -> Maker:
        return lambda capacity, store="a": MemoryTier(capacity)

    def corrupt(self, tier: Tier, key: bytes) -> None:
        records = cast("MemoryTier", tier)._records
        assert records is not None
        page = records[key]
        records[key] = page._replace(data=page.data[:-1] + bytes([page.data[-1] ^ 1]))
