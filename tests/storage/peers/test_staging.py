"""Pages that a peer will ask for come from the disk into memory meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing

import pytest

from lmcache_sglang.errors import Reason, TierError
from lmcache_sglang.storage.base import NAMESPACE_BYTES, Lookup
from lmcache_sglang.storage.chain import Chain
from lmcache_sglang.storage.peers.staging import WAITING_MOST, Expected, Staging
from lmcache_sglang.storage.slab.tier import SlabTier
from lmcache_sglang.testing.tier_suite import (
    OTHER_NAMESPACE,
    PAGE,
    EngineMemory,
    a_key,
    bytes_of,
    read,
    some_keys,
)
from lmcache_sglang.testing.two_tiers import SOON, TwoTiers, put

OURS = b"\0" * NAMESPACE_BYTES
KEYS = some_keys(6)


@pytest.fixture
def chain(tiers: TwoTiers) -> Iterator[Chain]:
    """With some pages on the disk only."""
    with closing(tiers.open()) as opened:
        put(opened, KEYS)
        assert opened.flush(SOON)
        opened.tiers[0].remove(KEYS)
        yield opened


@pytest.fixture
def staging(chain: Chain) -> Staging:
    upper, lower = chain.tiers
    assert isinstance(upper, SlabTier)
    return Staging(upper, lower, lambda namespace: namespace == OURS)


def stage(staging: Staging, expected: Expected) -> None:
    memory = EngineMemory.blank([expected.length * len(expected.keys)])
    staging.stage(expected, memory.segments.addresses[0])
    assert memory.guards_hold()


def numbers(keys: Sequence[bytes]) -> list[int]:
    return [KEYS.index(key) for key in keys]


def test_what_is_expected_is_in_memory_afterwards(chain: Chain, staging: Staging) -> None:
    upper = chain.tiers[0]
    staging.expect(Expected(KEYS, PAGE))
    stage(staging, staging.next())
    assert read(upper, KEYS) == [Lookup.HIT] * len(KEYS)
    assert staging.staged == len(KEYS)
    assert not staging.next().keys


def test_what_is_there_already_is_not_read(chain: Chain, staging: Staging) -> None:
    memory = EngineMemory([bytes_of(key) for key in KEYS[:4]])
    chain.tiers[0].put(KEYS[:4], memory.segments)
    staging.expect(Expected(KEYS, PAGE))
    stage(staging, staging.next())
    assert staging.staged == 2


def test_a_long_chain_is_brought_in_parts_that_fit(
    staging: Staging,
) -> None:
    staging.part_most = 4 * PAGE
    staging.expect(Expected(KEYS, PAGE))
    parts = []
    while (part := staging.next()).keys:
        parts.append(numbers(part.keys))
    assert parts == [[0, 1, 2, 3], [4, 5]]


def test_pages_that_are_not_shared_are_not_touched(staging: Staging) -> None:
    staging.expect(Expected([a_key(1, OTHER_NAMESPACE)], PAGE))
    assert not staging.next().keys
    staging.expect(Expected([a_key(1, OTHER_NAMESPACE), KEYS[2]], PAGE))
    assert numbers(staging.next().keys) == [2]


def test_pages_too_large_for_memory_are_left_where_they_are(staging: Staging) -> None:
    for length in (staging.part_most + 1, 1 << 30):
        staging.expect(Expected(KEYS, length))
        assert not staging.next().keys


def test_only_so_many_words_are_remembered(staging: Staging) -> None:
    for _ in range(WAITING_MOST + 10):
        staging.expect(Expected(KEYS, PAGE))
    taken = 0
    while staging.next().keys:
        taken += 1
    assert taken == WAITING_MOST


def test_a_disk_that_fails_costs_nothing_but_the_head_start(
    chain: Chain, staging: Staging, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> list[Lookup]:
        raise TierError("disk", Reason.IO, "gone")

    monkeypatch.setattr(chain.tiers[1], "get", fail)
    staging.expect(Expected(KEYS, PAGE))
    stage(staging, staging.next())
    assert staging.staged == 0


def test_without_a_disk_there_is_nothing_to_bring(chain: Chain) -> None:
    upper = chain.tiers[0]
    assert isinstance(upper, SlabTier)
    alone = Staging(upper, None, lambda _: True)
    alone.expect(Expected(KEYS, PAGE))
    assert not alone.next().keys
