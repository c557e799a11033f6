"""The node's background work: one thread of one process at a time, whichever holds the keeper's lock.

    writes what waits in the upper tier to the lower one, in large groups with one flush each
    frees what processes that died held

Every process that opens the store has this thread; all but one of them only look now and then whether
the lock is free, which it is at the latest when its holder dies. What waits lies in shared memory, so
whoever comes next goes on where the last one stopped. A process with one tier only has a lock of its own
kind: while it held the other one, nobody would spill.

The lock is POSIX's, which belongs to the process: a child that it forked does not keep it from the others.
"""

from __future__ import annotations

import atexit
import fcntl
import logging
import os
import time
from collections.abc import Callable, Sequence
from threading import Event, Thread

from ..errors import ConfigError, Reason, TierError
from ._native import SlabStore
from .slab.tier import SlabTier

logger = logging.getLogger(__name__)

GROUP_BYTES = 64 << 20  # written with one flush
GROUP_SECONDS = 30.0
JOIN_SECONDS = 1.5 * GROUP_SECONDS  # a group at hand ends before that, unless the device hangs
LOOK_SECONDS = 1.0  # between looks at the lock, and between rounds with nothing to do
SWEEP_SECONDS = 5.0
TOUCHED_BYTES = 256 << 20  # of used pages queued at once
FIRST_PAUSE = 0.1  # after an error of the lower tier; doubles up to
LONGEST_PAUSE = 5.0

Report = Callable[[TierError], None]
Refused = Callable[[SlabTier, int], None]


class Keeper:
    """The thread.

    Args:
        tiers: upper one first; the work is on all of them, the spill from the first to the second.
        on_touch: also queue pages that were held back until they are used.
        retry: queue again what the lower tier failed to take; where nothing else is held back.
        report: told of every error.
        refused: told how many pages a tier had no room for.

    Raises:
        ConfigError: the lock's file cannot be made.
    """

    def __init__(
        self,
        tiers: Sequence[SlabTier],
        report: Report,
        refused: Refused,
        *,
        on_touch: bool = False,
        retry: bool = False,
    ) -> None:
        self._tiers = list(tiers)
        self._report = report
        self._refused = refused
        self._on_touch = on_touch
        self._retry = retry
        self._owed = False  # a write failed, and what it was of waits for another try
        self._stop = Event()
        self._swept = float("-inf")
        self._pause = FIRST_PAUSE
        self.elected = Event()  # while this process does the work
        self._lock = _open_lock(self._tiers)
        self._thread = Thread(target=self._run, name="lmcache-keeper", daemon=True)
        self._thread.start()
        # A program may end without closing its store. A thread that comes out of native code after the
        # interpreter has ended takes the whole process with it (SIGABRT), and its exit status.
        atexit.register(self.close)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def flush(self, timeout: float, *, held_back: bool = True) -> bool:
        """Wait until the lower tier has what it is to get; False when it has not, or not in time.

        Args:
            held_back: also what the admission policy holds back, and what it did not take before.
        """
        if len(self._tiers) == 1:
            return True
        deadline = time.monotonic() + timeout
        try:
            with self._tiers[0].native() as store:
                if not held_back:
                    if self._on_touch:  # also what was used since the last look
                        store.queue_unspilled(True, 1 << 62, timeout)
                    return _drained(store, deadline)
                return _drained_to_the_last(store, deadline)
        except TierError as error:
            self._report(error)
            return False

    def close(self) -> None:
        """Stop after the group at hand; another process goes on. Idempotent."""
        atexit.unregister(self.close)
        self._stop.set()
        try:
            with self._tiers[0].native() as store:
                store.wake()
        except TierError as error:
            if error.reason is not Reason.CLOSED:
                raise
        self._thread.join(JOIN_SECONDS)
        if self._thread.is_alive():  # the kernel lets go of its lock with the process
            logger.warning("lmcache: the disk does not answer; its background thread is left alone")

    def _run(self) -> None:
        try:
            self._run_until_stopped()
        finally:  # also after a mistake of ours: another process goes on
            if not self._stop.is_set():
                logger.error(
                    "lmcache: the background thread ended; only other processes write below"
                )
            self.elected.clear()
            os.close(self._lock)

    def _run_until_stopped(self) -> None:
        while not self._stop.is_set():
            if not self._is_elected():
                self._stop.wait(LOOK_SECONDS)  # no wait for a file lock can be ended
                continue
            try:
                self._work()
                self._pause = FIRST_PAUSE
            except TierError as error:
                self._report(error)
                self._stop.wait(self._pause)
                self._pause = min(LONGEST_PAUSE, 2 * self._pause)

    def _is_elected(self) -> bool:
        if not self.elected.is_set():
            try:
                fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            self.elected.set()
            logger.debug(
                "lmcache: this process does the background work of %s", self._tiers[0].directory
            )
        return True

    def _work(self) -> None:
        """One round: a group is written, or a pause is over, or there is news."""
        if time.monotonic() - self._swept > SWEEP_SECONDS:
            for tier in self._tiers:
                tier.sweep()
            self._swept = time.monotonic()
        with self._tiers[0].native() as upper:
            seen = upper.work_seen()
            if self._retry and self._owed:
                upper.queue_unspilled(False, TOUCHED_BYTES, LOOK_SECONDS)
                self._owed = False
            if len(self._tiers) == 1 or not self._spill_group():
                if self._on_touch:
                    upper.queue_unspilled(True, TOUCHED_BYTES, LOOK_SECONDS)
                if not self._stop.is_set():
                    upper.wait_for_work(seen, LOOK_SECONDS)

    def _spill_group(self) -> bool:
        """Whether there was anything to write."""
        lower = self._tiers[1]
        with self._tiers[0].native() as upper:
            try:
                with lower.native() as below:
                    done = upper.spill(below, GROUP_BYTES, GROUP_SECONDS)
            except TierError as error:
                self._owed = True
                raise TierError(lower.name, error.reason, error.detail) from error
        if done["refused"]:
            self._refused(lower, done["refused"])
        if done["damaged"]:
            detail = "a page in memory changed before it was written; it was forgotten"
            self._report(TierError(self._tiers[0].name, Reason.CORRUPT, detail))
        if done["failed"]:
            self._owed = True
            raise TierError(lower.name, Reason.IO, f"{done['failed']} pages could not be written")
        return bool(done["pages"])


def _open_lock(tiers: Sequence[SlabTier]) -> int:
    path = tiers[0].keeper_lock if len(tiers) > 1 else tiers[0].sweeper_lock
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(
            tiers[0].place.path_setting,
            f"cannot write {path}: {error.strerror}; give a directory you own",
        ) from error


def _drained(store: SlabStore, deadline: float) -> bool:
    """Wait until nothing is queued or being written; False when the time ran out first."""
    while True:
        seen, counts = store.room_seen(), store.counts()
        if not (counts["dirty_pages"] or counts["asked_pages"] or counts["spilling_bytes"]):
            return True
        left = min(LOOK_SECONDS, deadline - time.monotonic())
        if left <= 0:
            return False
        store.wait_for_room(seen, left)


def _drained_to_the_last(store: SlabStore, deadline: float) -> bool:
    """As `_drained`, with what is not even queued; again, as long as the tier below takes some of it."""
    before = None
    while True:
        left = max(0.0, deadline - time.monotonic())
        queued = store.queue_unspilled(False, 1 << 62, left)
        if queued == 0 and before is not None:
            return True
        if before and queued >= before:
            return False
        if not _drained(store, deadline):
            return False
        before = queued
