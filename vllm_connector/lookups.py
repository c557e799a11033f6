"""Lookups beside vLLM's scheduler, which must not wait for a disk: it asks again in its next step.

One thread makes them, one after the other. A lookup that waits for others is not late: it is asked for again, until one hangs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Event, Thread

logger = logging.getLogger(__name__)

SHORT_SECONDS = (
    0.005  # that the scheduler waits in a step, in all: nearly all lookups take much less
)
MOST_SECONDS = 1.0  # that a lookup takes; after that requests are served as if nothing were stored


@dataclass(slots=True)
class Asked:
    """A lookup.

    Attributes:
        begun: by `time.monotonic`; 0: it waits for others.
        found: once it has ended, the tokens that are stored.
    """

    look: Callable[[], int]
    begun: float = 0.0
    ended: Event = field(default_factory=Event)
    found: int = 0

    @property
    def hangs(self) -> bool:
        return bool(self.begun) and time.monotonic() - self.begun > MOST_SECONDS


class Lookups:
    """One thread, one lookup after the other; while a lookup hangs, none is begun."""

    def __init__(self) -> None:
        self._seconds = 0.0  # that lookups took, since the last look
        self._late = 0  # that were given up, likewise
        self._patience = SHORT_SECONDS  # left of this step
        self._given: SimpleQueue[Asked | None] = SimpleQueue()
        self._at_work: list[Asked] = []  # one, or none
        self._thread = Thread(target=self._run, name="lmcache-lookup", daemon=True)
        self._thread.start()

    def ask(self, look: Callable[[], int]) -> Asked:
        """Begin a lookup, and wait for it for a moment, if this step has one left."""
        asked = Asked(look)
        if self.hang:
            self.give_up(asked)
            return asked
        self._given.put(asked)
        if self._patience > 0:
            begun = time.monotonic()
            asked.ended.wait(self._patience)
            self._patience -= time.monotonic() - begun
        return asked

    def begin_step(self) -> None:
        self._patience = SHORT_SECONDS

    @property
    def hang(self) -> bool:
        """Whether the one at work has not come back in time, and none behind it will."""
        return any(each.hangs for each in list(self._at_work))

    def wait(self, seconds: float) -> None:
        """For the lookup that is at work, if one is."""
        for asked in list(self._at_work):
            asked.ended.wait(seconds)

    def give_up(self, asked: Asked) -> None:
        """Take for an answer that there is nothing."""
        self._late += 1
        asked.ended.set()

    def counted(self) -> dict[str, float]:
        """Of `statistics.COUNTERS`, since the last look."""
        counted = {"lookup_seconds": self._seconds, "lookups_late": self._late}
        self._seconds, self._late = 0.0, 0
        return counted

    def close(self) -> None:
        self._given.put(None)
        self._thread.join(MOST_SECONDS)

    def _run(self) -> None:
        while (asked := self._given.get()) is not None:
            if asked.ended.is_set():
                continue
            asked.begun = begun = time.monotonic()
            self._at_work.append(asked)
            try:
                found = asked.look()
                if not asked.ended.is_set():
                    asked.found = found
            except Exception:  # a mistake of ours: told, and nothing is found
                logger.exception("lmcache: a lookup failed")
            finally:
                self._seconds += time.monotonic() - begun
                self._at_work.clear()
                asked.ended.set()
