"""Other nodes at the end of the chain: asked last, kept here by their policy, told what is put here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

import pytest

from lmcache_sglang.errors import Reason, TierError
from lmcache_sglang.kernels.pages import PageSegments
from lmcache_sglang.storage.base import (
    NO_LIMITS,
    CheckReport,
    Limits,
    Lookup,
    OuterTier,
    Stored,
    TierStats,
)
from lmcache_sglang.storage.chain import Chain
from lmcache_sglang.storage.memory import MemoryTier
from lmcache_sglang.testing.tier_suite import (
    OTHER_NAMESPACE,
    PAGE,
    ROOMY,
    EngineMemory,
    a_key,
    bytes_of,
    some_keys,
)
from lmcache_sglang.testing.two_tiers import SOON, TwoTiers, get, put


class Elsewhere(OuterTier):
    """Another node's pages, in a dictionary of this process."""

    name = "peers"
    capacity = 0

    def __init__(self) -> None:
        self.pages = MemoryTier(ROOMY)
        self.keeps: Callable[[bytes], bool] = lambda _: True
        self.announced: list[list[bytes]] = []
        self.asked: list[list[bytes]] = []
        self.fails = False

    def fill(self, keys: Sequence[bytes]) -> None:
        memory = EngineMemory([bytes_of(key) for key in keys])
        self.pages.put(keys, memory.segments)

    def fits(self, page_bytes: int) -> bool:
        return True

    def exists(self, keys: Sequence[bytes]) -> list[bool]:
        return self.pages.exists(keys)

    def get(
        self, keys: Sequence[bytes], into: PageSegments, limits: Limits = NO_LIMITS
    ) -> list[Lookup]:
        self.asked.append(list(keys))
        if self.fails:
            raise TierError(self.name, Reason.IO, "cut off")
        return self.pages.get(keys, into, limits)

    def put(self, keys: Sequence[bytes], *_: object) -> list[Stored]:
        raise AssertionError("nothing is put to other nodes")

    def remove(self, keys: Sequence[bytes]) -> int:
        return 0

    def clear(self, namespace: bytes) -> int:
        return 0

    def stats(self) -> TierStats:
        return TierStats(self.name, 0, 0, 0)

    def check(self, *, repair: bool = False) -> CheckReport:
        return CheckReport(0)

    def close(self) -> None:
        self.pages.close()

    def wanted(self, keys: Sequence[bytes]) -> list[bool]:
        return [self.keeps(key) for key in keys]

    def announce(self, keys: Sequence[bytes]) -> None:
        self.announced.append(list(keys))


@pytest.fixture
def elsewhere() -> Elsewhere:
    return Elsewhere()


@pytest.fixture(params=["cpu+disk", "disk", "cpu"])
def chain(request: pytest.FixtureRequest, tiers: TwoTiers, elsewhere: Elsewhere) -> Iterator[Chain]:
    kinds = str(request.param).split("+")
    gone = {"memory": None} if "cpu" not in kinds else {"disk": None} if "disk" not in kinds else {}
    with closing(tiers.but(**gone).open(elsewhere)) as opened:
        yield opened


def here(chain: Chain, keys: Sequence[bytes]) -> list[bool]:
    """Which are in a tier of this node."""
    found = [tier.exists(keys) for tier in chain.tiers[:-1]]
    return [any(answers) for answers in zip(*found, strict=True)]


def test_other_nodes_pages_are_found_and_come(chain: Chain, elsewhere: Elsewhere) -> None:
    keys = some_keys(4)
    elsewhere.fill(keys[1:3])
    assert chain.exists(keys) == [False, True, True, False]
    assert get(chain, keys) == [False, True, True, False]


def test_they_are_asked_only_for_what_is_not_here(chain: Chain, elsewhere: Elsewhere) -> None:
    keys = some_keys(4)
    put(chain, keys[:2])
    elsewhere.fill(keys)
    assert get(chain, keys) == [True] * 4
    assert elsewhere.asked == [keys[2:]]


def test_what_came_is_kept_and_told(chain: Chain, elsewhere: Elsewhere) -> None:
    keys = some_keys(4)
    elsewhere.fill(keys)
    get(chain, keys)
    assert here(chain, keys) == [True] * 4
    assert elsewhere.announced == [keys]
    get(chain, keys)
    assert elsewhere.asked == [keys], "it is read here now"


def test_what_is_kept_reaches_the_disk(tiers: TwoTiers, elsewhere: Elsewhere) -> None:
    keys = some_keys(4)
    elsewhere.fill(keys)
    with closing(tiers.open(elsewhere)) as chain:
        get(chain, keys)
        assert chain.flush(SOON)
        assert chain.tiers[1].exists(keys) == [True] * 4


def test_what_the_policy_does_not_want_is_not_kept(chain: Chain, elsewhere: Elsewhere) -> None:
    keys = some_keys(5)
    elsewhere.fill(keys)
    elsewhere.keeps = lambda key: key in (keys[0], keys[1], keys[3])
    assert get(chain, keys) == [True] * 5
    assert here(chain, keys) == [True, True, False, True, False]
    assert elsewhere.announced == [keys[:2], keys[3:4]]


def test_kept_pages_are_told_their_parents(tiers: TwoTiers, elsewhere: Elsewhere) -> None:
    """Or a full tier would drop the head of a chain before its tail."""
    chain_of = some_keys(8)
    elsewhere.fill(chain_of)
    small = tiers.but(disk=None, upper_bytes=2 << 20)
    with closing(small.open(elsewhere)) as chain:
        memory = EngineMemory.blank([PAGE] * 4)
        chain.get(chain_of[:4], memory.segments)
        chain.get(chain_of[4:], memory.segments, parent=chain_of[3])
        for number in range(1000, 1060):
            put(chain, [a_key(number)])
            still = here(chain, chain_of)
            assert still == sorted(still, reverse=True)
        assert not any(here(chain, chain_of))


def test_what_is_put_here_is_told_once_it_is_here(chain: Chain, elsewhere: Elsewhere) -> None:
    keys = some_keys(3)
    put(chain, keys)
    put(chain, keys)  # nothing new
    assert elsewhere.announced == [keys]


def test_a_clear_is_told_and_leaves_other_nodes_alone(chain: Chain, elsewhere: Elsewhere) -> None:
    theirs = [a_key(1, OTHER_NAMESPACE)]
    elsewhere.fill(theirs)
    assert chain.clear(OTHER_NAMESPACE) == 0
    assert elsewhere.announced == [[]]
    assert chain.exists(theirs) == [True]


def test_other_nodes_that_fail_are_misses_and_a_count(chain: Chain, elsewhere: Elsewhere) -> None:
    keys = some_keys(2)
    put(chain, keys[:1])
    elsewhere.fill(keys)
    elsewhere.fails = True
    assert get(chain, keys) == [True, False]
    assert chain.faults.counts() == {"peers.io": 1}


def test_other_nodes_alone_are_no_store(elsewhere: Elsewhere) -> None:
    with pytest.raises(ValueError, match="this node"):
        Chain(None, None, peers=elsewhere)
