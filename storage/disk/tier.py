"""The disk tier: pages as values in LMDB, least recently written or used out first.

It outlives the process and the machine: a page that `put` reported is on the disk, and a process that
dies in the middle of a write leaves the file as it was before. All processes of a node that open one
directory share its pages and its limit.

The limit holds twice: pages are evicted at `USABLE` of it, and LMDB never lets the file grow beyond it.

Lookups go through LMDB's multi-key calls: one key at a time, each call would give the GIL away and wait
up to 5 ms to get it back from a busy scheduler (2.1 ms a key was measured, 5 us in one call).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate, islice, takewhile
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import lmdb

from ...errors import ConfigError, Reason, TierError
from ...kernels.pages import PageSegments, gather
from ...kernels.pages import checksums as checksums_of
from ..base import CheckReport, Lookup, Stored, Tier, TierStats, require_equally_many
from ..groups import groups
from ..record import deliver
from .environment import Environment
from .layout import Entry, cost
from .ledger import Ledger, Value, count, total

USABLE = 0.8  # of the file; the rest is what LMDB needs to write new trees before it frees the old
GROUP_BYTES = 64 << 20  # pages written in one transaction, so with one sync
SMALLEST_SIZE = 1 << 20
PAGES_TO_FIT = 4  # so many must fit, or every write would evict the page written before it
NO_ROOM_SECONDS = 60.0  # between two attempts to make room where evicting did not
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
        ConfigError: the directory or the size cannot be used. No file of anybody else was changed.
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
        self._no_room_until = 0.0  # on time.monotonic
        with ExitStack() as undo:
            undo.callback(self._env.close)
            try:
                if self._env.alone:
                    self._shrink(size)
            except TierError as error:
                raise ConfigError("disk.size", _why_not_smaller(self._env.file, error)) from error
            self._env.share()
            undo.pop_all()
        self.capacity = min(self.capacity, int(self._env.map_size * USABLE))

    def _shrink(self, size: int) -> None:
        """If the limit was lowered: drop the oldest pages and rewrite the file without them."""
        if self.stats().bytes > self.capacity:
            with self._ledger() as ledger:
                ledger.evict_to(self.capacity)
        self._env.resize(size)

    def fits(self, page_bytes: int) -> bool:
        return cost(page_bytes, self._env.page) * PAGES_TO_FIT <= self.capacity

    def exists(self, keys: Sequence[bytes]) -> list[bool]:
        with self._env.read() as txn:
            here = _get_many(txn, self._env.tables.index, keys)
            return [key in here for key in keys]

    def get(self, keys: Sequence[bytes], into: PageSegments) -> list[Lookup]:
        require_equally_many(keys, into)
        with self._env.read() as txn:
            outcome = deliver(keys, self._find(txn, keys), into)
        self._touch([key for key, o in zip(keys, outcome, strict=True) if o is Lookup.HIT])
        return outcome

    def _find(self, txn: lmdb.Transaction, keys: Sequence[bytes]) -> dict[bytes, _Record]:
        """What lies under the keys, unverified, in the file's memory.

        A page that is lost, or not as long as the index says, is an empty one: a damaged length could
        reach beyond the file, where reading ends the process.
        """
        index = _get_many(txn, self._env.tables.index, keys)
        data = _get_many(txn, self._env.tables.pages, [key for key in keys if key in index])
        found = {}
        for key, packed in index.items():
            entry, value = Entry.unpack(packed), data.get(key, b"")
            found[key] = _Record(key, value if len(value) == entry.length else b"", entry.checksum)
        return found

    def put(
        self, keys: Sequence[bytes], pages: PageSegments, checksums: Sequence[int] | None = None
    ) -> list[Stored]:
        require_equally_many(keys, pages, checksums)
        sizes = pages.page_bytes()
        before = self.exists(keys)
        self._touch([key for key, here in zip(keys, before, strict=True) if here])
        absent = [i for i, here in enumerate(before) if not here]
        if not absent:
            return [Stored.PRESENT] * len(keys)
        chain = dict(zip(keys, sizes, strict=True))
        parts = list(groups(absent, sizes, GROUP_BYTES))
        for part in parts:
            copies = self._allocate([sizes[i] for i in part])
            computed = gather([keys[i] for i in part], pages.select(part), copies)
            self._write(
                [
                    _Record(keys[i], data, checksum)
                    for i, data, checksum in zip(part, copies, computed, strict=True)
                    if checksums is None or checksums[i] == checksum
                ],
                chain,
            )
        after = self.exists(keys)
        if len(parts) > 1:  # or the head of the first part would be older than the last part's tail
            self._touch([key for key, here in zip(keys, after, strict=True) if here])
        return [
            Stored.REFUSED if not is_here else Stored.PRESENT if was_here else Stored.STORED
            for was_here, is_here in zip(before, after, strict=True)
        ]

    def _allocate(self, sizes: Sequence[int]) -> list[bytearray]:
        try:
            return [bytearray(size) for size in sizes]
        except MemoryError as error:
            raise TierError(self.name, Reason.FULL, "the machine has no memory left") from error

    def _write(self, records: list[_Record], chain: Mapping[bytes, int]) -> None:
        """Write in one transaction, again with more room when there is none."""
        if time.monotonic() < self._no_room_until:
            raise TierError(self.name, Reason.FULL, "there was no room a moment ago")
        touched = self._take_touched()
        limit = self.capacity
        for attempt in range(_ROUNDS):
            try:
                with self._ledger() as ledger:
                    ledger.touch_all(touched)
                    _insert(ledger, records, chain, limit, self._env.page)
                return
            except TierError as error:
                if error.reason is not Reason.FULL:
                    raise
                if attempt == _ROUNDS - 1:  # evicting does not help; do not empty the store for it
                    self._no_room_until = time.monotonic() + NO_ROOM_SECONDS
                    raise
            self._env.reap_readers()  # a killed process still holds on to what was freed since
            limit = limit * 3 // 4
            with self._ledger() as ledger:
                ledger.touch_all(touched)
                touched = []
                _evict_for(ledger, records, chain, limit, self._env.page)
            with self._ledger():
                pass  # what a transaction frees, LMDB uses in the second one after it
        raise AssertionError("unreachable: the last round returns or raises")

    @contextmanager
    def _ledger(self) -> Iterator[Ledger]:
        """The books of one write transaction; what is done to them counts when the block ends."""
        with self._env.write() as txn:
            ledger = Ledger(self._env, txn)
            yield ledger
            ledger.close()
        self._evicted += ledger.evicted

    def remove(self, keys: Sequence[bytes]) -> int:
        with self._ledger() as ledger:
            return sum(ledger.remove(key) for key in keys)

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
            used = total(txn, tables, b"used")
            pages = int(txn.stat(tables.index)["entries"])
        return TierStats(self.name, pages, used, self.capacity, self._evicted)

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
            self._recount()
        return CheckReport(whole, corrupt, problems)

    def _recount(self) -> None:
        with self._ledger() as ledger:
            ledger.recount()

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
            if keys[-1] < after:  # a damaged tree leads backwards, and would for ever
                raise TierError(self.name, Reason.CORRUPT, "the index is out of order")
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
            used = total(txn, tables, b"used")
            counted = count(txn, tables, self._env.page)
        problems = []
        if len(set(entries.values())) != 1:
            problems.append(f"the tables hold different numbers of pages: {entries}")
        if used != counted:
            problems.append(f"the pages come to {counted} bytes, but {used} are counted as used")
        return problems

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


def _why_not_smaller(file: Path, error: TierError) -> str:
    return (
        f"{file} could not be brought below it ({error.detail}); give it as much as before, or move "
        "the file away or delete it"
    )


def _insert(
    ledger: Ledger,
    records: list[_Record],
    chain: Mapping[bytes, int],
    limit: int,
    lmdb_page: int,
) -> None:
    """Insert those that fit, evicting for them what is oldest, but no page for its descendants.

    The last page of the chain is inserted first, so that the head is the most recent.

    Args:
        chain: keys and lengths of all pages of the batch, of which `records` are some.
    """
    keep, fresh, needed = _plan(ledger, records, chain, limit, lmdb_page)
    ledger.evict_to(limit - needed, keep)
    fitting = _how_many_fit((len(r.data) for r in fresh), limit - ledger.used, lmdb_page)
    for record in reversed(fresh[:fitting]):
        ledger.add(*record)


def _evict_for(
    ledger: Ledger,
    records: list[_Record],
    chain: Mapping[bytes, int],
    limit: int,
    lmdb_page: int,
) -> None:
    """Evict what `_insert` would, and at least a quarter of all: the disk has less room than `limit`."""
    keep, _, needed = _plan(ledger, records, chain, limit, lmdb_page)
    ledger.evict_to(min(limit - needed, ledger.used * 3 // 4), keep)


def _plan(
    ledger: Ledger,
    records: list[_Record],
    chain: Mapping[bytes, int],
    limit: int,
    lmdb_page: int,
) -> tuple[frozenset[bytes], list[_Record], int]:
    """Which pages of the chain are to be here, which of them are not yet, and the bytes of those."""
    keep = frozenset(islice(chain, _how_many_fit(chain.values(), limit, lmdb_page)))
    fresh = {r.key: r for r in records if r.key in keep and not ledger.has(r.key)}
    needed = sum(cost(len(record.data), lmdb_page) for record in fresh.values())
    return keep, list(fresh.values()), needed


def _how_many_fit(sizes: Iterable[int], limit: int, lmdb_page: int) -> int:
    """How many of the first pages fit together."""
    totals = accumulate(cost(size, lmdb_page) for size in sizes)
    return sum(1 for _ in takewhile(lambda total: total <= limit, totals))


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
