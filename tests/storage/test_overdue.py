"""A read that does not come back keeps nobody but its own thread waiting."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import pytest

from lmcache_sglang.kernels.pages import PageSegments
from lmcache_sglang.storage import chain as module
from lmcache_sglang.storage.base import NO_LIMITS, Limits, Lookup, page_key
from lmcache_sglang.storage.chain import Chain
from lmcache_sglang.storage.memory import MemoryTier
from lmcache_sglang.storage.overdue import Overdue
from tests.storage.clock import Clock

KEY = page_key(bytes(16), bytes(32))
PAGE = bytes(range(256)) * 16
WAIT_SECONDS = 30.0


def test_a_read_is_overdue_from_its_time_until_it_comes_back() -> None:
    clock = Clock()
    overdue = Overdue(clock)
    assert not overdue
    with overdue.expected(2.0):
        with overdue.expected(1.0):
            clock.now += 1.5
            assert overdue
        assert not overdue  # the other one has time
        clock.now += 1.0
        assert overdue
    assert not overdue


class Hanging(MemoryTier):
    """Its reads, or its lookups, wait until they are let go."""

    def __init__(self) -> None:
        super().__init__(1 << 20, name="disk")
        self.looks_up = False
        self.reading = threading.Event()
        self.answers = threading.Event()

    def exists(self, keys: Sequence[bytes]) -> list[bool]:
        if self.looks_up:
            self.reading.set()
            assert self.answers.wait(WAIT_SECONDS)
        return super().exists(keys)

    def get(
        self, keys: Sequence[bytes], into: PageSegments, limits: Limits = NO_LIMITS
    ) -> list[Lookup]:
        self.reading.set()
        assert self.answers.wait(WAIT_SECONDS)
        return super().get(keys, into, limits)


@pytest.fixture
def tier() -> Iterator[Hanging]:
    made = Hanging()
    yield made
    made.answers.set()


def test_a_tier_whose_read_hangs_is_left_alone_until_it_answers(
    tier: Hanging, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.0)
    chain = Chain(None, tier)
    assert chain.put([KEY], PageSegments.of_buffers([PAGE])) == [True]
    page = bytearray(len(PAGE))
    into = PageSegments.of_buffers([page], writable=True)
    held: list[bool] = []
    stuck = threading.Thread(
        target=lambda: held.extend(chain.get([KEY], into, limits=Limits.within(0.0)))
    )
    stuck.start()
    assert tier.reading.wait(WAIT_SECONDS)
    other = PageSegments.of_buffers([bytearray(len(PAGE))], writable=True)
    assert chain.exists([KEY]) == [False]
    assert chain.get([KEY], other) == [False]  # it does not wait behind the one that hangs
    assert chain.faults.counts() == {"disk.overdue": 2}
    tier.answers.set()
    stuck.join(WAIT_SECONDS)
    assert held == [True]
    assert bytes(page) == PAGE
    assert chain.exists([KEY]) == [True]
    assert chain.faults.counts() == {"disk.busy": 1, "disk.overdue": 2}


def test_a_tier_whose_lookup_hangs_is_left_alone_too(
    tier: Hanging, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its index may lie on the disk that hangs."""
    monkeypatch.setattr(module, "LOOKUP_SECONDS", 0.0)
    chain = Chain(None, tier)
    chain.put([KEY], PageSegments.of_buffers([PAGE]))
    tier.looks_up = True
    found: list[bool] = []
    stuck = threading.Thread(target=lambda: found.extend(chain.exists([KEY])))
    stuck.start()
    assert tier.reading.wait(WAIT_SECONDS)
    assert chain.hangs()
    assert chain.exists([KEY]) == [False]
    tier.answers.set()
    stuck.join(WAIT_SECONDS)
    assert found == [True]
    assert not chain.hangs()


def test_a_read_in_time_is_no_fault(tier: Hanging) -> None:
    chain = Chain(None, tier)
    chain.put([KEY], PageSegments.of_buffers([PAGE]))
    tier.answers.set()
    into = PageSegments.of_buffers([bytearray(len(PAGE))], writable=True)
    assert chain.get([KEY], into) == [True]
    assert chain.faults.counts() == {}
