"""Pages on their way from an upper tier to a lower one, in the background.

One thread writes what was offered, in large groups. A page that waits here is still a hit. The bytes
that wait are bounded: a producer that is faster than the lower tier waits for room up to its deadline,
and is then refused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from threading import Condition, Thread
from typing import TYPE_CHECKING, NamedTuple

from ..errors import TierError
from ..kernels.pages import PageSegments
from .base import Lease, Lookup, Stored, Tier
from .record import deliver

if TYPE_CHECKING:
    from typing_extensions import Buffer

GROUP_BYTES = 64 << 20  # handed to the lower tier at once


class _Waiting(NamedTuple):
    data: Buffer  # referred to here, so that it stays where it is
    size: int
    checksum: int


class Spill:
    """A bounded queue, and the thread that empties it into `lower`.

    Args:
        capacity: bytes that may wait.
        on_error: told of each `TierError` of the lower tier; the pages concerned are then dropped.
        on_refused: told how many pages the lower tier had no room for.
    """

    def __init__(
        self,
        lower: Tier,
        capacity: int,
        on_error: Callable[[TierError], None],
        on_refused: Callable[[int], None],
    ) -> None:
        self.capacity = capacity
        self._lower = lower
        self._on_error = on_error
        self._on_refused = on_refused
        self._changed = Condition()
        self._waiting: dict[bytes, _Waiting] = {}  # in the order they were offered
        self._bytes = 0
        self._writing: frozenset[bytes] = frozenset()  # those of them the thread has in hand
        self._closing = False
        self._stalled = False  # somebody waited in vain, and nothing was written since
        self._ended = False
        self._dropped = 0  # pages that will never be written, after a mistake of ours
        self._thread = Thread(target=self._run, name=f"lmcache-spill-{lower.name}", daemon=True)
        self._thread.start()

    def offer(self, lease: Lease, timeout: float) -> int:
        """Queue pages, waiting up to `timeout` seconds for room; how many of the first were taken.

        Nothing is taken once `close` was called.
        """
        with self._changed:
            patience = 0.0 if self._stalled else timeout
        deadline = time.monotonic() + patience
        for taken, (key, record, checksum) in enumerate(
            zip(lease.keys, lease.records, lease.checksums, strict=True)
        ):
            size = memoryview(record).nbytes
            if not self._offer(key, _Waiting(record, size, checksum), deadline):
                return taken
        return len(lease.keys)

    def _offer(self, key: bytes, page: _Waiting, deadline: float) -> bool:
        if page.size > self.capacity:  # room for it never comes
            return False

        def settled() -> bool:
            return self._closing or key in self._waiting or self._bytes + page.size <= self.capacity

        with self._changed:
            in_time = self._changed.wait_for(settled, max(0.0, deadline - time.monotonic()))
            self._stalled = self._stalled or not in_time
            if not in_time or self._closing:
                return False
            if key not in self._waiting:
                self._waiting[key] = page
                self._bytes += page.size
                self._changed.notify_all()
            return True

    def exists(self, keys: Sequence[bytes]) -> list[bool]:
        with self._changed:
            return [key in self._waiting for key in keys]

    def get(self, keys: Sequence[bytes], into: PageSegments) -> list[Lookup]:
        """As `Tier.get`, of the pages that wait."""
        with self._changed:
            found = {key: self._waiting[key] for key in keys if key in self._waiting}
        return deliver(keys, found, into)

    def drop(self, doomed: Callable[[bytes], bool], timeout: float) -> bool:
        """Forget the pages whose key is doomed; wait for those that are being written right now.

        True: the lower tier holds all of them that it will ever get from here. False: time ran out.
        """
        with self._changed:
            for key in [k for k in self._waiting if k not in self._writing and doomed(k)]:
                self._forget(key)
            self._changed.notify_all()
            return self._changed.wait_for(
                lambda: not any(doomed(key) for key in self._writing), timeout
            )

    def flush(self, timeout: float) -> bool:
        """Wait until everything was written; False when the time ran out first, or never will be."""
        with self._changed:
            empty = self._changed.wait_for(lambda: not self._waiting, timeout)
            return empty and not self._dropped

    def close(self, timeout: float) -> int:
        """Take no more, write what waits, stop the thread; how many pages were left behind."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self.flush(timeout)
        with self._changed:
            left = [key for key in self._waiting if key not in self._writing]
            for key in left:
                self._forget(key)
            self._changed.notify_all()
        self._thread.join(timeout)
        return len(left)

    @property
    def alive(self) -> bool:
        """Whether the thread still writes: until `close`, or a mistake of ours."""
        with self._changed:
            return not self._ended

    @property
    def waiting(self) -> tuple[int, int]:
        """Pages and bytes that wait."""
        with self._changed:
            return len(self._waiting), self._bytes

    def _run(self) -> None:
        try:
            while group := self._take_group():
                self._write(group)
                with self._changed:
                    self._writing = frozenset()
                    self._stalled = False
                    for key in group:
                        self._forget(key)
                    self._changed.notify_all()
        finally:  # also when a mistake of ours ends the thread: then nobody may wait for it
            with self._changed:
                self._closing = True
                self._writing = frozenset()
                self._ended = True
                self._dropped = len(self._waiting)
                for key in list(self._waiting):
                    self._forget(key)
                self._changed.notify_all()

    def _take_group(self) -> dict[bytes, _Waiting]:
        """The next pages to write; none means that the queue is closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            group: dict[bytes, _Waiting] = {}
            total = 0
            for key, page in self._waiting.items():
                if group and total + page.size > GROUP_BYTES:
                    break
                group[key] = page
                total += page.size
            self._writing = frozenset(group)
            return group

    def _write(self, group: dict[bytes, _Waiting]) -> None:
        records = [page.data for page in group.values()]
        try:
            stored = self._lower.put(
                list(group),
                PageSegments.of_buffers(records),
                [page.checksum for page in group.values()],
            )
        except TierError as error:
            self._on_error(error)
            return
        refused = sum(outcome is Stored.REFUSED for outcome in stored)
        if refused:
            self._on_refused(refused)

    def _forget(self, key: bytes) -> None:
        page = self._waiting.pop(key, None)
        if page is not None:
            self._bytes -= page.size
