"""What the disk tier holds, kept true within one write transaction.

Every change of the tables goes through here, so that `used`, `index`, `order` and `pages` cannot part.
"""

from __future__ import annotations

import lmdb

from .environment import Environment, Tables
from .layout import Entry, cost, pack_sequence, pack_u64, unpack_u64

Value = bytes | bytearray | memoryview


class Ledger:
    """The books of one write transaction. `close` writes the totals; without it nothing counts."""

    def __init__(self, env: Environment, txn: lmdb.Transaction) -> None:
        self._page = env.page
        self._tables: Tables = env.tables
        self._txn = txn
        self.used = self._total(b"used")
        self._next = self._total(b"next")
        self.evicted = 0

    def _total(self, name: bytes) -> int:
        data = self._txn.get(name, db=self._tables.meta)
        return 0 if data is None else unpack_u64(data)

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

    def touch(self, key: bytes) -> None:
        """Make it the most recent, if it is here."""
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
        self.used -= cost(entry.length, self._page)
        return True

    def evict_to(self, limit: int, keep: frozenset[bytes] = frozenset()) -> bool:
        """Drop the oldest pages until at most `limit` bytes are used.

        False when it would have to drop one of `keep`; what was dropped before that stays dropped.
        """
        while self.used > limit:
            with self._txn.cursor(db=self._tables.order) as oldest:
                if not oldest.first() or (key := bytes(oldest.value())) in keep:
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
