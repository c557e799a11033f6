"""How a peer has served this process: whether to ask it, how much at once, and how soon it delivers.

A peer that failed rests, longer each time and by chance never all at once; then one read tries it (half-open). One that
sent wrong bytes twice in a row is not asked for long. One that is new, or back, is given little at first, and twice as
much after each read that it served.
"""

from __future__ import annotations

import logging
from random import Random
from threading import Lock

from ..rate import Rate
from .backoff import Backoff

logger = logging.getLogger(__name__)

LIES = 2  # in a row
EMPTY = 8  # answers in a row without a page of those that it told of
QUARANTINE_SECONDS = 600.0
FIRST_WINDOW = 2 << 20  # bytes on their way from a peer that is cold
GUESSED_RATE = 1e9  # bytes a second, of a peer that served nothing yet
SMOOTH = 0.2


class Health:
    """One peer's, in one process. Threads may share it.

    Args:
        name: for the log.
        most: of the window, in bytes.
        random: whose chance cuts the pauses.
    """

    def __init__(self, name: str, most: int, random: Random) -> None:
        self.name = name
        self._most = most
        self._lock = Lock()
        self._backoff = Backoff(random)
        self._rate = Rate()
        self._latency = 0.0
        self._until = float("-inf")  # rests
        self._is_tried = False  # by one read, after a rest
        self._has_failed = False
        self._lies = 0
        self._empty = 0
        self._window = min(most, FIRST_WINDOW)

    def usable(self, now: float) -> bool:
        """Whether a read may ask it now."""
        with self._lock:
            return now >= self._until and not (self._has_failed and self._is_tried)

    def set_most(self, most: int) -> None:
        """Another limit of the window."""
        with self._lock:
            self._most = most
            self._window = min(most, self._window)

    def is_cold(self) -> None:
        """The peer has just started: it is given little at first. What it did before still counts."""
        with self._lock:
            self._window = min(self._most, FIRST_WINDOW)

    def begin(self) -> None:
        """A read asks it. It ends with one of the next five."""
        with self._lock:
            self._is_tried = self._has_failed

    def served(self, size: int, first: float, seconds: float) -> None:
        """It delivered. Args: size: bytes. first: seconds until the first of them came. seconds: in all."""
        with self._lock:
            if self._latency:
                self._latency += SMOOTH * (first - self._latency)
            else:
                self._latency = first
            self._has_failed = self._is_tried = False
            self._lies = self._empty = 0
            self._backoff.succeeded()
            if size:
                self._window = min(self._most, 2 * self._window)
        if size:
            self._rate.add(size, max(seconds - first, 1e-6))

    def gave_no_sign(self) -> None:
        """The read ended before anything could be said: it had little time, or was given up."""
        with self._lock:
            self._is_tried = False

    def had_nothing(self, now: float) -> None:
        """It answered, with no page of those that it had told of. They may just have given way there; but not each time."""
        with self._lock:
            self._is_tried = False
            self._empty += 1
            if self._empty >= EMPTY:
                self._rest(now, self._backoff.pause())

    def failed(self, now: float) -> None:
        """It did not: dead, hung or gone."""
        with self._lock:
            self._rest(now, self._backoff.pause())

    def lied(self, now: float) -> None:
        """It sent bytes that their checksum does not fit."""
        with self._lock:
            self._lies += 1
            is_liar = self._lies >= LIES
            self._rest(now, QUARANTINE_SECONDS if is_liar else self._backoff.pause())
        if is_liar:
            logger.error(
                "lmcache: peer %s sent wrong bytes %d times in a row: it is not asked for %.0f minutes. Look at its "
                "memory, its disk and its network",
                self.name,
                LIES,
                QUARANTINE_SECONDS / 60,
            )

    def _rest(self, now: float, seconds: float) -> None:
        self._has_failed, self._is_tried = True, False
        self._until = now + seconds
        self._window = min(self._most, FIRST_WINDOW)

    @property
    def window(self) -> int:
        """Bytes that may be on their way from it to one stream."""
        return self._window

    @property
    def latency(self) -> float:
        """Seconds to the first bytes, smoothed; 0: not known."""
        return self._latency

    @property
    def rate(self) -> float:
        """Bytes a second."""
        amount = 1 << 20
        seconds = self._rate.seconds_of(amount)
        return amount / seconds if seconds else GUESSED_RATE
