"""When to try again: later each time, and never all at once."""

from __future__ import annotations

from random import Random

FIRST_SECONDS = 0.5
MOST_SECONDS = 30.0


class Backoff:
    """Pauses that double, each cut by chance to between half and all of it.

    Args:
        random: whose chance.
    """

    def __init__(
        self, random: Random, first: float = FIRST_SECONDS, most: float = MOST_SECONDS
    ) -> None:
        self._random = random
        self._first, self._most = first, most
        self._next = first

    def pause(self) -> float:
        """Seconds until the next try; and the one after that is further off."""
        pause, self._next = self._next, min(self._most, 2 * self._next)
        return pause * self._random.uniform(0.5, 1.0)

    def soon(self) -> float:
        """Seconds until a try that there is a reason for: less than the first pause, and not counted."""
        return self._random.uniform(0.0, self._first)

    def succeeded(self) -> None:
        self._next = self._first
