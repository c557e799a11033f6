"""The thread that looks what this node holds, so that the agent's loop never waits for an index.

It looks again soon after something changed, but spends no more than a twentieth of its time on it: ten thousand pages
are looked through in milliseconds, a million in a fraction of a second. What the node's engines say they just
put is taken in at once, so that a peer knows of a page milliseconds after it is there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from threading import Thread

from ...errors import TierError
from ..faults import Faults
from .holdings import Change, Holdings

EVERY_SECONDS = 0.25  # between looks
SHARE = 20  # of its time that it may look
WAITING_MOST = 4096  # messages of engines; more are found by the next look
CLOSE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Held:
    """What the node holds from now on. Args: tags: all of it. change: since the last time."""

    tags: bytes
    change: Change


class HoldingsWatch:
    """Looks until it is closed.

    Args:
        report: told of each change, on this thread.
    """

    def __init__(self, holdings: Holdings, report: Callable[[Held], None]) -> None:
        self._holdings = holdings
        self._report = report
        self._faults = Faults()
        self._told: SimpleQueue[Sequence[bytes] | _Closing] = SimpleQueue()
        self._thread = Thread(target=self._run, name="lmcache-holdings", daemon=True)
        self._thread.start()

    def told(self, keys: Sequence[bytes]) -> None:
        """Engines of this node have just put these; none: something was cleared, look now."""
        if self._told.qsize() < WAITING_MOST:
            self._told.put(keys)

    def end(self) -> None:
        """Look no more, once the look at hand is over. Waits for nothing."""
        self._told.put(_Closing())

    def close(self) -> None:
        self.end()
        self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        look_at = time.monotonic()
        while True:
            try:
                told = self._told.get(timeout=max(0.0, look_at - time.monotonic()))
            except Empty:
                told = ()
            if isinstance(told, _Closing):
                return
            if told:
                self._take(partial(self._hear, told))
            if not told or time.monotonic() >= look_at:
                self._take(self._holdings.look)
                look_at = time.monotonic() + max(EVERY_SECONDS, SHARE * self._holdings.seconds)

    def _hear(self, keys: Sequence[bytes]) -> Change:
        return Change(self._holdings.told(keys))

    def _take(self, look: Callable[[], Change]) -> None:
        try:
            change = look()
        except TierError as error:  # what was known stays told until the tier answers again
            self._faults.error(error)
            return
        if change:
            self._report(Held(self._holdings.tags, change))


class _Closing:
    """The last thing in the queue."""
