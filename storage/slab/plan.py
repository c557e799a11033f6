"""How a number of bytes is divided into the files of a store (docs/format.md draws them).

All of them are allocated in full when the store is made, so that a full disk or a small /dev/shm is found
then and not by a signal later, and so that the limit holds to the byte.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from .. import _native

BLOCK = 4096  # slots start and end at multiples of it
SLAB_MOST = 256 << 20  # a page may be as large as a slab
SLAB_LEAST = 64 << 10
SLABS_WANTED = 32  # at least so many, or a few models would not share a small store
SLOTS_MOST = 16384  # in one slab
ENTRY_BYTES = (
    208  # of the index for a page: 160 measured when keys come at random, more when it thins out
)
# LMDB copies what it changes, and uses the old copies again two transactions later. A transaction changes at
# most `BATCH_MOST` entries (kIndexBatch in csrc/index.hpp), each in a leaf of its own if need be.
BATCH_MOST = 1024
SLACK_MOST = 4 * BATCH_MOST * BLOCK
INDEX_LEAST = 128 << 10
PAGE_USUAL = 16 << 10  # the index has room for pages of this size; of smaller ones for as many
PAGES_LEAST = 4096
OVERHEAD = 128 << 10  # LMDB's reader table (1024 of them) and the small files
GHOSTS_MOST = 1 << 16


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes of everything in a store."""

    slab_bytes: int
    slots_per_slab: int
    slabs: int
    ghosts: int  # pages that the S3-FIFO policy remembers to have evicted

    @classmethod
    def of(cls, capacity: int, slab_bytes: int = 0) -> Plan:
        """The plan for a new store, or with `slab_bytes` for a store made with slabs of that size.

        Raises:
            ValueError: there is not room for a single slab.
        """
        slab = slab_bytes or _slab_bytes(capacity)
        slots = min(slab // BLOCK, SLOTS_MOST)
        ghosts = _ghosts(capacity)
        sizes = range(1, capacity // slab + 1)  # in slabs; the first that is too large ends it
        slabs = bisect_right(sizes, capacity, key=lambda n: cls(slab, slots, n, ghosts).total)
        if slabs == 0:
            raise ValueError(
                f"{capacity} bytes; the smallest store takes {cls._least(slab, slots)}"
            )
        return cls(slab, slots, slabs, ghosts)

    @classmethod
    def _least(cls, slab: int, slots: int) -> int:
        """Bytes that do for one slab, and for what a store of so many bytes remembers."""
        least, before = slab, 0
        while least != before:
            least, before = cls(slab, slots, 1, _ghosts(least)).total, least
        return least

    @property
    def pages_most(self) -> int:
        """Pages that the index has room for."""
        usual = max(PAGES_LEAST, self.region_bytes // PAGE_USUAL)
        return min(self.slabs * self.slots_per_slab, usual)

    @property
    def region_bytes(self) -> int:
        return self.slabs * self.slab_bytes

    @property
    def index_bytes(self) -> int:
        entries = self.pages_most * ENTRY_BYTES
        return INDEX_LEAST + _whole_blocks(entries + min(3 * entries, SLACK_MOST))

    @property
    def control_bytes(self) -> int:
        return _native.control_bytes(self.slab_bytes, self.slabs, self.slots_per_slab, self.ghosts)

    @property
    def total(self) -> int:
        """Bytes of all files together."""
        return self.region_bytes + self.index_bytes + self.control_bytes + OVERHEAD


def _whole_blocks(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _ghosts(capacity: int) -> int:
    return max(256, min(GHOSTS_MOST, capacity // (1 << 14)))


def _slab_bytes(capacity: int) -> int:
    """The largest power of two that gives `SLABS_WANTED` slabs."""
    wanted = max(SLAB_LEAST, capacity // SLABS_WANTED)
    return min(SLAB_MOST, 1 << (wanted.bit_length() - 1))
