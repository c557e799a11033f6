"""Counting what goes wrong, and saying it once a minute instead of a thousand times a second."""

from __future__ import annotations

import logging
import time
from collections import Counter
from threading import Lock

from ..errors import TierError

logger = logging.getLogger(__name__)

LOG_EVERY_SECONDS = 60.0


class Faults:
    """Counts by (tier, what), each kind logged at most once in `LOG_EVERY_SECONDS`."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._counts: Counter[tuple[str, str]] = Counter()
        self._logged: dict[tuple[str, str], tuple[float, int]] = {}

    def error(self, error: TierError) -> None:
        """A tier failed: its callers see misses."""
        self.record(error.tier, error.reason.value, error.detail)

    def record(self, tier: str, what: str, detail: str, count: int = 1) -> None:
        kind, now = (tier, what), time.monotonic()
        with self._lock:
            self._counts[kind] += count
            total = self._counts[kind]
            at, before = self._logged.get(kind, (float("-inf"), 0))
            if now - at < LOG_EVERY_SECONDS:
                return
            self._logged[kind] = (now, total)
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
