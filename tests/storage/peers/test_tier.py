"""The tier of other nodes: the conformance suite over a real socket."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmcache_sglang.storage.base import Tier
from lmcache_sglang.testing.socket_tier import SocketTier
from lmcache_sglang.testing.tier_suite import Maker, TierSuite


class TestOverASocket(TierSuite):
    """Damage of the holder's memory is the holder's to find (tests/storage/slab); of what it sends: test_fetch.py."""

    survives_close = True

    @pytest.fixture
    def make(self, shared_memory: Path) -> Maker:
        def made(capacity: int, store: str = "a") -> Tier:
            return SocketTier(shared_memory / store, capacity)

        return made


class TestEncrypted(TestOverASocket):
    @pytest.fixture
    def make(self, shared_memory: Path) -> Maker:
        def made(capacity: int, store: str = "a") -> Tier:
            return SocketTier(shared_memory / store, capacity, encrypted=True)

        return made
