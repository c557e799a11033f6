"""Whether restoring a prefix pays: what it would take, against computing it anew, both as measured here.

    restore      bytes of each page / rate of the tier that has it
    recompute    tokens of each page / rate of this engine's prefill

The best prefix is the one where most time is saved. A disk that is slow, or shared, may well be slower than a
fast GPU on a small model; its pages are then computed, while those in memory before them are restored.

Until enough of both was seen, everything is restored. So is one prefix in sixteen, or a tier that was slow would be
taken for slow for good: by its hash, as all ranks must choose the same one for any of them to read it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from threading import Lock

from ..storage.rate import Rate
from ..storage.seldom import Seldom

logger = logging.getLogger(__name__)

LEAST_TOKENS = 4096  # computed, before a rate is believed
LEAST_BYTES = 64 << 20  # read from a tier, before its rate is believed
LEAST_BATCH = 64  # tokens of a batch that says something about the rate
MARGIN = 1.25  # a restore must be expected to take so much longer before it is declined
RETRY_ONE_IN = 16

_prefill = Rate()  # of this process, whatever store is attached


def computed(tokens: int, seconds: float) -> None:
    """A prefill batch ended. Args: seconds: since it was launched."""
    if tokens >= LEAST_BATCH:
        _prefill.add(tokens, seconds)


class Recompute:
    """Of one backend.

    Args:
        prefill: tokens that this engine computes.
    """

    def __init__(self, prefill: Rate | None = None) -> None:
        self._prefill = prefill or _prefill
        self._lock = Lock()
        self._seldom = Seldom()
        self.declined = 0  # pages

    def pays(self, tiers: Sequence[Rate], page_bytes: int, page_tokens: int, asked: bytes) -> int:
        """How many of the first pages to restore.

        Args:
            tiers: of each page, the rate of the tier that has it, in bytes.
            asked: the hash of the last page that was asked for, the same on all ranks.
        """
        if self._prefill.seen < LEAST_TOKENS:
            return len(tiers)
        gains = {tier: self._gain(tier, page_bytes, page_tokens) for tier in set(tiers)}
        if all(gain >= 0 for gain in gains.values()):
            return len(tiers)
        best = self._best([gains[tier] for tier in tiers])
        if best == len(tiers) or asked[-1] % RETRY_ONE_IN == 0:
            return len(tiers)
        self._note(len(tiers) - best)
        return best

    def _note(self, pages: int) -> None:
        with self._lock:
            self.declined += pages
        if not self._seldom.due("declined"):
            return
        logger.info(
            "lmcache: %d pages are computed, which takes less than to read them (%d so far; "
            '"restore": "always" would read them)',
            pages,
            self.declined,
        )

    def _gain(self, tier: Rate, page_bytes: int, page_tokens: int) -> float:
        """Seconds that restoring a page saves."""
        if tier.seen < LEAST_BYTES:
            return 0.0
        return MARGIN * self._prefill.seconds_of(page_tokens) - tier.seconds_of(page_bytes)

    @staticmethod
    def _best(gains: Sequence[float]) -> int:
        """The longest prefix that saves most."""
        best, most, total = 0, 0.0, 0.0
        for pages, gain in enumerate(gains, 1):
            total += gain
            if total >= most:
                best, most = pages, total
        return best
