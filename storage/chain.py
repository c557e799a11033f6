"""The tiers in order, as one store.

    put      upper tier; from there to the lower one in the background (keeper.py)
             what the upper one does not take goes to the lower one at once
    get      upper tier, then the lower one; what that one had goes up again, by the promotion policy
             then other nodes, if there are any; what they had is kept here, by the policy of keeping
    exists   in any of them

This is the one place where a tier's failure becomes a miss. It is counted by tier and reason, and
logged once a minute (faults.py); a tier that keeps failing is left alone for a while (breaker.py). What
comes out of a chain is only ever bytes that were verified.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, ParamSpec, TypeVar

from ..errors import Reason, TierError
from ..kernels.pages import PageSegments
from .admission import Admission, All
from .base import (
    NO_LIMITS,
    Below,
    CheckReport,
    Limits,
    Lookup,
    OuterTier,
    Stored,
    Tier,
    TierStats,
    UpperTier,
)
from .breaker import Breaker
from .faults import Faults
from .groups import groups
from .keeper import Keeper
from .overdue import Overdue
from .rate import Rate
from .slab.tier import SlabTier

logger = logging.getLogger(__name__)

T = TypeVar("T")
P = ParamSpec("P")

Promotion = Literal["always", "second-hit", "never"]

CALL_SECONDS = 10.0  # that a read without a limit of its own may take, as tiers have it
LOOKUP_SECONDS = 1.0  # that a lookup may take, of however many pages
FAIR_SECONDS = 0.9  # in which any tier that works delivers a page
KEEP_SECONDS = 1.0  # that keeping what came from other nodes may hold a read up
GRACE_SECONDS = 1.0  # for what was begun just before a limit
CLOSE_SECONDS = 30.0  # longest that close spends on writing what still waits

_WENT_WRONG = {
    Lookup.CORRUPT: (Reason.CORRUPT, "a page's bytes did not match its checksum"),
    Lookup.FAILED: (Reason.IO, "a page could not be read"),
    Lookup.LATE: (Reason.BUSY, "a page was not read before the deadline"),
}
# A batch with any of the first two and none of the third is a tier's failure, as an error is.
_BROKEN = frozenset({Lookup.FAILED, Stored.FAILED})
_LATE = frozenset({Lookup.LATE, Stored.LATE})
_GOES_AROUND = frozenset({Stored.REFUSED, Stored.FAILED})
_DONE = frozenset({Lookup.HIT, Stored.STORED, Stored.PRESENT})
_BREAKERS = ("get", "put", "other")  # a tier whose index answers may still deliver no page
_NOT_STORED = {
    Stored.REFUSED: ("refused", "no room for a page"),
    Stored.FAILED: (Reason.IO.value, "a page could not be written"),
    Stored.LATE: (Reason.BUSY.value, "a page was not written before the deadline"),
    Stored.DAMAGED: (
        Reason.CORRUPT.value,
        "a page's bytes did not match the checksum it came with",
    ),
}


class Chain:
    """One or two tiers of this node, and the other nodes.

    Args:
        upper: gets what is put, and tells the keeper what the lower one is to get.
        lower: outlives the machine.
        admission: what the lower tier gets, and when.
        promotion: which of the pages that the lower tier delivers go up again.
        peers: asked last, and told what is put here.
    """

    def __init__(
        self,
        upper: UpperTier | None,
        lower: Tier | None = None,
        *,
        admission: Admission | None = None,
        promotion: Promotion = "always",
        peers: OuterTier | None = None,
    ) -> None:
        self.faults = Faults()
        self._upper = upper
        self._lower = lower
        self._peers = peers
        if upper is None and lower is None:
            raise ValueError("a chain needs a tier of this node")
        self.tiers: list[Tier] = [tier for tier in (upper, lower, peers) if tier is not None]
        self.rates = {tier.name: Rate() for tier in self.tiers}  # of bytes read
        self._overdue = {tier.name: Overdue() for tier in self.tiers}
        self._admission = admission or All()
        self._promotion = promotion
        self._breakers = {(tier.name, call): Breaker() for tier in self.tiers for call in _BREAKERS}
        slabs = [tier for tier in self.tiers if isinstance(tier, SlabTier)]
        on_touch = self._admission.below(1 << 30, 1) is Below.ON_TOUCH
        retry = self._admission == All("write-through")
        self._keeper = (
            Keeper(slabs, self.faults.error, self._count_refused, on_touch=on_touch, retry=retry)
            if slabs
            else None
        )
        self._closed = False

    @property
    def directories(self) -> list[Path]:
        """Of those tiers that have one, which other processes see too."""
        return [tier.directory for tier in self.tiers if isinstance(tier, SlabTier)]

    def exists(self, keys: Sequence[bytes]) -> list[bool]:
        return [tier is not None for tier in self.holders(keys)]

    def holders(self, keys: Sequence[bytes]) -> list[Tier | None]:
        """Of each page the first tier that has it; None: no tier has."""
        holders: list[Tier | None] = [None] * len(keys)
        missing = list(range(len(keys)))
        for tier in self.tiers:
            answers = self._exists_in(tier, [keys[i] for i in missing])
            for i, here in zip(missing, answers, strict=True):
                if here:
                    holders[i] = tier
            missing = [i for i in missing if holders[i] is None]
            if not missing:
                break
        return holders

    def _exists_in(self, tier: Tier, keys: Sequence[bytes]) -> list[bool]:
        """Nothing, for a tier whose reads are left alone: it would promise what no `get` delivers."""
        nothing = [False] * len(keys)
        if self._breakers[tier.name, "get"].resting:
            self._count_bypassed(tier)
            return nothing
        if self._is_overdue(tier):
            return nothing
        # Even this may hang: an index may lie on the disk that does.
        with self._overdue[tier.name].expected(LOOKUP_SECONDS):
            return self._ask(tier, nothing, tier.exists, keys)

    def hangs(self) -> bool:
        """Whether a call has not come back in time: whoever reads on one thread waits behind it. The log says it,
        too."""
        return any(self._is_overdue(tier) for tier in self.tiers)

    def get(
        self,
        keys: Sequence[bytes],
        into: PageSegments,
        *,
        parent: bytes = b"",
        limits: Limits = NO_LIMITS,
    ) -> list[bool]:
        """Copy pages into the caller's memory; which of them it now holds, verified.

        Args:
            keys: one run of a chain.
            parent: the key of the page before them.
        """
        if len(keys) != len(into):
            raise ValueError(f"{len(keys)} keys but {len(into)} pages")
        held = [False] * len(keys)
        for tier in self.tiers:
            missing = [i for i, found in enumerate(held) if not found]
            if not missing:
                break
            hits = self._get_from(tier, missing, keys, into, limits)
            for i in hits:
                held[i] = True
            if tier is self._lower and self._upper is not None and hits:
                self._promote(hits, keys, into, parent, limits)
            elif tier is self._peers and hits:
                self._keep(self._peers, hits, keys, into, parent)
        return held

    def _get_from(
        self,
        tier: Tier,
        wanted: list[int],
        keys: Sequence[bytes],
        into: PageSegments,
        limits: Limits,
    ) -> list[int]:
        """Which of the wanted pages a tier delivered. Corrupt ones are removed, so a write heals."""
        if self._is_overdue(tier):
            return []
        asked = [keys[i] for i in wanted]
        outcome = self._read(tier, asked, into.select(wanted), limits)
        given_up = limits.cancel is not None and limits.cancel.is_set()
        for what, (reason, detail) in _WENT_WRONG.items():
            if what is Lookup.LATE and given_up:  # by its caller's choice: nothing went wrong
                continue
            if concerned := [key for key, o in zip(asked, outcome, strict=True) if o is what]:
                self.faults.record(tier.name, reason.value, detail, len(concerned))
                if what is Lookup.CORRUPT:
                    with self._overdue[tier.name].expected(CALL_SECONDS):
                        self._ask(tier, 0, tier.remove, concerned)
        return [i for i, o in zip(wanted, outcome, strict=True) if o is Lookup.HIT]

    def _read(
        self, tier: Tier, asked: list[bytes], places: PageSegments, limits: Limits
    ) -> list[Lookup]:
        """`Tier.get`, and how long it took."""
        missed = [Lookup.MISS] * len(asked)
        wait = limits.left(CALL_SECONDS) + GRACE_SECONDS
        started = time.perf_counter()
        with self._overdue[tier.name].expected(wait):
            outcome = self._ask(tier, missed, tier.get, asked, places, limits)
        took = time.perf_counter() - started
        if took > wait:
            self.faults.record(tier.name, Reason.BUSY.value, f"a read took {took:.1f} s")
        if hits := outcome.count(Lookup.HIT):
            self.rates[tier.name].add(sum(places.sizes) * hits / len(asked), took)
        return outcome

    def _is_overdue(self, tier: Tier) -> bool:
        if not self._overdue[tier.name]:
            return False
        detail = "a call has not come back in time, and it is left alone until that does"
        self.faults.record(tier.name, "overdue", detail)
        return True

    def _promote(
        self,
        hits: list[int],
        keys: Sequence[bytes],
        into: PageSegments,
        parent: bytes,
        limits: Limits,
    ) -> None:
        upper, lower = self._upper, self._lower
        assert upper is not None and lower is not None
        if self._promotion == "never":
            return
        if self._promotion == "second-hit" and isinstance(lower, SlabTier):
            again = self._ask(lower, [False] * len(hits), lower.used_again, [keys[i] for i in hits])
            hits = [i for i, used in zip(hits, again, strict=True) if used]
        parents = [keys[i - 1] if i else parent for i in hits]
        nothing: list[Stored] = []
        chosen = [keys[i] for i in hits]
        self._ask(
            upper,
            nothing,
            upper.put,
            chosen,
            into.select(hits),
            None,
            parents,
            limits,
            Below.NEVER,
        )

    def _keep(
        self,
        peers: OuterTier,
        hits: list[int],
        keys: Sequence[bytes],
        into: PageSegments,
        parent: bytes,
    ) -> None:
        """Pages that came from other nodes, as if they had been computed here. They came in time; to keep them
        is not counted to that."""
        below = self._admission.below(1 << 30, 1)
        wanted = peers.wanted([keys[i] for i in hits])
        chosen = [i for i, keep in zip(hits, wanted, strict=True) if keep]
        for run in _runs(chosen):
            before = keys[run[0] - 1] if run[0] else parent
            kept = [keys[i] for i in run]
            self._put(kept, into.select(run), before, below, Limits.within(KEEP_SECONDS))
            peers.announce(kept)

    def put(
        self,
        keys: Sequence[bytes],
        pages: PageSegments,
        *,
        parent: bytes = b"",
        position: int = 0,
        limits: Limits = NO_LIMITS,
    ) -> list[bool]:
        """`store`; which of the pages are here afterwards, in whichever tier."""
        stored = self.store(keys, pages, parent=parent, position=position, limits=limits)
        return [each.kept for each in stored]

    def store(
        self,
        keys: Sequence[bytes],
        pages: PageSegments,
        *,
        parent: bytes = b"",
        position: int = 0,
        limits: Limits = NO_LIMITS,
    ) -> list[Stored]:
        """Keep copies of pages; what became of each, in whichever tier.

        The caller's memory is free again when this returns.

        Args:
            keys: one run of a chain.
            parent: the key of the page before them; empty when they begin it, or it is not known.
            position: of the first of them in the chain.
        """
        if len(keys) != len(pages):
            raise ValueError(f"{len(keys)} keys but {len(pages)} pages")
        below = self._admission.below(position, len(keys))
        outcome: list[Stored] = []
        for part in groups(range(len(keys)), pages.page_bytes(), self.tiers[0].capacity // 2):
            chosen = pages if len(part) == len(keys) else pages.select(part)
            outcome += self._put([keys[i] for i in part], chosen, parent, below, limits)
            parent = keys[part[-1]]
        if self._peers is not None:  # so that others know soon
            here = [key for key, its in zip(keys, outcome, strict=True) if its is Stored.STORED]
            if here:
                self._peers.announce(here)
        return outcome

    def _put(
        self,
        keys: list[bytes],
        pages: PageSegments,
        parent: bytes,
        below: Below,
        limits: Limits,
    ) -> list[Stored]:
        parents = [parent, *keys[:-1]]
        nothing: list[Stored] = []
        if self._upper is None:
            first = self.tiers[0]
            outcome = self._ask(first, nothing, first.put, keys, pages, None, parents, limits)
            self._count_not_stored(outcome)
        else:
            upper, below = self._upper, below if self._lower is not None else Below.NEVER
            put = upper.put
            outcome = self._ask(upper, nothing, put, keys, pages, None, parents, limits, below)
            self._count_not_stored([stored for stored in outcome if stored is not Stored.REFUSED])
            if below in (Below.NOW, Below.ON_EVICT):
                outcome = self._put_around(outcome, keys, pages, parents, limits)
            self._count_not_stored([stored for stored in outcome if stored is Stored.REFUSED])
        return outcome or [Stored.FAILED] * len(keys)

    def _count_not_stored(self, outcome: list[Stored]) -> None:
        for what, (reason, detail) in _NOT_STORED.items():
            if count := outcome.count(what):
                self.faults.record(self.tiers[0].name, reason, detail, count)

    def _put_around(
        self,
        outcome: list[Stored],
        keys: list[bytes],
        pages: PageSegments,
        parents: list[bytes],
        limits: Limits,
    ) -> list[Stored]:
        """What the upper tier has no room for, or does not take because it is broken, goes to the lower one
        at once.

        The upper one keeps a page rather than its descendants, so of a chain that is longer than all of
        its room it would never take the end.
        """
        outcome = outcome or [Stored.FAILED] * len(keys)
        refused = [i for i, stored in enumerate(outcome) if stored in _GOES_AROUND]
        if not refused or self._lower is None:
            return outcome
        chosen, before = [keys[i] for i in refused], [parents[i] for i in refused]
        lower, nothing = self._lower, list[Stored]()
        into = pages.select(refused)
        around = self._ask(lower, nothing, lower.put, chosen, into, None, before, limits)
        kept = {i for i, stored in zip(refused, around, strict=False) if stored.kept}
        return [Stored.STORED if i in kept else stored for i, stored in enumerate(outcome)]

    def clear(self, namespace: bytes) -> int:
        """Forget every page of one namespace; how many there were in the tier that had most.

        Raises:
            TierError: a tier still has them, which is not a miss; the others have forgotten theirs.
        """
        counts, errors = [], []
        for tier in self.tiers:
            try:
                counts.append(tier.clear(namespace))
            except TierError as error:
                self.faults.error(error)
                errors.append(error)
        if self._upper is not None and self._lower is not None and not errors:
            self._ask(
                self._upper, 0, self._upper.clear, namespace
            )  # what a read brought up meanwhile
        if self._peers is not None:
            self._peers.announce(())  # others must not believe in them for longer than that takes
        if errors:
            raise errors[0]
        return max(counts)

    def fits(self, page_bytes: int) -> list[Tier]:
        """The tiers that could not keep even one page of this size."""
        return [tier for tier in self.tiers if not tier.fits(page_bytes)]

    def stats(self) -> list[TierStats]:
        """Of each tier that can say."""
        asked = [self._ask(tier, None, _stats, tier) for tier in self.tiers]
        return [stats for stats in asked if stats is not None]

    def waiting(self) -> tuple[int, int]:
        """Pages that wait to be written to the lower tier, and bytes that wait or are being written."""
        if not isinstance(self._upper, SlabTier):
            return 0, 0
        nothing: dict[str, int] = {}
        counts = self._ask(self._upper, nothing, self._upper.counts)
        waiting = counts.get("dirty_bytes", 0) + counts.get("spilling_bytes", 0)
        return counts.get("dirty_pages", 0), waiting

    def check(self, *, repair: bool = False) -> dict[str, CheckReport]:
        """`Tier.check` of each tier, by name. Raises `TierError`: a check that fails is not a miss."""
        return {tier.name: tier.check(repair=repair) for tier in self.tiers}

    def flush(self, timeout: float) -> bool:
        """Wait until everything that was put is in the lowest tier; False when time ran out."""
        return self._keeper is None or self._keeper.flush(timeout)

    def close(self, timeout: float = CLOSE_SECONDS) -> None:
        """Write what still waits, for up to `timeout` seconds, and let go of the tiers. Idempotent.

        What is not written by then, or is held back by the admission policy, stays in the upper tier,
        if that outlives the process.
        """
        if self._closed:
            return
        self._closed = True
        if self._keeper is not None:
            if not self._keeper.flush(timeout, held_back=not self._admission.holds_back):
                logger.warning("lmcache: pages still wait to be written after %.0f s", timeout)
            self._keeper.close()
        for tier in self.tiers:
            tier.close()
        if counts := self.faults.counts():
            logger.info("lmcache: in all: %s", counts)

    def _ask(
        self, tier: Tier, otherwise: T, question: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """The one place where a tier's failure becomes a miss."""
        call = question.__name__
        breaker = self._breakers[tier.name, call if call in _BREAKERS else "other"]
        if not breaker.allows():
            self._count_bypassed(tier)
            return otherwise
        started = time.perf_counter()
        try:
            answer = question(*args, **kwargs)
        except TierError as error:
            breaker.failed()
            self.faults.error(error)
            return otherwise
        was_given = NO_LIMITS in args or time.perf_counter() - started >= FAIR_SECONDS
        if _has_failed(answer, was_given):
            breaker.failed()
        elif was_given or not _is_late(answer):
            breaker.succeeded()
        return answer

    def _count_bypassed(self, tier: Tier) -> None:
        self.faults.record(tier.name, "bypassed", "it keeps failing and is left alone for a while")

    def _count_refused(self, tier: Tier, pages: int) -> None:
        self.faults.record(tier.name, "refused", "no room for a page", pages)


def _has_failed(answer: object, was_given_time: bool) -> bool:
    """Whether a batch came back with no page, and neither because there is none nor by its caller's haste."""
    if not isinstance(answer, list) or not _DONE.isdisjoint(answer):
        return False
    return not _BROKEN.isdisjoint(answer) or (was_given_time and _is_late(answer))


def _is_late(answer: object) -> bool:
    """Whether pages of a batch were not come to, and none came."""
    return isinstance(answer, list) and _DONE.isdisjoint(answer) and not _LATE.isdisjoint(answer)


def _runs(places: Sequence[int]) -> list[list[int]]:
    """Places that follow each other, together."""
    runs: list[list[int]] = []
    for place in places:
        if runs and place == runs[-1][-1] + 1:
            runs[-1].append(place)
        else:
            runs.append([place])
    return runs


def _stats(tier: Tier) -> TierStats:
    return tier.stats()
