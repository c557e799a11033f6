"""The slab store keeps what every tier owes, on both media and with each policy."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest

from lmcache_sglang.storage.base import Tier
from lmcache_sglang.storage.slab.opening import Place
from lmcache_sglang.storage.slab.settings import Eviction, SlabSettings
from lmcache_sglang.storage.slab.tier import SlabTier
from lmcache_sglang.testing.damage import flip
from lmcache_sglang.testing.tier_suite import Maker, TierSuite, bytes_of


class SlabSuite(TierSuite):
    survives_close = True
    memory = False
    eviction: Eviction = "sieve"

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return tmp_path

    @pytest.fixture
    def make(self, folder: Path) -> Maker:
        def made(capacity: int, store: str = "a") -> Tier:
            place = Place(folder / store, memory=self.memory)
            return SlabTier(place, capacity, SlabSettings(eviction=self.eviction))

        return made

    def corrupt(self, tier: Tier, key: bytes) -> None:
        flip(cast("SlabTier", tier), bytes_of(key), 100)


class TestOnDisk(SlabSuite):
    pass


class TestInMemory(SlabSuite):
    memory = True
    oldest_first = True

    @pytest.fixture
    def folder(self, shared_memory: Path) -> Path:
        return shared_memory


class TestInMemoryByLru(TestInMemory):
    eviction: Eviction = "lru"


class TestInMemoryByS3Fifo(TestInMemory):
    eviction: Eviction = "s3-fifo"
    oldest_first = False  # one use is not enough to stay
