"""A thread that moves pages, one job after the other, and that is left behind when it hangs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Lock, Thread, current_thread
from typing import TYPE_CHECKING

from .jobs import Job

if TYPE_CHECKING:
    from ..hicache.stored_pool import Standing

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Move:
    """A job that was given to a lane.

    Who may touch its blocks is decided here: whoever ends it, ends it once, and after that nothing is copied any more.

    Attributes:
        standings: of each group, under which names its pages are stored, as it was when it was given.
        wait: returns when its blocks hold what is to be saved.
        begun: when a lane began with it, or got on with it, by `time.monotonic`; 0: it waits.
    """

    job: Job
    standings: list[Standing]
    wait: Callable[[], None]
    begun: float = 0.0
    _lock: Lock = field(default_factory=Lock)
    _is_over: bool = False

    def copy(self, copy: Callable[[], None]) -> bool:
        """Copy between blocks and memory, unless it is over; whether that was done."""
        with self._lock:  # of memory, not of I/O
            if not self._is_over:
                copy()
            return not self._is_over

    @property
    def is_over(self) -> bool:
        return self._is_over

    def end(self) -> bool:
        """Leave its blocks alone from now on; whether that is news."""
        with self._lock:
            was_over, self._is_over = self._is_over, True
        return not was_over


class Lane:
    """Args: name: of the thread. work: does a job, and ends it in any case. begin: gets a new thread ready."""

    def __init__(
        self, name: str, work: Callable[[Move], None], *, begin: Callable[[], object]
    ) -> None:
        self._name = name
        self._work = work
        self._get_ready = begin
        self._given: SimpleQueue[Move | None] = SimpleQueue()
        self._begun = 0  # threads
        self._at_work: list[Move] = []  # what the present thread has, one or none
        self._begin()

    def give(self, move: Move) -> None:
        self._given.put(move)

    def hanging(self, seconds: float) -> list[Move]:
        """What has been at work for longer, though it may be over for all others."""
        now = time.monotonic()
        return [move for move in list(self._at_work) if now - move.begun > seconds]

    def replace(self) -> None:
        """Begin another thread: the one that hangs does nothing more once it comes back."""
        self._begin()

    def close(self, seconds: float) -> bool:
        """Wait until all that was given is done; False when time ran out."""
        for _ in range(self._begun):  # one that was left behind may be back, and take one
            self._given.put(None)
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _begin(self) -> None:
        self._begun += 1
        self._at_work = []
        self._thread = Thread(target=self._run, name=self._name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._try(self._get_ready)
        while current_thread() is self._thread and (move := self._given.get()) is not None:
            move.begun = time.monotonic()
            at_work = self._at_work
            at_work.append(move)
            self._try(lambda: self._work(move))
            at_work.remove(move)

    def _try(self, what: Callable[[], object]) -> None:
        try:
            what()
        except Exception:  # a mistake of ours: told, the job counted as over, and others go on
            logger.exception("lmcache: a page could not be moved")
