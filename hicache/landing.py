"""Memory of this process where pages land on their way from the store to the device.

One `Landing` a pool: records of one size, each with the checksum that it had when it came. What a lookup promised
is *leased*: a record with a lease stays, so a load of it needs no tier and cannot miss. Of the others the one that
was let go longest ago gives way first, and of one prompt the end before the beginning (idle.py).

A lease names the *generation* of each of its records, which changes when a record is given to another page, and the
*age* of the landing, which changes when it is emptied. So whoever has copied a record knows whether it was the page
that was promised, whatever happened to the leases meanwhile.

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
from .idle import NOWHERE, Idle

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Buffer

    Slots = NDArray[np.int64]

__all__ = ["NOWHERE", "Landing", "Lease"]


@dataclass(frozen=True, slots=True)
class Lease:
    """Records that stay until it is given back.

    Attributes:
        slots: the records; NOWHERE for a page that has none.
        generations: of each of them; of NOWHERE any number.
        age: how often the landing had been emptied.
    """

    slots: Slots
    generations: Slots
    age: int


class Landing:
    """The landing of one pool.

    Args:
        pages: records there are.
        page_bytes: of each.
        pinned: so that a GPU reads them where they lie.
    """

    def __init__(self, pages: int, page_bytes: int, *, pinned: bool = False) -> None:
        self.records = torch.empty((pages, page_bytes), dtype=torch.uint8, pin_memory=pinned)
        self._lock = Lock()
        self._slots: dict[str, int] = {}  # of each page that is here, by SGLang's hash
        self._hashes: list[str] = [""] * pages
        self._keys: list[bytes] = [b""] * pages  # in the store, with which checksums are seeded
        self._sums = np.zeros(pages, np.uint64)
        self._generations = np.zeros(pages, np.int64)
        self._leases = np.zeros(pages, np.int32)
        self._leased = 0  # records with any
        self._idle = Idle(pages)  # those without a lease
        self._age = 0

    def __len__(self) -> int:
        """Pages that are here."""
        return len(self._slots)

    @property
    def leased(self) -> int:
        """Records that may not go."""
        return self._leased

    @property
    def room(self) -> int:
        """Records that may go."""
        return len(self._leases) - self._leased

    @property
    def pages(self) -> int:
        """Records that there are."""
        return len(self._leases)

    def hold(self, hashes: Sequence[str], *, prefix: bool) -> Lease:
        """Lease what is here of some pages, none of which is named twice.

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
            self._leased += int(np.count_nonzero(self._leases[here] == 0))
            self._leases[here] += 1
            self._idle.remove(here)
            return self._lease(slots)

    def let_go(self, lease: Lease) -> None:
        """Give a lease back, once."""
        with self._lock:
            if lease.age == self._age:
                self._give_back(lease.slots[lease.slots != NOWHERE])

    def take(self, pages: int) -> Lease:
        """Room for new pages, leased: as many as can give way for them."""
        with self._lock:
            slots = self._idle.take(pages)
            for slot in slots.tolist():
                self._forget(slot)
            self._leases[slots] = 1
            self._leased += len(slots)
            return self._lease(slots)

    def came(
        self, lease: Lease, hashes: Sequence[str], keys: Sequence[bytes], whole: Sequence[bool]
    ) -> Lease:
        """Of records that were taken some now hold pages; the others are free again.

        Args:
            hashes, keys: of the pages, one for each record.
            whole: which of them came.

        Returns:
            The lease of those that came, in order. Where this fails, the records are as they were taken.
        """
        came = np.asarray(whole, bool)
        kept = np.flatnonzero(came).tolist()
        slots = lease.slots[came]
        sums = self._checksums(slots.tolist(), [keys[i] for i in kept])
        with self._lock:
            if lease.age != self._age:
                return Lease(slots[:0], slots[:0], self._age)
            self._sums[slots] = sums
            for slot, i in zip(slots.tolist(), kept, strict=True):
                self._hashes[slot], self._keys[slot] = hashes[i], keys[i]
                self._slots[hashes[i]] = slot
            lost = lease.slots[~came]
            self._leases[lost] = 0
            self._leased -= len(lost)
            self._idle.add(lost, first=True)
            return self._lease(slots)

    def damaged(self, lease: Lease) -> list[int]:
        """Those of its records that are not what it was given for, also where they hold another whole page by now.
        Those that are still its own are forgotten."""
        slots = lease.slots[lease.slots != NOWHERE]
        with self._lock:
            own = self._are_its_own(lease)
            keys = [self._keys[slot] for slot in slots.tolist()]
            expected = self._sums[slots]
        whole = own & (np.array(self._checksums(slots.tolist(), keys), np.uint64) == expected)
        with self._lock:
            own = self._are_its_own(lease)
            for slot in slots[own & ~whole].tolist():
                self._forget(slot)
        wrong: list[int] = slots[~(own & whole)].tolist()
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
            self._leased = 0
            self._idle.fill()

    def _lease(self, slots: Slots) -> Lease:
        return Lease(slots, self._generations[slots], self._age)

    def _are_its_own(self, lease: Lease) -> NDArray[np.bool_]:
        """Of each record of a lease whether it is still the same page's."""
        has_one = lease.slots != NOWHERE
        now = self._generations[lease.slots[has_one]]
        same: NDArray[np.bool_] = now == lease.generations[has_one]
        return same & (lease.age == self._age)

    def _give_back(self, slots: Slots) -> None:
        self._leases[slots] -= 1
        free = slots[self._leases[slots] == 0]
        self._leased -= len(free)
        # Without its first page the rest of a prompt is of no use, so the last one goes first.
        self._idle.add(free[::-1])

    def _forget(self, slot: int) -> None:
        if self._slots.get(self._hashes[slot]) == slot:
            del self._slots[self._hashes[slot]]
        self._generations[slot] += 1

    def _checksums(self, slots: Sequence[int], keys: Sequence[bytes]) -> list[int]:
        return checksums(keys, [cast("Buffer", self.records[slot].numpy()) for slot in slots])
