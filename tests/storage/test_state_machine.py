"""Memory over disk against a set of what was put: any order of use, damage, failure and restart.

The model knows of each page whether it may come back (it was put, and not cleared since), and whether it
must (it was flushed, or is on its way, and nothing has damaged it). A page's bytes follow from its
number, so a hit is right or wrong without a model.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

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
SIZES = [1, 700, 3000, 20_000, 65_536]
UPPER_BYTES = 3 * SIZES[-1]  # so small that most pages live below
LOWER_BYTES = 8 << 20  # so large that nothing has to be evicted
SOON = 30.0

numbers = st.integers(0, 19)
batches = st.lists(numbers, max_size=6)


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

    @property
    def failing(self) -> bool:
        return self.lower.failing is not None

    def must_come_back(self, number: int) -> bool:
        held = number in self.flushed or number in self.on_the_way
        return held and number not in self.damaged and not self.failing

    @rule(batch=batches, per_page=st.integers(1, 3))
    def put(self, batch: list[int], per_page: int) -> None:
        memory = EngineMemory([page_of(number) for number in batch], per_page)
        kept = self.chain.put([key_of(number) for number in batch], memory.segments)
        memory.reuse()
        assert all(kept)
        self.may_come_back.update(batch)
        if not self.failing:
            self.on_the_way.update(batch)

    @rule(batch=batches, per_page=st.integers(1, 3))
    def get(self, batch: list[int], per_page: int) -> None:
        pages = [page_of(number) for number in batch]
        memory = EngineMemory.blank([len(page) for page in pages], per_page)
        held = self.chain.get([key_of(number) for number in batch], memory.segments)
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

    @rule(batch=batches)
    def exists(self, batch: list[int]) -> None:
        here = self.chain.exists([key_of(number) for number in batch])
        for number, is_here in zip(batch, here, strict=True):
            if is_here:
                assert number in self.may_come_back
            else:
                assert not self.must_come_back(number)

    @rule()
    def flush(self) -> None:
        assert self.chain.flush(SOON)
        if not self.failing:
            self.flushed |= self.on_the_way
        self.on_the_way.clear()

    @rule(namespace=st.sampled_from(NAMESPACES))
    def clear(self, namespace: bytes) -> None:
        self.chain.clear(namespace)
        if self.failing:
            return  # what it could not clear may still come back
        gone = {number for number in self.may_come_back if namespace_of(number) == namespace}
        self.may_come_back -= gone
        self.forget(gone)

    @rule(number=numbers)
    def damage_above(self, number: int) -> None:
        """And on the way down, where the same bytes wait."""
        if flip_in_cpu(self.upper, key_of(number)):
            self.note_damage(number)

    @rule(number=numbers)
    def damage_below(self, number: int) -> None:
        if flip_on_disk(self.disk, key_of(number)):
            self.note_damage(number)

    def note_damage(self, number: int) -> None:
        self.damaged.add(number)
        self.ever_damaged = True

    def forget(self, lost: set[int]) -> None:
        """They need not come back, until they are put again."""
        for known in (self.flushed, self.on_the_way, self.damaged):
            known -= lost

    @rule()
    def repair(self) -> None:
        if not self.failing:
            assert self.chain.flush(SOON)
            self.chain.check(repair=True)
            assert all(report.ok for report in self.chain.check().values())
            self.forget(self.damaged.copy())

    @rule(reason=st.sampled_from(Reason))
    def fail_below(self, reason: Reason) -> None:
        self.lower.failing = reason
        self.on_the_way.clear()

    @rule()
    def recover_below(self) -> None:
        self.lower.failing = None

    @rule()
    def reopen(self) -> None:
        self.chain.close()
        if not self.failing:
            self.flushed |= self.on_the_way
        self.on_the_way.clear()
        self.open()

    @rule()
    def kill_and_reopen(self) -> None:
        """What was not flushed is lost, or not."""
        self.lower.failing = Reason.IO
        self.chain.close()
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
        Store, settings=settings(max_examples=200, stateful_step_count=40, deadline=None)
    )
