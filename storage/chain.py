"""The tiers in order, as one store.

    put      upper tier, then the spill queue to the lower one in the background (write-through)
    get      upper tier, spill queue, lower tier; what the lower one had goes up again
    exists   in any of them

This is the one place where a tier's failure becomes a miss. It is counted by tier and reason, and
logged once a minute (faults.py). What comes out of a chain is only ever bytes that were verified.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

from ..errors import Reason, TierError
from ..kernels.pages import PageSegments
from .base import CheckReport, Lease, Lookup, Stored, Tier, TierStats, UpperTier
from .faults import Faults
from .groups import groups
from .spill import Spill

logger = logging.getLogger(__name__)

T = TypeVar("T")
P = ParamSpec("P")

PUT_SECONDS = 2.0  # longest that a put waits for the lower tier to catch up
CLEAR_SECONDS = 5.0  # longest that clear waits for pages that are being written
CLOSE_SECONDS = 30.0  # longest that close spends on writing what still waits


class Chain:
    """One or two tiers. With two, `upper` lends its pages and `lower` outlives the process.

    Args:
        spill_bytes: how many bytes may wait on their way down; they are held beside the upper tier's.
    """

    def __init__(
        self, upper: UpperTier | None, lower: Tier | None = None, *, spill_bytes: int = 0
    ) -> None:
        if upper is None and lower is None:
            raise ValueError("a chain needs a tier")
        self.faults = Faults()
        self._upper = upper
        self._lower = lower
        self._spill: Spill | None = None
        if upper is not None and lower is not None:
            self._spill = Spill(lower, spill_bytes, self.faults.error, self._count_refused)
        self._closed = False

    @property
    def tiers(self) -> list[Tier]:
        return [tier for tier in (self._upper, self._lower) if tier is not None]

    def exists(self, keys: Sequence[bytes]) -> list[bool]:
        here = [False] * len(keys)
        for source in self._sources():
            missing = [i for i, found in enumerate(here) if not found]
            if not missing:
                break
            wanted = [keys[i] for i in missing]
            answers = self._ask([False] * len(wanted), source.exists, wanted)
            for i, answer in zip(missing, answers, strict=True):
                here[i] = answer
        return here

    def prefix(self, keys: Sequence[bytes]) -> int:
        """How many of the first pages are here without a gap."""
        here = self.exists(keys)
        return here.index(False) if False in here else len(here)

    def get(self, keys: Sequence[bytes], into: PageSegments) -> list[bool]:
        """Copy pages into the caller's memory; which of them it now holds, verified."""
        if len(keys) != len(into):
            raise ValueError(f"{len(keys)} keys but {len(into)} pages")
        held = [False] * len(keys)
        for source in self._sources():
            missing = [i for i, found in enumerate(held) if not found]
            if not missing:
                break
            hits = self._get_from(source, missing, keys, into)
            for i in hits:
                held[i] = True
            if source is self._lower and self._upper is not None and hits:
                self._promote(hits, keys, into)
        return held

    def _get_from(
        self, source: Tier | Spill, wanted: list[int], keys: Sequence[bytes], into: PageSegments
    ) -> list[int]:
        """Which of the wanted pages `source` delivered. Corrupt ones are removed, so a write heals."""
        asked = [keys[i] for i in wanted]
        missed = [Lookup.MISS] * len(asked)
        outcome = self._ask(missed, source.get, asked, into.select(wanted))
        corrupt = [key for key, o in zip(asked, outcome, strict=True) if o is Lookup.CORRUPT]
        if corrupt:
            self._heal(source, corrupt)
        return [i for i, o in zip(wanted, outcome, strict=True) if o is Lookup.HIT]

    def _heal(self, source: Tier | Spill, corrupt: list[bytes]) -> None:
        name = source.name if isinstance(source, Tier) else "spill"
        self.faults.record(
            name, Reason.CORRUPT, "a page's bytes did not match its checksum", len(corrupt)
        )
        if isinstance(source, Tier):
            self._ask(0, source.remove, corrupt)
        else:
            source.drop(frozenset(corrupt).__contains__, 0.0)

    def _promote(self, hits: list[int], keys: Sequence[bytes], into: PageSegments) -> None:
        assert self._upper is not None
        nothing: list[Stored] = []
        self._ask(nothing, self._upper.put, [keys[i] for i in hits], into.select(hits))

    def put(self, keys: Sequence[bytes], pages: PageSegments) -> list[bool]:
        """Keep copies of pages; which of them are here afterwards, in whichever tier.

        The caller's memory is free again when this returns.
        """
        if len(keys) != len(pages):
            raise ValueError(f"{len(keys)} keys but {len(pages)} pages")
        sizes = pages.page_bytes()
        kept: list[bool] = []
        for part in groups(range(len(keys)), sizes, self.tiers[0].capacity // 2):
            kept += self._put([keys[i] for i in part], pages.select(part))
        return kept

    def _put(self, keys: list[bytes], pages: PageSegments) -> list[bool]:
        first = self.tiers[0]
        outcome = self._ask([Stored.REFUSED] * len(keys), first.put, keys, pages)
        kept = [stored is not Stored.REFUSED for stored in outcome]
        if not all(kept):
            self._count_refused(kept.count(False), first)
        if self._spill is not None:
            self._write_through([key for key, k in zip(keys, kept, strict=True) if k])
        return kept

    def _write_through(self, keys: list[bytes]) -> None:
        """Send down what the lower tier lacks, also of pages that the upper one had before."""
        upper, lower, spill = self._upper, self._lower, self._spill
        assert upper is not None and lower is not None and spill is not None
        below = self._ask([False] * len(keys), lower.exists, keys)
        absent = [key for key, here in zip(keys, below, strict=True) if not here]
        lease = self._ask(Lease([], [], []), upper.lease, absent)
        taken = spill.offer(lease, PUT_SECONDS)
        if taken < len(lease.keys):
            why = (
                (Reason.BUSY, "it writes slower than pages come")
                if spill.alive
                else (Reason.CLOSED, "the thread that writes to it has ended")
            )
            self.faults.record(lower.name, *why, count=len(lease.keys) - taken)

    def clear(self, namespace: bytes) -> int:
        """Forget every page of one namespace; how many there were in the tier that had most."""
        removed = [0]
        if self._upper is not None:
            removed.append(self._ask(0, self._upper.clear, namespace))
        if self._spill is not None:
            dropped = self._spill.drop(lambda key: key.startswith(namespace), CLEAR_SECONDS)
            if not dropped and self._lower is not None:
                busy = "pages that were being written may outlive the clear"
                self.faults.record(self._lower.name, Reason.BUSY, busy)
        if self._lower is not None:
            removed.append(self._ask(0, self._lower.clear, namespace))
        return max(removed)

    def fits(self, page_bytes: int) -> list[Tier]:
        """The tiers that could not keep even one page of this size."""
        return [tier for tier in self.tiers if not tier.fits(page_bytes)]

    def stats(self) -> list[TierStats]:
        """Of each tier that can say."""
        asked = [self._ask(None, _stats, tier) for tier in self.tiers]
        return [stats for stats in asked if stats is not None]

    def waiting(self) -> tuple[int, int]:
        """Pages and bytes on their way to the lower tier."""
        return (0, 0) if self._spill is None else self._spill.waiting

    def check(self, *, repair: bool = False) -> dict[str, CheckReport]:
        """`Tier.check` of each tier, by name. Raises `TierError`: a check that fails is not a miss."""
        return {tier.name: tier.check(repair=repair) for tier in self.tiers}

    def flush(self, timeout: float) -> bool:
        """Wait until everything that was put is in the lowest tier; False when time ran out."""
        return self._spill is None or self._spill.flush(timeout)

    def close(self, timeout: float = CLOSE_SECONDS) -> None:
        """Write what still waits, for up to `timeout` seconds, and let go of the tiers. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._spill is not None:
            left = self._spill.close(timeout)
            if left:
                logger.warning("lmcache: %d pages were not written within %.0f s", left, timeout)
        for tier in self.tiers:
            tier.close()
        if counts := self.faults.counts():
            logger.info("lmcache: in all: %s", counts)

    def _sources(self) -> list[Tier | Spill]:
        return [source for source in (self._upper, self._spill, self._lower) if source is not None]

    def _ask(self, otherwise: T, question: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The one place where a tier's failure becomes a miss."""
        try:
            return question(*args, **kwargs)
        except TierError as error:
            self.faults.error(error)
            return otherwise

    def _count_refused(self, pages: int, tier: Tier | None = None) -> None:
        tier = tier or self.tiers[-1]
        self.faults.record(tier.name, "refused", "no room for a page", pages)


def _stats(tier: Tier) -> TierStats | None:
    return tier.stats()
