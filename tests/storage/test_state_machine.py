"""Memory over disk against a set of what was put: any order of use, damage, failure and restart.

The model knows of each page whether it may come back (it was put, and not cleared since), and whether it
must (it was flushed, or is on its way, and nothing has damaged it). A page's bytes follow from its
number, so a hit is right or wrong without a model.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from lmcache_sglang.errors import Reason
from lmcache_sglang.storage.base import NAMESPACE_BYTES
from lmcache_sglang.storage.chain import Chain
from lmcache_sglang.storage.cpu import CpuTier
from lmcache_sglang.storage.disk import environment, layout, probe
from lmcache_sglang.storage.disk.tier import DiskTier
from lmcache_sglang.testing.damage import flip_in_cpu, flip_on_disk
from lmcache_sglang.testing.faulty_tier import FaultyTier
from lmcache_sglang.testing.tier_suite import EngineMemory, a_key, bytes_of

NAMESPACES = [b"\0" * NAMESPACE_BYTES, b"\1" * NAMESPACE_BYTES]
SIZES = [1, 30_001, 45_000, 65_535, 65_536]
UPPER_BYTES = 2 * SIZES[-1]  # so small that most pages live below
LOWER_BYTES = 8 << 20  # so large that nothing has to be evicted
SOON = 30.0

NUMBERS = list(range(5))  # few, so that the history of each is long
numbers = st.sampled_from(NUMBERS)
batches = st.one_of(st.just(NUMBERS), st.permutations(NUMBERS), st.lists(numbers, max_size=3))


def namespace_of(number: int) -> bytes:
    return NAMESPACES[number % 2]


def key_of(number: int) -> bytes:
    return a_key(number, namespace_of(number))


def page_of(number: int) -> bytes:
    return bytes_of(key_of(number), SIZES[number % len(SIZES)])


class Store(RuleBasedStateMachine):
    """The real thing beside the model."""

    def __init__(self) -> None:
        super().__init__()
        self.path = Path(tempfile.mkdtemp())
        self.may_come_back: set[int] = set()
        self.flushed: set[int] = set()
        self.on_the_way: set[int] = set()
        self.damaged: set[int] = set()
        self.ever_damaged = False
        self.open()

    def open(self) -> None:
        self.upper = CpuTier(UPPER_BYTES)
        self.disk = DiskTier(self.path, LOWER_BYTES)
        self.lower = FaultyTier(self.disk)
        self.chain = Chain(self.upper, self.lower, spill_bytes=LOWER_BYTES)
        self.held = ExitStack()

    @property
    def failing(self) -> bool:
        return self.lower.failing is not None

    def must_come_back(self, number: int) -> bool:
        held = number in self.flushed or number in self.on_the_way
        return held and number not in self.damaged and not self.failing

    @initialize()
    def put_everything(self) -> None:
        self.put_pages(NUMBERS, 1)

    @rule(batch=batches, per_page=st.integers(1, 3))
    def put(self, batch: list[int], per_page: int) -> None:
        self.put_pages(batch, per_page)

    def put_pages(self, batch: list[int], per_page: int) -> None:
        memory = EngineMemory([page_of(number) for number in batch], per_page)
        kept = self.chain.put([key_of(number) for number in batch], memory.segments)
        memory.reuse()
        assert all(kept)
        self.may_come_back.update(batch)
        if not self.failing:
            self.on_the_way.update(batch)

    @rule(batch=batches, per_page=st.integers(1, 3))
    def get(self, batch: list[int], per_page: int) -> None:
        keys = [key_of(number) for number in batch]
        pages = [page_of(number) for number in batch]
        for number, is_here in zip(batch, self.chain.exists(keys), strict=True):
            if is_here:
                assert number in self.may_come_back
            else:
                assert not self.must_come_back(number)
        memory = EngineMemory.blank([len(page) for page in pages], per_page)
        held = self.chain.get(keys, memory.segments)
        assert memory.guards_hold()
        for i, number in enumerate(batch):
            if held[i]:
                assert memory.page(i) == pages[i]
                assert number in self.may_come_back
            else:
                assert memory.is_blank(i)
                assert not self.must_come_back(number)
                if not self.failing:
                    self.forget({number})  # its damaged copies are gone, so a put heals it

    @rule()
    def hold_below(self) -> None:
        """What is put waits on its way, until something needs it to be below."""
        self.held.close()
        self.held.enter_context(self.lower.hold_puts())

    @rule()
    def flush(self) -> None:
        self.held.close()
        assert self.chain.flush(SOON)
        if not self.failing:
            self.flushed |= self.on_the_way
        self.on_the_way.clear()

    @rule(namespace=st.sampled_from(NAMESPACES))
    def clear(self, namespace: bytes) -> None:
        self.held.close()
        self.chain.clear(namespace)
        if self.failing:
            return  # what it could not clear may still come back
        gone = {number for number in self.may_come_back if namespace_of(number) == namespace}
        self.may_come_back -= gone
        self.forget(gone)

    @rule(number=numbers, above=st.booleans())
    def damage(self, number: int, above: bool) -> None:
        """Above is also on the way down, where the same bytes wait."""
        key = key_of(number)
        if flip_in_cpu(self.upper, key) if above else flip_on_disk(self.disk, key):
            self.damaged.add(number)
            self.ever_damaged = True

    def forget(self, lost: set[int]) -> None:
        """They need not come back, until they are put again."""
        for known in (self.flushed, self.on_the_way, self.damaged):
            known -= lost

    @rule()
    def repair(self) -> None:
        if not self.failing:
            self.held.close()
            assert self.chain.flush(SOON)
            self.chain.check(repair=True)
            assert all(report.ok for report in self.chain.check().values())
            self.forget(self.damaged.copy())

    @rule(reason=st.sampled_from([None, *Reason]))
    def fail_or_recover_below(self, reason: Reason | None) -> None:
        self.lower.failing = None if self.failing else reason
        if self.failing:
            self.on_the_way.clear()

    @rule(killed=st.booleans())
    def reopen(self, killed: bool) -> None:
        """What a killed process had not flushed is lost, or not."""
        if killed:
            self.lower.failing = Reason.IO
        self.held.close()
        self.chain.close()
        if not self.failing:
            self.flushed |= self.on_the_way
        self.on_the_way.clear()
        self.open()

    @invariant()
    def keeps_its_limits(self) -> None:
        for stats in self.chain.stats():
            assert 0 <= stats.bytes <= stats.capacity
        assert self.chain.waiting()[1] <= LOWER_BYTES
        assert self.disk.stats().evicted == 0

    @invariant()
    def counts_no_faults_that_nobody_caused(self) -> None:
        caused = {f"disk.{reason.value}" for reason in Reason}
        if self.ever_damaged:
            caused |= {"cpu.corrupt", "spill.corrupt", "disk.refused"}
        assert self.chain.faults.counts().keys() <= caused

    def teardown(self) -> None:
        self.held.close()
        self.chain.close()
        shutil.rmtree(self.path)


def test_no_history_of_a_store_gives_wrong_bytes_or_loses_flushed_ones(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def look(file: Path) -> dict[str, str]:  # in this process: it is sound, and there are many
        return probe.inspect(str(file), layout.EXPECTED)

    monkeypatch.setattr(environment, "_probe", look)
    caplog.set_level(logging.ERROR)
    run_state_machine_as_test(
        Store, settings=settings(max_examples=250, stateful_step_count=50, deadline=None)
    )
