"""Records that may give way, the one that was let go longest ago first.

A log of record numbers, oldest first, in which an entry counts while it is its record's newest. So a record that is
held again costs one store to an array, wherever its entry lies, and taking the oldest never walks past what must stay:
an entry that does not count is passed once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Slots = NDArray[np.int64]

NOWHERE = -1
_STEP = 4096  # entries looked at in one go


class Idle:
    """Of the records 0 to `records` - 1, all of which are idle at first. Its callers keep threads apart."""

    def __init__(self, records: int) -> None:
        self._log = np.zeros(2 * records, np.int64)
        self._places = np.empty(records, np.int64)  # in the log, of each record; NOWHERE: not idle
        self.fill()

    def fill(self) -> None:
        """From now on all records are idle."""
        records = len(self._places)
        self._log[:records] = self._places[:] = np.arange(records)
        self._head, self._tail = 0, records  # between them is what was not taken

    def add(self, slots: Slots, *, first: bool = False) -> None:
        """These are idle now, and give way in this order. None of them is there already, and none is in it twice.

        Args:
            first: before all others, where there is room for that.
        """
        if first and self._head >= len(slots):
            self._head -= len(slots)
            self._write(self._head, slots)
            return
        if self._tail + len(slots) > len(self._log):
            self._pack()
        self._write(self._tail, slots)
        self._tail += len(slots)

    def remove(self, slots: Slots) -> None:
        """These must stay, whether they were idle or not."""
        self._places[slots] = NOWHERE

    def take(self, most: int) -> Slots:
        """Remove the oldest, as many as there are up to so many."""
        taken = [np.empty(0, np.int64)]
        while most > 0 and self._head < self._tail:
            entries, counts = self._entries(min(self._tail, self._head + _STEP))
            chosen = np.flatnonzero(counts)[:most]
            self._head += int(chosen[-1]) + 1 if len(chosen) == most else len(entries)
            taken.append(entries[chosen])
            self._places[taken[-1]] = NOWHERE
            most -= len(chosen)
        return np.concatenate(taken)

    def _entries(self, end: int) -> tuple[Slots, NDArray[np.bool_]]:
        """Those from the head to an end, and which of them count."""
        entries = self._log[self._head : end]
        return entries, self._places[entries] == np.arange(self._head, end)

    def _write(self, start: int, slots: Slots) -> None:
        end = start + len(slots)
        self._log[start:end] = slots
        self._places[slots] = np.arange(start, end)

    def _pack(self) -> None:
        """Drop what does not count; half of the log is free then, so it is long until the next time."""
        entries, counts = self._entries(self._tail)
        kept = entries[counts]
        self._head, self._tail = 0, len(kept)
        self._write(0, kept)
