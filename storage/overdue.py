"""Calls of a tier that have not come back in time.

A tier's own deadline ends what has not begun; a request that the device has taken cannot be called back. While one
is overdue its thread waits, and whoever asks next would wait behind it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock


class Overdue:
    """The reads and lookups of one tier that are under way.

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = Lock()
        self._due: dict[object, float] = {}

    @contextmanager
    def expected(self, seconds: float) -> Iterator[None]:
        """While the block runs a call is under way that should come back within so many seconds."""
        call = object()
        with self._lock:
            self._due[call] = self._clock() + seconds
        try:
            yield
        finally:
            with self._lock:
                del self._due[call]

    def __bool__(self) -> bool:
        """Whether any of them is overdue."""
        with self._lock:
            return bool(self._due) and min(self._due.values()) < self._clock()
