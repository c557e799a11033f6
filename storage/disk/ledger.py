"""What the disk tier holds, kept true within one write transaction.

Every change of the tables goes through here, so that `used`, `index`, `order` and `pages` cannot part.
"""

from __future__ import annotations

from collections.abc import Iterable

import lmdb

from .environment import Environment, Tables
from .layout import Entry, cost, pack_sequence, pack_u64, unpack_u64

Value = bytes | bytearray | memoryview


def total(txn: lmdb.Transaction, tables: Tables, name: bytes) -> int:
    """A number as the books have it."""
    data = txn.get(name, db=tables.meta)
    return 0 if data is None else unpack_u64(bytes(data))


def count(txn: lmdb.Transaction, tables: Tables, lmdb_page: int) -> int:
    """Bytes used, as they should be in the books."""
    with txn.cursor(db=tables.index) as cursor:
        entries = cursor.iternext(keys=False, values=True)
        return sum(cost(Entry.unpack(bytes(entry)).length, lmdb_page) for entry in entries)


class Ledger:
    """The books of one write transaction. `close` writes the totals; without it nothing counts."""

    def __init__(self, env: Environment, txn: lmdb.Transaction) -> None:
        self._page = env.page
        self._tables: Tables = env.tables
        self._txn = txn
        self.used = total(txn, self._tables, b"used")
        self._next = total(txn, self._tables, b"next")
        self.evicted = 0

    def close(self) -> None:
        self._txn.put(b"used", pack_u64(self.used), db=self._tables.meta)
        self._txn.put(b"next", pack_u64(self._next), db=self._tables.meta)

    def has(self, key: bytes) -> bool:
        return self._txn.get(key, db=self._tables.index) is not None

    def add(self, key: bytes, data: Value, checksum: int) -> None:
        """The caller guarantees that the key is not here. It becomes the most recent."""
        entry = Entry(self._take_sequence(), len(data), checksum)
        self._txn.put(key, data, db=self._tables.pages)
        self._txn.put(key, entry.pack(), db=self._tables.index)
        self._txn.put(pack_sequence(entry.sequence), key, db=self._tables.order)
        self.used += cost(len(data), self._page)

    def recount(self) -> None:
        """Put the total right, after damage."""
        self.used = count(self._txn, self._tables, self._page)

    def touch_all(self, keys: Iterable[bytes]) -> None:
        """Make them the most recent, the last one most of all; those that are here."""
        for key in keys:
            self._touch(key)

    def _touch(self, key: bytes) -> None:
        entry = self._entry(key)
        if entry is None:
            return
        self._txn.delete(pack_sequence(entry.sequence), db=self._tables.order)
        moved = entry._replace(sequence=self._take_sequence())
        self._txn.put(key, moved.pack(), db=self._tables.index)
        self._txn.put(pack_sequence(moved.sequence), key, db=self._tables.order)

    def remove(self, key: bytes) -> bool:
        """Forget a page; whether it was here."""
        entry = self._entry(key)
        if entry is None:
            return False
        self._txn.delete(key, db=self._tables.pages)
        self._txn.delete(key, db=self._tables.index)
        self._txn.delete(pack_sequence(entry.sequence), db=self._tables.order)
        self.used = max(0, self.used - cost(entry.length, self._page))  # a length may be damaged
        return True

    def evict_to(self, limit: int, keep: frozenset[bytes] = frozenset()) -> bool:
        """Drop the oldest pages until at most `limit` bytes are used.

        False when it would have to drop one of `keep`; what was dropped before that stays dropped.
        """
        while self.used > limit:
            with self._txn.cursor(db=self._tables.order) as oldest:
                if not oldest.first():
                    self.used = 0  # whatever a damaged total said
                    return limit >= 0
                if (key := bytes(oldest.value())) in keep:
                    return False
                oldest.delete()
            self.evicted += self.remove(key)
        return True

    def _entry(self, key: bytes) -> Entry | None:
        data = self._txn.get(key, db=self._tables.index)
        return None if data is None else Entry.unpack(data)

    def _take_sequence(self) -> int:
        self._next += 1
        return self._next
