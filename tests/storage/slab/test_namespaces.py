"""A store has room for so many namespaces; the one that was put to longest ago makes way for another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from lmcache_sglang.errors import TierError
from lmcache_sglang.storage.base import NAMESPACE_BYTES, Lookup, Stored
from lmcache_sglang.storage.slab.opening import Place
from lmcache_sglang.storage.slab.tier import SlabTier
from lmcache_sglang.testing.tier_suite import ROOMY, a_key, read, write

MOST = 256


@pytest.fixture
def tier() -> Iterator[SlabTier]:
    with (
        TemporaryDirectory(dir="/dev/shm", prefix="lmcache-test-") as folder,
        closing(SlabTier(Place(Path(folder), memory=True), ROOMY)) as opened,
    ):
        yield opened
        assert opened.check().ok


def keys_in(number: int) -> list[bytes]:
    namespace = number.to_bytes(NAMESPACE_BYTES, "big")
    return [a_key(page, namespace) for page in range(2)]


def test_the_oldest_namespace_makes_way_for_a_new_one(tier: SlabTier) -> None:
    for number in range(300):
        assert write(tier, keys_in(number), 4096) == [Stored.STORED] * 2
    for number in range(300):
        kept = number >= 300 - MOST
        assert read(tier, keys_in(number), 4096) == [Lookup.HIT if kept else Lookup.MISS] * 2
    assert tier.stats().pages == 2 * MOST
    assert tier.stats().evicted == 2 * (300 - MOST)


def test_a_namespace_with_a_quota_stays_and_one_too_many_is_told(tier: SlabTier) -> None:
    for number in range(MOST):
        tier.set_quota(keys_in(number)[0][:NAMESPACE_BYTES], 1 << 20)
    with pytest.raises(TierError, match="every namespace that the store has room for has a quota"):
        tier.set_quota(keys_in(MOST)[0][:NAMESPACE_BYTES], 1 << 20)
    assert write(tier, keys_in(MOST), 4096) == [Stored.REFUSED] * 2
    tier.set_quota(keys_in(0)[0][:NAMESPACE_BYTES], 0)
    assert write(tier, keys_in(MOST), 4096) == [Stored.STORED] * 2
