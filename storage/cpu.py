"""The CPU tier: pages in this process's memory, least recently used out first.

The lock guards the table only; bytes are copied outside it. A record is never written to again once it
is in the table, and an evicted one lives for as long as a reader or a lease still refers to it, so a
copy in flight cannot see a later page's bytes.

It does not outlive the process: the tier below does that.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import ExitStack
from threading import Lock
from typing import NamedTuple

from ..errors import Reason, TierError
from ..kernels.pages import PageSegments, gather
from ..kernels.pages import checksums as checksums_of
from .base import (
    CheckReport,
    Lease,
    Lookup,
    Stored,
    TierStats,
    UpperTier,
    require_equally_many,
)
from .record import deliver


class _Record(NamedTuple):
    data: bytearray
    checksum: int


class CpuTier(UpperTier):
    """At most `capacity` bytes of pages in memory that this process owns."""

    def __init__(self, capacity: int, name: str = "cpu") -> None:
        self.name = name
        self.capacity = capacity
        self._lock = Lock()
        self._records: OrderedDict[bytes, _Record] = OrderedDict()  # most recently used last
        self._used = 0  # bytes in the table and reserved for pages on their way into it
        self._evicted = 0
        self._closed = False

    def fits(self, page_bytes: int) -> bool:
        return page_bytes <= self.capacity

    def exists(self, keys: Sequence[bytes]) -> list[bool]:
        with self._lock:
            self._require_open()
            return [key in self._records for key in keys]

    def get(self, keys: Sequence[bytes], into: PageSegments) -> list[Lookup]:
        require_equally_many(keys, into)
        with self._lock:
            self._require_open()
            found = {key: self._records[key] for key in keys if key in self._records}
            self._touch([key for key in keys if key in found])
        return deliver(keys, found, into)

    def put(
        self, keys: Sequence[bytes], pages: PageSegments, checksums: Sequence[int] | None = None
    ) -> list[Stored]:
        require_equally_many(keys, pages, checksums)
        outcome = self._reserve(keys, pages.page_bytes())
        fresh = [i for i, stored in enumerate(outcome) if stored is Stored.STORED]
        records = self._copy([keys[i] for i in fresh], pages.select(fresh))
        with self._lock:
            for i, record in zip(fresh, records, strict=True):
                if checksums is not None and checksums[i] != record.checksum:
                    self._used -= len(record.data)
                    outcome[i] = Stored.REFUSED
                else:
                    outcome[i] = self._publish(keys[i], record)
            here = [key for key in keys if key in self._records]
            self._touch(here)
        came = frozenset(here)  # also from another thread, or from its other place in the batch
        return [
            Stored.PRESENT if stored is Stored.REFUSED and key in came else stored
            for key, stored in zip(keys, outcome, strict=True)
        ]

    def _reserve(self, keys: Sequence[bytes], sizes: Sequence[int]) -> list[Stored]:
        """Make room for those not here yet. STORED means: room is reserved, bytes are to follow."""
        outcome = []
        ancestors = set[bytes]()
        with self._lock:
            self._require_open()
            self._touch([key for key in keys if key in self._records])  # not to be evicted below
            for key, size in zip(keys, sizes, strict=True):
                if key in self._records:
                    outcome.append(Stored.PRESENT)
                elif self._make_room(size, ancestors):
                    outcome.append(Stored.STORED)
                else:
                    outcome.append(Stored.REFUSED)
                ancestors.add(key)
        return outcome

    def _make_room(self, size: int, keep: set[bytes]) -> bool:
        """Reserve `size` bytes, evicting what is used least, but nothing of `keep`."""
        if size > self.capacity:
            return False
        while self._used + size > self.capacity:
            oldest = next(iter(self._records), None)
            if oldest is None or oldest in keep:
                return False
            self._forget(oldest)
            self._evicted += 1
        self._used += size
        return True

    def _copy(self, keys: Sequence[bytes], pages: PageSegments) -> list[_Record]:
        """Records of pages whose room is reserved; gives the room back when that fails."""
        sizes = pages.page_bytes()
        with ExitStack() as undo:
            undo.callback(self._give_back, sum(sizes))
            try:
                copies = [bytearray(size) for size in sizes]
            except MemoryError as error:
                detail = "the machine has no memory left"
                raise TierError(self.name, Reason.FULL, detail) from error
            records = [*map(_Record, copies, gather(keys, pages, copies))]
            undo.pop_all()
        return records

    def _give_back(self, reserved: int) -> None:
        with self._lock:
            self._used -= reserved

    def _publish(self, key: bytes, record: _Record) -> Stored:
        """Put a record whose bytes are reserved into the table, unless another thread was first."""
        if key in self._records or self._closed:
            self._used -= len(record.data)
            return Stored.REFUSED if self._closed else Stored.PRESENT
        self._records[key] = record
        return Stored.STORED

    def _touch(self, keys: Sequence[bytes]) -> None:
        """Count a use of each. The first of a chain ends up most recent, so tails go first."""
        for key in reversed(keys):
            self._records.move_to_end(key)

    def _forget(self, key: bytes) -> bool:
        record = self._records.pop(key, None)
        if record is None:
            return False
        self._used -= len(record.data)
        return True

    def lease(self, keys: Sequence[bytes]) -> Lease:
        with self._lock:
            self._require_open()
            held = [(key, self._records[key]) for key in keys if key in self._records]
        return Lease(
            [key for key, _ in held],
            [record.data for _, record in held],
            [record.checksum for _, record in held],
        )

    def remove(self, keys: Sequence[bytes]) -> int:
        with self._lock:
            self._require_open()
            return sum(self._forget(key) for key in keys)

    def clear(self, namespace: bytes) -> int:
        with self._lock:
            self._require_open()
            return sum(
                self._forget(key) for key in list(self._records) if key.startswith(namespace)
            )

    def stats(self) -> TierStats:
        with self._lock:
            self._require_open()
            return TierStats(
                self.name, len(self._records), self._used, self.capacity, self._evicted
            )

    def check(self, *, repair: bool = False) -> CheckReport:
        with self._lock:
            self._require_open()
            records = dict(self._records)
        actual = checksums_of(list(records), [record.data for record in records.values()])
        corrupt = [
            key
            for (key, record), checksum in zip(records.items(), actual, strict=True)
            if record.checksum != checksum
        ]
        if repair:
            self.remove(corrupt)
        return CheckReport(len(records) - len(corrupt), corrupt)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._records.clear()
            self._used = 0

    def _require_open(self) -> None:
        if self._closed:
            raise TierError(self.name, Reason.CLOSED, "it was closed")
