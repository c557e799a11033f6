"""How much is done a second, as last seen."""

from __future__ import annotations

from threading import Lock

HALF_LIFE_SECONDS = 30.0  # of work: what was seen before counts half after so much more of it


class Rate:
    """Amounts over the time they took, older ones counting less. Threads may share it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._amount = 0.0
        self._seconds = 0.0
        self._seen = 0.0

    def add(self, amount: float, seconds: float) -> None:
        """Args: seconds: that the amount took, not that have passed since the last one."""
        if amount <= 0 or seconds <= 0:
            return
        fade = 0.5 ** (seconds / HALF_LIFE_SECONDS)
        with self._lock:
            self._amount = self._amount * fade + amount
            self._seconds = self._seconds * fade + seconds
            self._seen += amount

    @property
    def seen(self) -> float:
        """All amounts together."""
        return self._seen

    def seconds_of(self, amount: float) -> float:
        """What an amount would take; nothing, as long as nothing was seen."""
        with self._lock:
            return amount * self._seconds / self._amount if self._amount else 0.0
