"""LMDB gives an index up when it cannot write its first pages (MDB_PANIC). The store opens it anew."""

from __future__ import annotations

import os
from pathlib import Path
from threading import Event, Thread

import pytest

from lmcache_sglang.errors import Reason, TierError
from lmcache_sglang.storage.base import Lookup, Stored
from lmcache_sglang.storage.slab import files
from lmcache_sglang.testing.injection import GIVEN_UP, Failing, injected
from lmcache_sglang.testing.small_store import SmallStore, get, put
from lmcache_sglang.testing.store_process import run

CAPACITY = 4 << 20
OLD = range(20)


@pytest.fixture
def store(shared_memory: Path) -> SmallStore:
    return SmallStore(shared_memory / "store", False, CAPACITY)


@pytest.mark.parametrize("step", ["index_begin", "index_commit"])
def test_the_next_call_works_again(store: SmallStore, step: str) -> None:
    with store.opened() as tier:
        put(tier, OLD, [b""] * len(OLD))
        for round_ in range(3):
            with injected(Failing(step, GIVEN_UP, times=1)), pytest.raises(TierError) as caught:
                put(tier, [30])
            assert caught.value.reason is Reason.IO
            assert get(tier, OLD) == [Lookup.HIT] * len(OLD)
            assert put(tier, [40 + round_], [b""]) == [Stored.STORED]
        assert tier.check().ok


def test_who_reads_meanwhile_notices_nothing(store: SmallStore) -> None:
    with store.opened() as tier:
        put(tier, OLD, [b""] * len(OLD))
        done, seen = Event(), set[Lookup]()

        def read_on() -> None:
            while not done.is_set():
                seen.update(get(tier, OLD))

        readers = [Thread(target=read_on) for _ in range(3)]
        for reader in readers:
            reader.start()
        for number in range(60, 90):
            with injected(Failing("index_commit", GIVEN_UP, times=1)), pytest.raises(TierError):
                put(tier, [number], [b""])
            while True:  # until no reader was in the way of opening it anew
                try:
                    put(tier, [number], [b""])
                    break
                except TierError as error:
                    assert error.reason is Reason.IO
        done.set()
        for reader in readers:
            reader.join()
        assert seen == {Lookup.HIT}
        assert tier.check().ok


def put_with_a_bad_disk(store: SmallStore) -> list[str]:
    """LMDB's own file of first pages cannot be written to for a while. What became of each put."""
    with store.opened() as tier:
        put(tier, OLD, [b""] * len(OLD))
        bad = os.open(store.directory / files.INDEX, os.O_RDONLY)
        (its,) = [file for file in _descriptors(store.directory / files.INDEX) if _syncs(file)]
        good = os.dup(its)
        told = []
        for number, replacement in ((30, bad), (31, good), (32, good)):
            os.dup2(replacement, its)
            try:
                told += [stored.value for stored in put(tier, [number], [b""])]
            except TierError as error:
                told.append(error.reason.value)
        assert get(tier, OLD) == [Lookup.HIT] * len(OLD)
        assert tier.check().ok
    return told


def _descriptors(path: Path) -> list[int]:
    found = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            if link.readlink() == path:
                found.append(int(link.name))
        except FileNotFoundError:  # the one of the listing itself
            continue
    return found


def _syncs(file: int) -> bool:
    flags = Path(f"/proc/self/fdinfo/{file}").read_text().split("flags:")[1].split()[0]
    return bool(int(flags, 8) & os.O_DSYNC)


def test_a_failure_of_the_disk_itself_ends_with_it(store: SmallStore) -> None:
    failed, *after = run(put_with_a_bad_disk, store)
    assert failed == Reason.IO.value
    assert after[-1] == Stored.STORED.value
