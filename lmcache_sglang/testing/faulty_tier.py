"""A tier that fails on command: to test what lies above it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from ..errors import Reason, TierError
from ..kernels.pages import PageSegments
from ..storage.base import (
    NO_LIMITS,
    Below,
    CheckReport,
    Limits,
    Lookup,
    Stored,
    Tier,
    TierStats,
    UpperTier,
)


class FaultyTier(UpperTier):
    """Passes every call on to `inner`, unless told otherwise. It can stand above or below.

    Attributes:
        failing: while set, every call but `close` raises a `TierError` with this reason.
        refusing: calls that raise one with the reason IO, by name, for example ``{"put"}``.
        reads: while set, what becomes of each page that a `get` finds, in place of a hit.
        writes: while set, what becomes of each page of a `put`, which `inner` does not get.
        asked: how often each call came, by name.
        parents, below: that each `put` was told.
        limits: that each `get` was given.
        before_call: is told of each call first, by name; one that waits makes the tier hang.
    """

    def __init__(self, inner: Tier, name: str | None = None) -> None:
        self.name = name or inner.name
        self.capacity = inner.capacity
        self.inner = inner
        self.failing: Reason | None = None
        self.refusing: set[str] = set()
        self.reads: Lookup | None = None
        self.writes: Stored | None = None
        self.asked: Counter[str] = Counter()
        self.parents: list[Sequence[bytes] | None] = []
        self.below: list[Below | None] = []
        self.limits: list[Limits] = []
        self.before_call: Callable[[str], None] = lambda _: None

    def _asked(self, call: str) -> Tier:
        self.asked[call] += 1
        self.before_call(call)
        if self.failing is not None:
            raise TierError(self.name, self.failing, "told to fail")
        if call in self.refusing:
            raise TierError(self.name, Reason.IO, f"told to fail to {call}")
        return self.inner

    def fits(self, page_bytes: int) -> bool:
        return self.inner.fits(page_bytes)

    def exists(self, keys: Sequence[bytes]) -> list[bool]:
        return self._asked("exists").exists(keys)

    def get(
        self, keys: Sequence[bytes], into: PageSegments, limits: Limits = NO_LIMITS
    ) -> list[Lookup]:
        self.limits.append(limits)
        outcome = self._asked("get").get(keys, into, limits)
        instead = self.reads or Lookup.HIT
        return [instead if found is Lookup.HIT else found for found in outcome]

    def put(
        self,
        keys: Sequence[bytes],
        pages: PageSegments,
        checksums: Sequence[int] | None = None,
        parents: Sequence[bytes] | None = None,
        limits: Limits = NO_LIMITS,
        below: Below | None = None,
    ) -> list[Stored]:
        inner = self._asked("put")
        self.parents.append(parents)
        self.below.append(below)
        if self.writes is not None:
            return [self.writes] * len(keys)
        if isinstance(inner, UpperTier):
            return inner.put(keys, pages, checksums, parents, limits, below)
        return inner.put(keys, pages, checksums, parents, limits)

    def remove(self, keys: Sequence[bytes]) -> int:
        return self._asked("remove").remove(keys)

    def clear(self, namespace: bytes) -> int:
        return self._asked("clear").clear(namespace)

    def stats(self) -> TierStats:
        return self._asked("stats").stats()

    def check(self, *, repair: bool = False) -> CheckReport:
        return self._asked("check").check(repair=repair)

    def close(self) -> None:
        self.inner.close()
