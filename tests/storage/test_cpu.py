"""The CPU tier: the suite, and memory that the machine does not have."""

from __future__ import annotations

from typing import cast

import pytest

from lmcache_sglang.errors import Reason, TierError
from lmcache_sglang.kernels.pages import PageSegments
from lmcache_sglang.storage.base import Lookup, Tier
from lmcache_sglang.storage.cpu import CpuTier
from lmcache_sglang.testing.damage import flip_in_cpu
from lmcache_sglang.testing.tier_suite import (
    PAGE,
    EngineMemory,
    UpperMaker,
    UpperTierSuite,
    a_key,
    read,
    some_keys,
    write,
)


class TestCpuTier(UpperTierSuite):
    oldest_first = True

    @pytest.fixture
    def make(self) -> UpperMaker:
        return lambda capacity, store="a": CpuTier(capacity)

    def corrupt(self, tier: Tier, key: bytes) -> None:
        assert flip_in_cpu(cast("CpuTier", tier), key)


def test_a_machine_without_memory_is_an_error_that_takes_no_room() -> None:
    keys = some_keys(2)
    tier = CpuTier(1 << 62)
    write(tier, keys)
    (address,) = EngineMemory([b"x"]).segments.addresses
    huge = PageSegments([address], [1 << 61], 1)  # never read: there is no memory for its copy
    with pytest.raises(TierError) as caught:
        tier.put([a_key(9)], huge)
    assert caught.value.reason is Reason.FULL
    assert (tier.stats().pages, tier.stats().bytes) == (2, 2 * PAGE)
    assert read(tier, keys) == [Lookup.HIT] * 2
