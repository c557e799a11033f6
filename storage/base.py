"""What a tier is: a place that keeps pages by key, up to a number of bytes.

A page's key is its namespace's digest followed by the chained hash of its tokens (`page_key`), so two
pages with equal keys are interchangeable bytes, and a namespace is cleared by its prefix.

Obligations shared by every tier:

- It never returns bytes that it cannot prove. `get` reports HIT only when length and checksum hold. What
  the memory of another page of that call holds afterwards is not defined: bytes are checked while they
  are copied, in one pass. Memory beside the pages is never touched.
- It never keeps more than its capacity, not even for a moment.
- It may forget any page at any time. It may not forget half of one.
- It may be called from several threads at once, and takes no lock that is held across I/O
  on a read.
- It raises `TierError` when it cannot do what it was asked, and nothing else for what the world does
  to it. `ValueError` and `TypeError` are the caller's mistakes.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from ..kernels.pages import PageSegments
from ._native import Cancel as Cancel  # noqa: PLC0414  # callers take it from here

NAMESPACE_BYTES = 16
PAGE_HASH_BYTES = 32
KEY_BYTES = NAMESPACE_BYTES + PAGE_HASH_BYTES


def page_key(namespace: bytes, page_hash: bytes) -> bytes:
    """The key of a page.

    Raises:
        ValueError: a digest of the wrong length.
    """
    if len(namespace) != NAMESPACE_BYTES or len(page_hash) != PAGE_HASH_BYTES:
        raise ValueError(
            f"a key is {NAMESPACE_BYTES} bytes of namespace and {PAGE_HASH_BYTES} of page hash, "
            f"not {len(namespace)} and {len(page_hash)}"
        )
    return namespace + page_hash


def require_equally_many(
    keys: Sequence[bytes],
    pages: PageSegments,
    checksums: Sequence[int] | None = None,
    parents: Sequence[bytes] | None = None,
) -> None:
    """The first line of `get` and `put`.

    Raises:
        ValueError: there is not one page, and one checksum and parent if there are any, for each key.
    """
    counts = {len(keys), len(pages)}
    counts |= {len(given) for given in (checksums, parents) if given is not None}
    if len(counts) != 1:
        raise ValueError("keys, pages, checksums and parents must be equally many")


class Lookup(Enum):
    """What became of one page of a `get`."""

    HIT = "hit"  # the caller's memory now holds the page
    MISS = "miss"  # not here
    CORRUPT = "corrupt"  # here, but not whole
    FAILED = "failed"  # here, but the medium did not deliver it
    LATE = "late"  # here, but not read before the deadline

    __hash__ = object.__hash__  # Enum's own is written in Python, and one is asked for each page


class Stored(Enum):
    """What became of one page of a `put`."""

    STORED = "stored"  # it is here now
    PRESENT = "present"  # it was here already; counts as a use
    REFUSED = "refused"  # there was no room for it
    FAILED = "failed"  # the medium did not take it
    LATE = "late"  # not written before the deadline
    DAMAGED = "damaged"  # its bytes did not match the checksum that came with it

    __hash__ = object.__hash__  # as above

    @property
    def kept(self) -> bool:
        """Whether the page is here now."""
        return self in (Stored.STORED, Stored.PRESENT)


@dataclass(frozen=True, slots=True)
class Limits:
    """When a call begins no more work. What it has begun it ends: it moves the caller's memory.

    Attributes:
        until: by `time.monotonic`, for all tiers together; None: each tier's own limit.
        cancel: ends the call when another thread sets it.
    """

    until: float | None = None
    cancel: Cancel | None = None

    @classmethod
    def within(cls, seconds: float, cancel: Cancel | None = None) -> Limits:
        """So many seconds from now."""
        return cls(time.monotonic() + seconds, cancel)

    def left(self, own: float) -> float:
        """Seconds from now, of the `own` ones of whoever works; 0 when time is up."""
        return own if self.until is None else min(own, max(0.0, self.until - time.monotonic()))


NO_LIMITS = Limits()


class Below(Enum):
    """What the tier below is to get of the pages of a `put`. The values are those of the native side."""

    NEVER = "never"  # it has them, or there is none
    NOW = "now"  # written through, in the background
    ON_EVICT = "on-evict"  # written back, when they would go from here
    ON_TOUCH = "on-touch"  # once they are used, or put again
    LATER = "later"  # with the first of their descendants that is written


@dataclass(frozen=True, slots=True)
class TierStats:
    """What a tier holds now."""

    name: str
    pages: int
    bytes: int  # what counts against the capacity
    capacity: int
    evicted: int = 0  # pages dropped for room since this object was made


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What a walk over every record found."""

    pages: int  # whole records
    corrupt: list[bytes] = field(default_factory=list)  # keys whose record does not verify
    problems: list[str] = field(default_factory=list)  # anything else, in words

    @property
    def ok(self) -> bool:
        return not self.corrupt and not self.problems


class Tier(ABC):
    """Keeps pages. See the module's docstring for what every tier owes."""

    name: str
    capacity: int

    @abstractmethod
    def fits(self, page_bytes: int) -> bool:
        """Whether pages of this size can be kept at all, once everything else is evicted."""

    @abstractmethod
    def exists(self, keys: Sequence[bytes]) -> list[bool]:
        """Which pages are here. Counts as no use of them.

        A yes may turn out corrupt or be evicted before the `get`; a no is never said of a page that
        `put` reported stored and nothing has removed since.
        """

    @abstractmethod
    def get(
        self, keys: Sequence[bytes], into: PageSegments, limits: Limits = NO_LIMITS
    ) -> list[Lookup]:
        """Copy pages into the caller's memory, each one verified.

        One key names one length: a page of another than its destination is a MISS, and stays.
        A corrupt page stays until `remove`, so that the caller decides.
        """

    @abstractmethod
    def put(
        self,
        keys: Sequence[bytes],
        pages: PageSegments,
        checksums: Sequence[int] | None = None,
        parents: Sequence[bytes] | None = None,
        limits: Limits = NO_LIMITS,
    ) -> list[Stored]:
        """Keep copies of pages.

        Args:
            checksums: of the pages as an upper tier computed them when they came from the engine. A
                page whose bytes no longer match is DAMAGED, so that damage in memory does not get a
                fresh checksum. None: compute them here.
            parents: the key of the page before each one in its chain, or `b""` for none. None: the
                batch is one run of a chain, each page the parent of the next.

        A page that is here already is not written again; under a key whose page has another length, it is
        REFUSED.

        A tier that must choose keeps a page rather than its descendants, which are useless without it.
        Of a page that is not kept nothing is here; the other pages of the batch are not affected.
        """

    @abstractmethod
    def remove(self, keys: Sequence[bytes]) -> int:
        """Forget pages; how many were here."""

    @abstractmethod
    def clear(self, namespace: bytes) -> int:
        """Forget every page of one namespace and of no other; how many were here."""

    @abstractmethod
    def stats(self) -> TierStats: ...

    @abstractmethod
    def check(self, *, repair: bool = False) -> CheckReport:
        """Read and verify every record. With `repair`, remove what is not whole."""

    @abstractmethod
    def close(self) -> None:
        """Let go of everything. Idempotent; every other call but `fits` raises `TierError` (CLOSED)."""


class UpperTier(Tier):
    """A tier that pages spill from: it is told of each page what the one below is to get."""

    @abstractmethod
    def put(
        self,
        keys: Sequence[bytes],
        pages: PageSegments,
        checksums: Sequence[int] | None = None,
        parents: Sequence[bytes] | None = None,
        limits: Limits = NO_LIMITS,
        below: Below | None = None,
    ) -> list[Stored]:
        """As `Tier.put`. Args: below: None means what the tier was made with."""


class OuterTier(Tier):
    """Pages of other nodes: asked last, and never put to. `put` refuses, `remove` and `clear` leave them there."""

    @abstractmethod
    def wanted(self, keys: Sequence[bytes]) -> list[bool]:
        """Which of the pages that it has just delivered are to be kept on this node, too."""

    @abstractmethod
    def announce(self, keys: Sequence[bytes]) -> None:
        """These pages are on this node now; none: some were cleared. Never waits, and never fails."""
