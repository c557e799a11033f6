"""The plain tier: a dictionary. The model the other tiers are tested against, and the how-to.

To write a tier: subclass `Tier`, keep the obligations of base.py, and inherit
`lmcache_sglang.testing.tier_suite.TierSuite` in its test. This one keeps them in the simplest way:
one lock around everything, records as immutable bytes, and no eviction (a full one refuses).
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import NamedTuple

from ..errors import Reason, TierError
from ..kernels.pages import PageSegments, gather
from ..kernels.pages import checksums as checksums_of
from .base import (
    NO_LIMITS,
    CheckReport,
    Limits,
    Lookup,
    Stored,
    Tier,
    TierStats,
    require_equally_many,
)
from .record import deliver


class _Page(NamedTuple):
    data: bytes
    checksum: int


class MemoryTier(Tier):
    """Pages in a dictionary, at most `capacity` bytes of them."""

    def __init__(self, capacity: int, name: str = "memory") -> None:
        self.name = name
        self.capacity = capacity
        self._records: dict[bytes, _Page] | None = {}
        self._lock = Lock()

    def fits(self, page_bytes: int) -> bool:
        return page_bytes <= self.capacity

    def exists(self, keys: Sequence[bytes]) -> list[bool]:
        with self._lock:
            records = self._open()
            return [key in records for key in keys]

    def get(
        self, keys: Sequence[bytes], into: PageSegments, limits: Limits = NO_LIMITS
    ) -> list[Lookup]:
        require_equally_many(keys, into)
        with self._lock:
            records = self._open()
            found = {key: records[key] for key in keys if key in records}
        return deliver(keys, found, into)

    def put(
        self,
        keys: Sequence[bytes],
        pages: PageSegments,
        checksums: Sequence[int] | None = None,
        parents: Sequence[bytes] | None = None,
        limits: Limits = NO_LIMITS,
    ) -> list[Stored]:
        require_equally_many(keys, pages, checksums, parents)
        copies = [bytearray(n) for n in pages.page_bytes()]
        computed = gather(keys, pages, copies)
        expected = computed if checksums is None else checksums
        with self._lock:
            return [
                self._put(key, bytes(copy), checksum) if checksum == wanted else Stored.DAMAGED
                for key, copy, checksum, wanted in zip(
                    keys, copies, computed, expected, strict=True
                )
            ]

    def _put(self, key: bytes, data: bytes, checksum: int) -> Stored:
        records = self._open()
        if key in records:
            return Stored.PRESENT if len(records[key].data) == len(data) else Stored.REFUSED
        if self._used() + len(data) > self.capacity:
            return Stored.REFUSED
        records[key] = _Page(data, checksum)
        return Stored.STORED

    def remove(self, keys: Sequence[bytes]) -> int:
        with self._lock:
            records = self._open()
            return sum(records.pop(key, None) is not None for key in keys)

    def clear(self, namespace: bytes) -> int:
        with self._lock:
            doomed = [key for key in self._open() if key.startswith(namespace)]
        return self.remove(doomed)

    def stats(self) -> TierStats:
        with self._lock:
            return TierStats(self.name, len(self._open()), self._used(), self.capacity)

    def check(self, *, repair: bool = False) -> CheckReport:
        with self._lock:
            records = dict(self._open())
        found = checksums_of(list(records), [data for data, _ in records.values()])
        corrupt = [
            key
            for (key, (_, checksum)), actual in zip(records.items(), found, strict=True)
            if checksum != actual
        ]
        if repair:
            self.remove(corrupt)
        return CheckReport(len(records) - len(corrupt), corrupt)

    def close(self) -> None:
        with self._lock:
            self._records = None

    def _used(self) -> int:
        return sum(len(data) for data, _ in self._open().values())

    def _open(self) -> dict[bytes, _Page]:
        if self._records is None:
            raise TierError(self.name, Reason.CLOSED, "it was closed")
        return self._records
