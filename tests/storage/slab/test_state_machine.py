"""The slab store against a dict: any order of use, damage, death and reopening, on both media.

The model holds each page that the store said is there, with the parent that was named for it. The store may
give pages up for room at any `put`; the model then asks which, and checks that it might.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from contextlib import suppress
from ctypes import string_at
from pathlib import Path

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from lmcache_sglang.storage.base import Lookup, Stored
from lmcache_sglang.storage.slab import files, opening, probe
from lmcache_sglang.storage.slab.settings import Eviction, SlabSettings
from lmcache_sglang.storage.slab.tier import Shown
from lmcache_sglang.testing import crash_script
from lmcache_sglang.testing.crash_script import Log
from lmcache_sglang.testing.small_store import (
    OWN_NAMESPACE,
    SmallStore,
    get,
    here,
    key_of,
    page_of,
    put,
)
from lmcache_sglang.testing.store_process import Died, run
from lmcache_sglang.testing.tier_suite import OTHER_NAMESPACE

CAPACITY = 1 << 20
BLOCK = 4096
NUMBERS = range(60)  # more than fit
NAMESPACES = [OWN_NAMESPACE, OTHER_NAMESPACE]

numbers = st.sampled_from(NUMBERS)
batches = st.lists(numbers, min_size=1, max_size=10, unique=True)


def namespace_of(number: int) -> bytes:
    return key_of(number)[: len(OWN_NAMESPACE)]


def slot_bytes(number: int) -> int:
    return -(-len(page_of(number)[1]) // BLOCK) * BLOCK


class Machine(RuleBasedStateMachine):
    """The real thing beside the model."""

    memory = False
    eviction: Eviction = "sieve"

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir="/dev/shm", prefix="lmcache-test-"))
        settings = SlabSettings(eviction=self.eviction)
        self.store = SmallStore(self.folder / "store", self.memory, CAPACITY, settings)
        self.model: dict[
            int, int | None
        ] = {}  # the pages that are there, and the parents they named
        self.damaged: set[int] = set()
        self.pinned: set[int] = set()
        self.shown: list[tuple[Shown, dict[int, int]]] = []  # numbers, and where they lie
        self.spoilt: set[int] = set()  # of those places
        self.held: dict[int, int] = {}  # of those, what was not removed since
        self.quotas = dict.fromkeys(NAMESPACES, 0)
        self.tier = self.store.open()

    # What is asked of the store.

    @initialize()
    def put_much(self) -> None:
        self.put(list(NUMBERS[::2]), [None] * len(NUMBERS[::2]))

    @rule(batch=batches, data=st.data())
    def put_pages(self, batch: list[int], data: st.DataObject) -> None:
        """Parents have smaller numbers than their children: no chain comes back to itself."""
        named = [data.draw(st.none() | st.sampled_from(range(n))) if n else None for n in batch]
        self.put(batch, named)

    @rule(batch=batches)
    def put_chain(self, batch: list[int]) -> None:
        chain = sorted(batch)
        self.put(chain, [None, *chain[:-1]])

    def put(self, batch: list[int], named: list[int | None]) -> None:
        pairs = zip(batch, named, strict=True)  # a chain lies in one namespace
        parents = [p if p is None or namespace_of(p) == namespace_of(n) else None for n, p in pairs]
        before = {namespace: self.used_by(namespace) for namespace in NAMESPACES}
        outcome = put(self.tier, batch, [b"" if p is None else key_of(p) for p in parents])
        was, evicted = set(self.model), self.tier.stats().evicted
        for number, parent, stored in zip(batch, parents, outcome, strict=True):
            assert stored in (Stored.STORED, Stored.PRESENT, Stored.REFUSED)
            if stored is Stored.STORED:
                assert number not in was
                self.model[number] = parent
        kept = {number for number, stored in zip(batch, outcome, strict=True) if stored.kept}
        gone = self.look_who_gave_way(new=set(batch) - was)
        assert kept == set(batch) & self.model.keys()
        assert len(gone) <= evicted
        for namespace, quota in self.quotas.items():
            assert quota == 0 or self.used_by(namespace) <= max(quota, before[namespace])

    @rule(batch=batches)
    def get(self, batch: list[int]) -> None:
        expected = [
            Lookup.MISS
            if n not in self.model
            else Lookup.CORRUPT
            if n in self.damaged
            else Lookup.HIT
            for n in batch
        ]
        assert get(self.tier, batch) == expected

    @rule(batch=batches)
    def remove(self, batch: list[int]) -> None:
        there = set(batch) & self.model.keys()
        assert self.tier.remove([key_of(number) for number in batch]) == len(there)
        self.forget(there)

    @rule(namespace=st.sampled_from(NAMESPACES))
    def clear(self, namespace: bytes) -> None:
        there = {number for number in self.model if namespace_of(number) == namespace}
        assert self.tier.clear(namespace) == len(there)
        self.forget(there)

    @rule(batch=batches, on=st.booleans())
    def pin(self, batch: list[int], on: bool) -> None:
        self.tier.pin([key_of(number) for number in batch[:3]], 3600 if on else 0)
        there = set(batch[:3]) & self.model.keys()
        self.pinned = self.pinned | there if on else self.pinned - there

    @rule(namespace=st.sampled_from(NAMESPACES), slots=st.sampled_from([0, 3, 20, 60]))
    def set_quota(self, namespace: bytes, slots: int) -> None:
        self.tier.set_quota(namespace, slots * BLOCK)
        self.quotas[namespace] = slots * BLOCK
        gone = self.look_who_gave_way(new=set())
        assert all(namespace_of(number) == namespace for number in gone)
        if not self.pinned and not self.held and slots:
            assert self.used_by(namespace) <= slots * BLOCK

    @rule(batch=batches)
    def show(self, batch: list[int]) -> None:
        """What is shown already is not shown to another one."""
        pages = [page_of(number) for number in batch]
        shown = self.tier.show([key for key, _ in pages], [len(content) for _, content in pages])
        where = {batch[place]: address for place, address, _ in shown.pages}
        assert where.keys() == (
            set(batch) & self.model.keys() - self.held.keys() if self.memory else set()
        )
        self.shown.append((shown, where))
        self.held |= where
        self.spoilt |= {address for number, address in where.items() if number in self.damaged}

    @rule(which=st.integers(0, 3))
    def unshow(self, which: int) -> None:
        if which < len(self.shown):
            shown, where = self.shown.pop(which)
            self.spoilt -= set(where.values())
            self.held = {n: at for n, at in self.held.items() if where.get(n) != at}
            self.tier.unshow(shown)

    # What happens to it.

    @rule(number=numbers)
    def corrupt(self, number: int) -> None:
        """All copies of the page: some of them may be left from before it was evicted."""
        if number not in self.model or number in self.damaged:
            return
        start = page_of(number)[1][:512]
        region = (self.store.directory / files.REGION).read_bytes()
        file, at = os.open(self.store.directory / files.REGION, os.O_RDWR), -1
        while (at := region.find(start, at + 1)) >= 0:
            os.pwrite(file, bytes([region[at] ^ 0x10]), at)
        os.close(file)
        self.damaged.add(number)
        self.spoilt |= {where[number] for _, where in self.shown if number in where}

    @rule()
    def repair(self) -> None:
        report = self.tier.check(repair=True)
        assert not report.problems
        assert set(report.corrupt) == {key_of(number) for number in self.damaged}
        self.forget(self.damaged.copy())

    @rule()
    def reopen(self) -> None:
        """What was shown is nobody's any more."""
        self.tier.close()
        self.shown.clear()
        self.held.clear()
        self.spoilt.clear()
        self.tier = self.store.open()

    @rule(batch=batches, kind=st.sampled_from(["put", "remove"]), step=st.integers(1, 40))
    def be_killed_and_reopened(self, batch: list[int], kind: str, step: int) -> None:
        self.tier.close()
        self.shown.clear()
        self.held.clear()
        self.spoilt.clear()
        log = Log(self.folder / "log")
        with suppress(Died):  # the script may come to its end before that step
            run(crash_script.run, self.store, [(kind, batch)], log, step)
        self.tier = self.store.open()
        if kind == "remove":
            self.forget(set(batch) - here(self.tier, batch))
        else:
            new = set(batch) - self.model.keys()
            self.model |= dict.fromkeys(here(self.tier, new))
            self.look_who_gave_way(new)

    # What must hold.

    def look_who_gave_way(self, new: set[int]) -> set[int]:
        """new: what the last `put` brought, of which any part may be here."""
        found = here(self.tier, NUMBERS)
        assert found <= self.model.keys()
        gone = self.model.keys() - found
        assert not gone & self.pinned, "a pinned page gave way"
        assert not gone & self.held.keys(), "a page that is shown gave way"
        for number, parent in self.model.items():
            if number in found - new:
                assert parent not in gone, "a page was kept without its ancestors"
        self.forget(gone)
        return set(gone)

    def forget(self, gone: set[int]) -> None:
        self.model = {n: parent for n, parent in self.model.items() if n not in gone}
        self.damaged -= gone
        self.pinned -= gone
        self.held = {n: at for n, at in self.held.items() if n not in gone}

    def used_by(self, namespace: bytes) -> int:
        return sum(slot_bytes(n) for n in self.model if namespace_of(n) == namespace)

    @invariant()
    def has_what_the_model_has(self) -> None:
        assert here(self.tier, NUMBERS) == self.model.keys()
        stats = self.tier.stats()
        assert stats.pages == len(self.model)
        assert stats.bytes == sum(map(slot_bytes, self.model))

    @invariant()
    def what_is_shown_stays_as_it_is(self) -> None:
        """Even when it is removed, and others are put."""
        for _, where in self.shown:
            for number, address in where.items():
                content = page_of(number)[1]
                assert string_at(address, len(content)) == content or address in self.spoilt

    @invariant()
    def keeps_its_limits(self) -> None:
        assert self.store.allocated() <= CAPACITY

    def teardown(self) -> None:
        for shown, _ in self.shown:
            self.tier.unshow(shown)
        report = self.tier.check(repair=True)
        assert not report.problems
        assert set(report.corrupt) == {key_of(number) for number in self.damaged}
        assert self.tier.check().ok
        assert self.tier.counts()["reserved"] == 0
        self.tier.close()
        shutil.rmtree(self.folder)


@pytest.mark.parametrize("eviction", ["sieve", "s3-fifo", "lru"])
@pytest.mark.parametrize("memory", [True, False])
def test_no_history_gives_wrong_bytes_or_loses_what_was_stored(
    memory: bool,
    eviction: Eviction,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def look(task: str, index: Path, argument: str) -> dict[str, str]:
        return probe.inspect(
            str(index), opening.EXPECTED
        )  # in this process: it is sound, and there are many

    monkeypatch.setattr(opening, "_probe", look)
    caplog.set_level(logging.ERROR)
    machine = type("Case", (Machine,), {"memory": memory, "eviction": eviction})
    run_state_machine_as_test(
        machine,
        settings=hypothesis_settings(max_examples=20, stateful_step_count=50, deadline=None),
    )
