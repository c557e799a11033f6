"""The disk tier: the suite, and its own books and file."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from threading import Event, Thread
from typing import cast

import lmdb
import pytest

from lmcache_sglang.errors import Reason, TierError
from lmcache_sglang.storage.base import Lookup, Stored, Tier
from lmcache_sglang.storage.disk import layout
from lmcache_sglang.storage.disk import tier as tier_module
from lmcache_sglang.storage.disk.tier import USABLE, DiskTier
from lmcache_sglang.testing.damage import flip_on_disk
from lmcache_sglang.testing.tier_suite import (
    JOIN_SECONDS,
    PAGE,
    SMALL,
    Maker,
    TierSuite,
    a_key,
    read,
    some_keys,
    write,
    write_pages,
)

SIZE = 4 << 20


class TestDiskTier(TierSuite):
    oldest_first = True
    survives_close = True

    @pytest.fixture
    def make(self, tmp_path: Path) -> Maker:
        return lambda capacity, store="a": DiskTier(tmp_path / store, int(capacity / USABLE))

    def corrupt(self, tier: Tier, key: bytes) -> None:
        assert flip_on_disk(cast("DiskTier", tier), key)


@pytest.mark.usefixtures("tiny_groups")
class TestDiskTierInManyTransactions(TestDiskTier):
    """A batch that is written in several groups keeps the same promises."""

    @pytest.fixture
    def tiny_groups(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tier_module, "GROUP_BYTES", 3 * PAGE)


@pytest.fixture
def tier(tmp_path: Path) -> DiskTier:
    return DiskTier(tmp_path, SIZE)


# The file.


def test_the_file_never_grows_beyond_the_limit(tmp_path: Path) -> None:
    """Pages of many sizes, so that free space is in pieces."""
    file, sizes = tmp_path / layout.FILE, [100, 70_000, 3_000, 300_000, 20_000, 1 << 20]
    for _ in range(2):
        with closing(DiskTier(tmp_path, SIZE)) as tier:
            for number in range(60):
                key = a_key(number)
                write_pages(tier, [(key, bytes([number]) * sizes[number % len(sizes)])])
                assert file.stat().st_size <= SIZE
            assert tier.check().ok
            assert tier.stats().evicted > 0


def test_a_file_without_a_long_enough_gap_evicts_more(tmp_path: Path) -> None:
    """LMDB needs one run of free pages for a page, and finds none for the large one at first."""
    with closing(DiskTier(tmp_path, SIZE)) as tier:
        keys = some_keys(40)
        for start in range(0, 40, 4):
            write(tier, keys[start : start + 4])
        tier.remove(keys[::2])
        large = (a_key(99), b"large" * 300_000)
        assert write_pages(tier, [large]) == [Stored.STORED]
        assert (tmp_path / layout.FILE).stat().st_size <= SIZE
        assert tier.check().ok


def test_a_page_is_on_the_disk_when_put_returns(tmp_path: Path, tier: DiskTier) -> None:
    """Whoever opens the file next sees it, also when this process never closes the store."""
    write(tier, some_keys(3))
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / layout.FILE).write_bytes((tmp_path / layout.FILE).read_bytes())
    with closing(tier), closing(DiskTier(copy, SIZE)) as again:
        assert read(again, some_keys(3)) == [Lookup.HIT] * 3


def test_writers_do_not_hold_up_readers(tier: DiskTier) -> None:
    keys = some_keys(3)
    with closing(tier):
        write(tier, keys)
        writing, may_end = Event(), Event()

        def write_long() -> None:
            with tier._env.write():
                writing.set()
                may_end.wait(JOIN_SECONDS)

        writer = Thread(target=write_long)
        writer.start()
        assert writing.wait(JOIN_SECONDS)
        assert read(tier, keys) == [Lookup.HIT] * 3
        assert tier.exists(keys) == [True] * 3
        assert tier.stats().pages == 3
        assert writer.is_alive()
        may_end.set()
        writer.join(JOIN_SECONDS)


def test_lmdb_giving_up_closes_the_tier_and_lets_go_of_the_file(
    tmp_path: Path, tier: DiskTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tier, some_keys(2))

    class GaveUp:
        def begin(self, **options: object) -> lmdb.Transaction:
            raise lmdb.PanicError("MDB_PANIC")

        close = tier._env._env.close

    monkeypatch.setattr(tier._env, "_env", GaveUp())
    with pytest.raises(TierError) as caught:
        tier.exists(some_keys(1))
    assert caught.value.reason is Reason.IO
    with pytest.raises(TierError, match="after a restart") as caught:
        tier.exists(some_keys(1))
    assert caught.value.reason is Reason.CLOSED
    tier.close()
    with closing(DiskTier(tmp_path, SIZE)) as again:
        assert read(again, some_keys(2)) == [Lookup.HIT] * 2


# Its books, damaged.


@pytest.mark.parametrize("entry", [b"", b"short", bytes(24), b"\xff" * 24, bytes(500)])
def test_a_damaged_index_entry_costs_one_page(tier: DiskTier, entry: bytes) -> None:
    keys = some_keys(3)
    with closing(tier):
        write(tier, keys)
        with tier._env.write() as txn:
            txn.put(keys[1], entry, db=tier._env.tables.index)
        assert read(tier, keys) == [Lookup.HIT, Lookup.CORRUPT, Lookup.HIT]
        assert tier.check().corrupt == [keys[1]]
        assert tier.remove([keys[1]]) == 1
        assert write(tier, keys) == [Stored.PRESENT, Stored.STORED, Stored.PRESENT]
        assert read(tier, keys) == [Lookup.HIT] * 3
        assert tier.stats().bytes <= tier.capacity


def test_a_page_that_the_index_lists_and_that_is_lost_is_corrupt(tier: DiskTier) -> None:
    keys = some_keys(2)
    with closing(tier):
        write(tier, keys)
        with tier._env.write() as txn:
            txn.delete(keys[0], db=tier._env.tables.pages)
        assert read(tier, keys) == [Lookup.CORRUPT, Lookup.HIT]
        report = tier.check(repair=True)
        assert (report.corrupt, len(report.problems)) == ([keys[0]], 1)
        assert tier.check().ok
        assert write(tier, keys) == [Stored.STORED, Stored.PRESENT]


@pytest.mark.parametrize("total", [0, 1 << 63])
def test_a_damaged_total_is_found_and_recounted(tier: DiskTier, total: int) -> None:
    with closing(tier):
        write(tier, some_keys(5))
        right = tier.stats()
        with tier._env.write() as txn:
            txn.put(b"used", layout.pack_u64(total), db=tier._env.tables.meta)
        assert tier.check(repair=True).problems != []
        assert tier.stats() == right
        assert tier.check().ok


@pytest.mark.parametrize("total", [0, SMALL, 1 << 63])
def test_a_damaged_total_does_not_end_writing(tier: DiskTier, total: int) -> None:
    with closing(tier):
        write(tier, some_keys(5))
        with tier._env.write() as txn:
            txn.put(b"used", layout.pack_u64(total), db=tier._env.tables.meta)
        for number in range(100, 160):
            assert write(tier, [a_key(number)]) == [Stored.STORED]
            assert tier.stats().bytes <= tier.capacity


@pytest.mark.parametrize("name", [b"used", b"next"])
def test_a_number_of_another_length_is_a_tier_error(tier: DiskTier, name: bytes) -> None:
    with closing(tier):
        write(tier, some_keys(2))
        with tier._env.write() as txn:
            txn.put(name, b"xyz", db=tier._env.tables.meta)
        with pytest.raises(TierError) as caught:
            write(tier, some_keys(1, start=9))
        assert caught.value.reason is Reason.CORRUPT
        assert read(tier, some_keys(2)) == [Lookup.HIT] * 2


def test_check_tells_of_tables_that_do_not_agree(tier: DiskTier) -> None:
    with closing(tier):
        write(tier, some_keys(3))
        with tier._env.write() as txn, txn.cursor(db=tier._env.tables.order) as cursor:
            assert cursor.first() and cursor.delete()
        (problem,) = tier.check().problems
        assert "'order': 2" in problem
