"""The disk tier: pages as values in LMDB, least recently written or used out first.

It outlives the process and the machine: a page that `put` reported is on the disk, and a process that
dies in the middle of a write leaves the file as it was before. All processes of a node that open one
directory share its pages and its limit.

The limit holds twice: pages are evicted at `USABLE` of it, and LMDB never lets the file grow beyond it.

Lookups go through LMDB's multi-key calls: one key at a time, each call would give the GIL away and wait
up to 5 ms to get it back from a busy scheduler (2.1 ms a key was measured, 5 us in one call).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import lmdb

from ...errors import ConfigError, Reason, TierError
from ...kernels.pages import PageSegments, gather, scatter
from ...kernels.pages import checksums as checksums_of
from ..base import CheckReport, Lookup, Stored, Tier, TierStats
from ..groups import groups
from .environment import Environment
from .layout import Entry, cost, unpack_u64
from .ledger import Ledger, Value

USABLE = 0.8  # of the file; the rest is what LMDB needs to write new trees before it frees the old
GROUP_BYTES = 64 << 20  # pages written in one transaction, so with one sync
SMALLEST_SIZE = 1 << 20
PAGES_TO_FIT = 4  # so many must fit, or every write would evict the page written before it
_ROUNDS = 4  # attempts at one group when LMDB finds no run of free pages long enough
_TOUCHED = 1 << 16  # uses remembered between two writes
_CHECKED_AT_ONCE = 64
_CLEARED_AT_ONCE = 4096


class _Record(NamedTuple):
    key: bytes
    data: Value
    checksum: int


class DiskTier(Tier):
    """At most `size` bytes of file in the directory `path`; `capacity` is what pages may use of it.

    Raises:
        ConfigError: the directory or the size cannot be used. Nothing that was there has been changed.
    """

    def __init__(self, path: Path, size: int, name: str = "disk") -> None:
        if size < SMALLEST_SIZE:
            raise ConfigError("disk.size", f"{size} bytes; the least is {SMALLEST_SIZE}")
        self.name = name
        self.capacity = int(size * USABLE)
        self._env = Environment(path, size, name=name)
        self._touched: dict[bytes, None] = {}  # keys used since the last write, latest last
        self._touched_lock = Lock()
        self._evicted = 0
        if self._env.alone and self._env.file.stat().st_size > size:
            self._shrink(size)
        self._env.share()
        self.capacity = min(self.capacity, int(self._env.map_size * USABLE))

    def _shrink(self, size: int) -> None:
        """The limit was lowered: drop the oldest pages and rewrite the file without them."""
        with self._env.write() as txn:
            ledger = Ledger(self._env, txn)
            ledger.evict_to(self.capacity)
            ledger.close()
        self._env.rewrite(size)

    def fits(self, page_bytes: int) -> bool:
        return cost(page_bytes, self._env.page) * PAGES_TO_FIT <= self.capacity

    def exists(self, keys: Sequence[bytes]) -> list[bool]:
        with self._env.read() as txn:
            here = _get_many(txn, self._env.tables.index, keys)
            return [key in here for key in keys]

    def get(self, keys: Sequence[bytes], into: PageSegments) -> list[Lookup]:
        outcome = [Lookup.MISS] * len(keys)
        with self._env.read() as txn:
            found = self._find(txn, keys)
            here = [i for i, key in enumerate(keys) if key in found]
            whole = scatter(
                [keys[i] for i in here],
                [found[keys[i]].data for i in here],
                [found[keys[i]].checksum for i in here],
                into.select(here),
            )
        for i, ok in zip(here, whole, strict=True):
            outcome[i] = Lookup.HIT if ok else Lookup.CORRUPT
        self._touch([keys[i] for i, ok in zip(here, whole, strict=True) if ok])
        return outcome

    def _find(self, txn: lmdb.Transaction, keys: Sequence[bytes]) -> dict[bytes, _Record]:
        """What lies under the keys, unverified, in the file's memory. A lost page is an empty one."""
        index = _get_many(txn, self._env.tables.index, keys)
        data = _get_many(txn, self._env.tables.pages, [key for key in keys if key in index])
        return {
            key: _Record(key, data.get(key, b""), Entry.unpack(entry).checksum)
            for key, entry in index.items()
        }

    def put(
        self, keys: Sequence[bytes], pages: PageSegments, checksums: Sequence[int] | None = None
    ) -> list[Stored]:
        sizes = pages.page_bytes()
        if not len(keys) == len(sizes) == len(sizes if checksums is None else checksums):
            raise ValueError("keys, pages and checksums must be equally many")
        present = self.exists(keys)
        self._touch([key for key, here in zip(keys, present, strict=True) if here])
        outcome = [Stored.PRESENT if here else Stored.REFUSED for here in present]
        for group in groups([i for i, here in enumerate(present) if not here], sizes, GROUP_BYTES):
            copies = [bytearray(sizes[i]) for i in group]
            computed = gather([keys[i] for i in group], pages.select(group), copies)
            records = [
                _Record(keys[i], data, checksum)
                for i, data, checksum in zip(group, copies, computed, strict=True)
                if checksums is None or checksums[i] == checksum
            ]
            stored = self._write(records)
            for i in group:
                outcome[i] = Stored.STORED if keys[i] in stored else Stored.REFUSED
        return outcome

    def _write(self, records: list[_Record]) -> set[bytes]:
        """Write in one transaction, again with more room when there is none; which keys are here now."""
        touched = self._take_touched()
        limit = self.capacity
        for attempt in range(_ROUNDS):
            try:
                with self._env.write() as txn:
                    ledger = Ledger(self._env, txn)
                    for key in touched:
                        ledger.touch(key)
                    stored = _insert(ledger, records, limit, self._env.page)
                    ledger.close()
                self._evicted += ledger.evicted
                return stored
            except TierError as error:
                if error.reason is not Reason.FULL or attempt == _ROUNDS - 1:
                    raise
            limit = limit * 3 // 4
            self._evict_to(limit)
        raise AssertionError("unreachable: the last round returns or raises")

    def _evict_to(self, limit: int) -> None:
        with self._env.write() as txn:
            ledger = Ledger(self._env, txn)
            ledger.evict_to(limit)
            ledger.close()
        self._evicted += ledger.evicted

    def remove(self, keys: Sequence[bytes]) -> int:
        with self._env.write() as txn:
            ledger = Ledger(self._env, txn)
            removed = sum(ledger.remove(key) for key in keys)
            ledger.close()
        return removed

    def clear(self, namespace: bytes) -> int:
        with self._env.read() as txn, txn.cursor(db=self._env.tables.index) as cursor:
            doomed = list(_with_prefix(cursor, namespace))
        removed = 0
        for start in range(0, len(doomed), _CLEARED_AT_ONCE):
            removed += self.remove(doomed[start : start + _CLEARED_AT_ONCE])
        return removed

    def stats(self) -> TierStats:
        tables = self._env.tables
        with self._env.read() as txn:
            used = txn.get(b"used", db=tables.meta)
            pages = int(txn.stat(tables.index)["entries"])
        in_bytes = 0 if used is None else unpack_u64(bytes(used))
        return TierStats(self.name, pages, in_bytes, self.capacity, self._evicted)

    def check(self, *, repair: bool = False) -> CheckReport:
        corrupt: list[bytes] = []
        whole = 0
        for keys in self._batches():
            bad = self._corrupt_among(keys)
            whole += len(keys) - len(bad)
            corrupt += bad
        problems = self._count_problems()
        if repair:
            self.remove(corrupt)
        return CheckReport(whole, corrupt, problems)

    def _batches(self) -> Iterator[list[bytes]]:
        """All keys of the index, some at a time, each batch in a transaction of its own."""
        after = b""
        while True:
            with self._env.read() as txn, txn.cursor(db=self._env.tables.index) as cursor:
                if not cursor.set_range(after):
                    return
                keys = [
                    bytes(key) for key in islice(cursor.iternext(values=False), _CHECKED_AT_ONCE)
                ]
            yield keys
            after = keys[-1] + b"\0"

    def _corrupt_among(self, keys: list[bytes]) -> list[bytes]:
        with self._env.read() as txn:
            records = list(self._find(txn, keys).values())
            actual = checksums_of([r.key for r in records], [r.data for r in records])
            return [
                record.key
                for record, checksum in zip(records, actual, strict=True)
                if record.checksum != checksum
            ]

    def _count_problems(self) -> list[str]:
        tables = self._env.tables
        with self._env.read() as txn:
            entries = {
                name: int(txn.stat(table)["entries"])
                for name, table in (
                    ("index", tables.index),
                    ("order", tables.order),
                    ("pages", tables.pages),
                )
            }
        if len(set(entries.values())) == 1:
            return []
        return [f"the tables hold different numbers of pages: {entries}"]

    def close(self) -> None:
        self._env.close()

    def _touch(self, keys: Sequence[bytes]) -> None:
        """Remember a use of each; the first of a chain is the latest, so tails go first."""
        with self._touched_lock:
            for key in reversed(keys):
                self._touched.pop(key, None)
                self._touched[key] = None
            for key in list(islice(self._touched, max(0, len(self._touched) - _TOUCHED))):
                del self._touched[key]

    def _take_touched(self) -> list[bytes]:
        with self._touched_lock:
            touched, self._touched = list(self._touched), {}
        return touched


def _insert(ledger: Ledger, records: list[_Record], limit: int, lmdb_page: int) -> set[bytes]:
    """Insert those that fit, evicting for them; which keys are here now.

    The last page of the chain is inserted first, so that the head is the most recent.
    """
    batch = frozenset(record.key for record in records)
    fitting = _longest_head(records, limit, lmdb_page)
    stored = set()
    for record in reversed(fitting):
        if not ledger.has(record.key):
            if not ledger.evict_to(limit - cost(len(record.data), lmdb_page), keep=batch):
                break
            ledger.add(*record)
        stored.add(record.key)
    return stored


def _longest_head(records: list[_Record], limit: int, lmdb_page: int) -> list[_Record]:
    """As many of the first records as fit together."""
    total = 0
    for n, record in enumerate(records):
        total += cost(len(record.data), lmdb_page)
        if total > limit:
            return records[:n]
    return records


def _get_many(
    txn: lmdb.Transaction, table: lmdb._Database, keys: Sequence[bytes]
) -> dict[bytes, Value]:
    with txn.cursor(db=table) as cursor:
        return {bytes(key): value for key, value in cursor.getmulti(keys)}


def _with_prefix(cursor: lmdb.Cursor, prefix: bytes) -> Iterator[bytes]:
    if not cursor.set_range(prefix):
        return
    for key in cursor.iternext(keys=True, values=False):
        if not bytes(key).startswith(prefix):
            return
        yield bytes(key)
