"""Memory of this process where pages land on their way from the store to the device.

One `Landing` a pool: records of one size, each with the checksum that it had when it came. What a lookup promised
is *leased*: a record with a lease stays, so a load of it needs no tier and cannot miss. Of the others the one that
was asked for longest ago gives way first.

The scheduler's thread asks, and the fetching and loading threads fill and let go; the lock is held for a few
operations on arrays, never while bytes are moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from threading import Lock
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from ..kernels.pages import PageSegments, checksums

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Buffer

    Slots = NDArray[np.int64]

NOWHERE = -1


@dataclass(frozen=True, slots=True)
class Lease:
    """Records that stay until it is given back. Args: age: how often the landing had been emptied."""

    slots: Slots
    age: int


class Landing:
    """The landing of one pool.

    Args:
        pages: records there are.
        page_bytes: of each.
    """

    def __init__(self, pages: int, page_bytes: int) -> None:
        self.records = torch.empty((pages, page_bytes), dtype=torch.uint8)
        self._lock = Lock()
        self._slots: dict[str, int] = {}  # of each page that is here, by SGLang's hash
        self._hashes: list[str] = [""] * pages
        self._keys: list[bytes] = [b""] * pages  # in the store, with which checksums are seeded
        self._sums = np.zeros(pages, np.uint64)
        self._leases = np.zeros(pages, np.int32)
        self._asked = np.full(pages, NOWHERE, np.int64)  # when last; NOWHERE: the record is empty
        self._clock = 0
        self._age = 0

    def __len__(self) -> int:
        """Pages that are here."""
        return len(self._slots)

    @property
    def leased(self) -> int:
        """Records that may not go."""
        return int(np.count_nonzero(self._leases))

    def hold(self, hashes: Sequence[str], *, prefix: bool) -> Lease:
        """Lease what is here of some pages. Costs the caller a twentieth of a microsecond a page.

        Args:
            prefix: only up to the first that is not here.

        Returns:
            Of each page its record; NOWHERE for one that is not here, or lies behind the first such of a `prefix`.
        """
        with self._lock:
            found = map(self._slots.get, hashes, repeat(NOWHERE))
            slots = np.fromiter(found, np.int64, len(hashes))
            missing = slots == NOWHERE
            if prefix and missing.any():
                slots[int(missing.argmax()) :] = NOWHERE
            here = slots[slots != NOWHERE]
            self._leases[here] += 1
            self._clock += 1
            self._asked[here] = self._clock
            return Lease(slots, self._age)

    def let_go(self, lease: Lease) -> None:
        """Give a lease back, once."""
        with self._lock:
            if lease.age == self._age:
                self._leases[lease.slots[lease.slots != NOWHERE]] -= 1

    def take(self, pages: int) -> Lease:
        """Room for new pages, leased: as many as can give way for them."""
        with self._lock:
            free = np.flatnonzero(self._leases == 0)
            if 0 < pages < len(free):
                oldest = np.argpartition(self._asked[free], pages - 1)[:pages]
                free = free[oldest]
            free = free[:pages].astype(np.int64)
            for slot in free.tolist():
                self._forget(slot)
            self._leases[free] += 1
            return Lease(free, self._age)

    def came(
        self, lease: Lease, hashes: Sequence[str], keys: Sequence[bytes], whole: Sequence[bool]
    ) -> Lease:
        """Of records that were taken some now hold pages; the others are free again.

        Args:
            hashes, keys: of the pages, one for each record.
            whole: which of them came.

        Returns:
            The lease of those that came, in order.
        """
        kept = [i for i, is_whole in enumerate(whole) if is_whole]
        slots = lease.slots[kept]
        sums = self._checksums(slots.tolist(), [keys[i] for i in kept])
        with self._lock:
            if lease.age != self._age:
                return Lease(np.empty(0, np.int64), self._age)
            self._leases[lease.slots] -= 1
            self._leases[slots] += 1
            self._clock += 1
            self._asked[slots] = self._clock
            self._sums[slots] = sums
            for slot, i in zip(slots.tolist(), kept, strict=True):
                self._hashes[slot], self._keys[slot] = hashes[i], keys[i]
                self._slots[hashes[i]] = slot
            return Lease(slots, self._age)

    def damaged(self, slots: Slots) -> list[int]:
        """Those of these records that are not what came, and are forgotten now."""
        chosen = [int(slot) for slot in slots if slot != NOWHERE]
        now = self._checksums(chosen, [self._keys[slot] for slot in chosen])
        wrong = [slot for slot, one in zip(chosen, now, strict=True) if self._sums[slot] != one]
        with self._lock:
            for slot in wrong:
                self._forget(slot)
        return wrong

    def places(self, lease: Lease) -> PageSegments:
        """Where the records of a lease lie."""
        start, size = self.records.data_ptr(), self.records.shape[1]
        addresses = [start + int(slot) * size for slot in lease.slots]
        return PageSegments(addresses, [size] * len(addresses), 1, self.records)

    def empty(self) -> None:
        """Forget every page, and every lease."""
        with self._lock:
            self._age += 1
            self._slots.clear()
            self._leases[:] = 0
            self._asked[:] = NOWHERE

    def _forget(self, slot: int) -> None:
        if self._slots.get(self._hashes[slot]) == slot:
            del self._slots[self._hashes[slot]]
        self._asked[slot] = NOWHERE

    def _checksums(self, slots: Sequence[int], keys: Sequence[bytes]) -> list[int]:
        return checksums(keys, [cast("Buffer", self.records[slot].numpy()) for slot in slots])
