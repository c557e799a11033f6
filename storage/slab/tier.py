"""The slab store as a tier: one native call a batch, none of it under the GIL."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ...errors import Reason, TierError
from ...kernels.pages import PageSegments
from .. import _native
from .._native import Shown as Shown  # noqa: PLC0414  # callers take it from here
from ..base import (
    NAMESPACE_BYTES,
    NO_LIMITS,
    Below,
    CheckReport,
    Limits,
    Lookup,
    Stored,
    TierStats,
    UpperTier,
    require_equally_many,
)
from ..gate import Gate
from . import files
from .opening import Place, open_store
from .settings import SlabSettings

logger = logging.getLogger(__name__)

# In the order of the native side's codes (slab_store.hpp).
_LOOKUPS = (Lookup.HIT, Lookup.MISS, Lookup.CORRUPT, Lookup.FAILED, Lookup.LATE)
_STORED = (
    Stored.STORED,
    Stored.PRESENT,
    Stored.REFUSED,
    Stored.FAILED,
    Stored.LATE,
    Stored.DAMAGED,
)

CHECK_SECONDS = 24 * 3600.0
CLOSE_SECONDS = 10.0  # longest wait at close for operations in flight
_EPOCH_END = (1 << 32) - 1


class SlabTier(UpperTier):
    """Pages in slots, in shared memory or in a file, shared by all processes that open the directory.

    Args:
        place: where; and whether that is memory.
        capacity: bytes of all the store's files together.
        below: what a lower tier is to get of pages whose `put` does not say.

    Raises:
        ConfigError: it cannot be opened as asked.
    """

    def __init__(
        self,
        place: Place,
        capacity: int,
        settings: SlabSettings | None = None,
        *,
        name: str = "disk",
        below: Below = Below.NEVER,
    ) -> None:
        self.name = name
        self.place = place
        self.settings = settings or SlabSettings()
        self._below = below
        self._gate = Gate(name)
        opened = open_store(place, capacity, self.settings, below)
        self._store: _native.SlabStore | None = opened.store
        self._in_use = opened.in_use
        self.head = opened.head
        self.capacity = opened.capacity
        self._evicted_before = opened.store.counts()["evicted"]

    @property
    def directory(self) -> Path:
        return self.place.directory

    def fits(self, page_bytes: int) -> bool:
        return page_bytes <= self.head.slab_bytes

    @contextmanager
    def native(self) -> Iterator[_native.SlabStore]:
        """The native store, for the length of the block. Raises: TierError, for all that it raises."""
        with self._gate.passing():
            assert self._store is not None, "the gate is shut before the store is let go"
            try:
                yield self._store
            except _native.StoreFailure as failure:
                reason, detail = failure.args
                raise TierError(self.name, Reason(reason), detail) from failure

    def exists(self, keys: Sequence[bytes]) -> list[bool]:
        with self.native() as store:
            return store.exists(list(keys))

    def get(
        self, keys: Sequence[bytes], into: PageSegments, limits: Limits = NO_LIMITS
    ) -> list[Lookup]:
        require_equally_many(keys, into)
        seconds = limits.left(self.settings.seconds)
        with self.native() as store:
            codes = store.get(
                list(keys), into.addresses, into.sizes, into.per_page, seconds, limits.cancel
            )
        return [_LOOKUPS[code] for code in codes]

    def put(
        self,
        keys: Sequence[bytes],
        pages: PageSegments,
        checksums: Sequence[int] | None = None,
        parents: Sequence[bytes] | None = None,
        limits: Limits = NO_LIMITS,
        below: Below | None = None,
    ) -> list[Stored]:
        require_equally_many(keys, pages, checksums, parents)
        seconds = limits.left(self.settings.seconds)
        with self.native() as store:
            codes = store.put(
                list(keys),
                pages.addresses,
                pages.sizes,
                pages.per_page,
                checksums,
                None if parents is None else list(parents),
                (self._below if below is None else below).value,
                seconds,
                limits.cancel,
            )
        return [_STORED[code] for code in codes]

    def remove(self, keys: Sequence[bytes]) -> int:
        with self.native() as store:
            return store.remove(list(keys), self.settings.seconds)

    def clear(self, namespace: bytes) -> int:
        with self.native() as store:
            return store.clear(namespace, self.settings.seconds)

    def used_again(self, keys: Sequence[bytes]) -> list[bool]:
        """Which pages were used more than once since they came."""
        with self.native() as store:
            return store.used_again(list(keys))

    def show(
        self, keys: Sequence[bytes], lengths: Sequence[int], limits: Limits = NO_LIMITS
    ) -> Shown:
        """Let pages be read where they lie. It counts as a use of them.

        Those that are here, in memory, and in nobody else's hands, are not evicted until `unshow`, and their bytes do
        not change; whoever reads them verifies them. `Shown.pages` has of each its place in `keys`, its address and
        its checksum. What this process shows is everybody's again when it ends.
        """
        with self.native() as store:
            return store.show(list(keys), list(lengths), limits.left(self.settings.seconds))

    def unshow(self, shown: Shown) -> None:
        """Nobody reads them there any more."""
        with self.native() as store:
            store.unshow(shown, self.settings.seconds)

    def pin(self, keys: Sequence[bytes], seconds: float) -> None:
        """Keep those of the pages that are here, and so their ancestors, from being evicted for a while.

        Args:
            seconds: from now; 0 ends an earlier pin.
        """
        until = min(_EPOCH_END, int(time.time() + seconds) + 1) if seconds > 0 else 0
        with self.native() as store:
            store.pin(list(keys), until, self.settings.seconds)

    def set_quota(self, namespace: bytes, size: int) -> None:
        """The most bytes that a namespace may take here from now on; 0: no limit of its own."""
        if len(namespace) != NAMESPACE_BYTES:
            raise ValueError(f"a namespace has {NAMESPACE_BYTES} bytes")
        with self.native() as store:
            store.set_quota(namespace, size, self.settings.seconds)

    def stats(self) -> TierStats:
        with self.native() as store:
            counts = store.counts()
        used = counts["bytes"] + counts["reserved_bytes"]
        evicted = counts["evicted"] - self._evicted_before
        return TierStats(self.name, counts["pages"], used, self.capacity, evicted)

    def counts(self) -> dict[str, int]:
        """What the store counts, for all processes together (slab_store.hpp, Counts)."""
        with self.native() as store:
            return store.counts()

    def check(self, *, repair: bool = False) -> CheckReport:
        with self.native() as store:
            pages, corrupt, problems = store.check(repair, CHECK_SECONDS)
        return CheckReport(pages, corrupt, problems)

    def sweep(self) -> int:
        """Free what processes that died held; how many slots."""
        with self.native() as store:
            return store.sweep(self.settings.seconds)

    def pin_memory(self, driver: str = "libcuda.so.1") -> str:
        """Register the memory of the pages with CUDA, so that a GPU copies from and to it directly.

        Called by whoever copies so, in a thread with a CUDA context.

        Returns:
            why it could not be done; empty when it is done, now or before.
        """
        with self.native() as store:
            return store.pin_memory(driver)

    @property
    def keeper_lock(self) -> Path:
        """The file whose lock the node's background worker holds."""
        return self.directory / files.KEEPER

    @property
    def sweeper_lock(self) -> Path:
        """The same for processes that have this tier only."""
        return self.directory / files.SWEEPER

    def close(self) -> None:
        if not self._gate.shut("it was closed"):
            return
        if not self._gate.wait_empty(CLOSE_SECONDS):
            # Who comes next must not think that it is alone; the kernel lets go with the process.
            logger.warning("lmcache: %s is still in use; left open", self.directory)
            return
        self._store = None
        self._in_use.close()
