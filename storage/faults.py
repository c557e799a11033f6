"""Counting what goes wrong, and saying it once a minute instead of a thousand times a second."""

from __future__ import annotations

import logging
from collections import Counter
from threading import Lock

from ..errors import TierError
from .seldom import Seldom

logger = logging.getLogger(__name__)


class Faults:
    """Counts by (tier, what), each kind logged seldom."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._counts: Counter[tuple[str, str]] = Counter()
        self._seldom = Seldom()
        # How many there were at the last message.
        self._logged: Counter[tuple[str, str]] = Counter()

    def error(self, error: TierError) -> None:
        """A tier failed: its callers see misses."""
        self.record(error.tier, error.reason.value, error.detail)

    def record(self, tier: str, what: str, detail: str, count: int = 1) -> None:
        kind = (tier, what)
        with self._lock:
            self._counts[kind] += count
            total, before = self._counts[kind], self._logged[kind]
            if not self._seldom.due(kind):
                return
            self._logged[kind] = total
        logger.warning(
            "lmcache: %s tier: %s: %s (%d since the last message, %d in all); served as misses",
            tier,
            what,
            detail,
            total - before,
            total,
        )

    def counts(self) -> dict[str, int]:
        """``"tier.what"`` -> how often."""
        with self._lock:
            return {f"{tier}.{what}": n for (tier, what), n in sorted(self._counts.items())}
