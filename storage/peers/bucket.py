"""A limit of bytes a second that lets a little through at once: the token bucket."""

from __future__ import annotations

BURST_SECONDS = 0.05


class Bucket:
    """What may be sent, by a rate.

    Args:
        rate: bytes a second; 0: no limit.
    """

    def __init__(self, rate: int, now: float) -> None:
        self.rate = rate
        self._left = rate * BURST_SECONDS
        self._at = now

    def wait(self, now: float) -> float:
        """Seconds until something may be taken; 0: now."""
        if self.rate == 0:
            return 0.0
        self._left = min(self.rate * BURST_SECONDS, self._left + self.rate * (now - self._at))
        self._at = now
        return max(0.0, -self._left / self.rate)

    def take(self, size: int) -> None:
        """So many bytes are sent, be they more than there are: what follows waits the longer."""
        self._left -= size
