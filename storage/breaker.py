"""Leaving a tier alone that fails, and trying it again now and then."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Lock

FAILURES = 3  # in a row, before a tier is left alone
FIRST_SECONDS = 1.0
MOST_SECONDS = 30.0


class Breaker:
    """One tier's. Closed: it is asked. Open: it is not, until a pause is over that doubles each time.

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = Lock()
        self._failures = 0
        self._pause = FIRST_SECONDS
        self._until = float("-inf")

    def allows(self) -> bool:
        """Whether to ask the tier now. After a pause one caller is let through to try."""
        with self._lock:
            if self._failures < FAILURES:
                return True
            if self._clock() < self._until:
                return False
            self._until = self._clock() + self._pause
            return True

    @property
    def resting(self) -> bool:
        """Whether the tier is left alone now; asking this lets nobody through."""
        with self._lock:
            return self._failures >= FAILURES and self._clock() < self._until

    def succeeded(self) -> None:
        with self._lock:
            self._failures = 0
            self._pause = FIRST_SECONDS

    def failed(self) -> None:
        with self._lock:
            self._failures += 1
            if self._failures >= FAILURES:
                self._until = self._clock() + self._pause
                self._pause = min(MOST_SECONDS, 2 * self._pause)
