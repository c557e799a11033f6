"""Taking turns at writing, with a deadline.

LMDB lets one process write at a time and makes the others wait without end: a writer that is stopped, not
dead, would hang them all. This lock stands before LMDB's, so that a writer can give up. The kernel frees
it when its holder dies.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from ...errors import Reason, TierError

_POLL_SECONDS = 0.005


class Turn:
    """One writer at a time among all threads of all processes that name the same file."""

    def __init__(self, tier: str, path: Path) -> None:
        self._tier = tier
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._thread = Lock()  # the file's lock is this process's: it does not part its threads

    @contextmanager
    def taken(self, timeout: float) -> Iterator[None]:
        """Raises `TierError` (BUSY) when the turn does not come within `timeout` seconds."""
        deadline = time.monotonic() + timeout
        if not self._thread.acquire(timeout=timeout):
            raise self._busy(timeout)
        try:
            self._take_file(deadline, timeout)
            try:
                yield
            finally:
                fcntl.flock(self._file, fcntl.LOCK_UN)
        finally:
            self._thread.release()

    def _take_file(self, deadline: float, timeout: float) -> None:
        while True:
            try:
                return fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise self._busy(timeout) from None
            time.sleep(_POLL_SECONDS)  # the kernel offers no wait for a file lock with a deadline

    def _busy(self, timeout: float) -> TierError:
        detail = f"another writer did not finish within {timeout:.0f} s"
        return TierError(self._tier, Reason.BUSY, detail)

    def close(self) -> None:
        os.close(self._file)
