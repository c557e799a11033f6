"""Pages on their way from the tiers to the landing, on a thread of their own.

For each request one `Fetch`: which prefix the tiers and the landing have together, and then its pages, first the
pools that need all of them, then the windows at the end of what came. What came is leased until the fetch is
over and its request was promised it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Event, Lock
from typing import TYPE_CHECKING

import numpy as np

from ..storage.base import PAGE_HASH_BYTES, Cancel, Limits
from ..storage.overdue import Overdue
from ..storage.seldom import Seldom
from . import restorable
from .assembly import fill_gaps
from .guard import harmless
from .landing import NOWHERE, Landing, Lease
from .lookup import Found, Wanted, look_up

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..storage.chain import Chain
    from .device_pools import DevicePool
    from .recompute import Recompute
    from .stored_pool import Standing

logger = logging.getLogger(__name__)

BATCH_BYTES = 16 << 20  # read at once, after which a fetch looks whether it was given up
BATCH_PAGES = 128
TIDY_SECONDS = 15.0
# Places where a prefix may end whose windows are read, so that ranks find one that all have: restorable.thinned.
ENDS, ENDS_SCALE = 4, 16
LOOK_SECONDS = 5.0  # that a look at what others store takes at most, unless the disk hangs
CLOSE_SECONDS = 5.0  # that a shutdown waits for the batch that is being read


class Fetch:
    """What one request waits for. Once it is over it takes 32 bytes a page, as requests wait in thousands.

    Attributes:
        pages: that it is of.
        windows: of each pool that needs only the last pages of a prefix, how many.

    Args:
        hashes: of the pages behind what the device has, without a gap.
    """

    def __init__(self, hashes: tuple[str, ...], windows: dict[str, int]) -> None:
        self.pages = len(hashes)
        self.windows = windows
        self.cancel = Cancel()
        self._hashes = hashes  # none once it is over
        self._packed = b""  # the same, from when it begins
        self._over = Event()
        self._lock = Lock()
        self._leases: list[tuple[Landing, Lease]] = []
        self._is_closed = False
        self._full: set[Landing] = set()

    @property
    def is_over(self) -> bool:
        return self._over.is_set()

    @property
    def was_short(self) -> bool:
        """Whether pages did not come for want of room."""
        return bool(self._full)

    def has_room_now(self, others: int) -> bool:
        """Whether there is room for its pages, or half a landing, where there was none. Args: others: pages that the
        room is also for."""
        return all(
            landing.room - others >= max(1, min(self.pages, landing.pages // 2))
            for landing in self._full
        )

    def asked_for(self, page_hash: str) -> bool:
        """Whether a page is among its pages."""
        # Where one hash ends and the next begins need not be looked at: they are not found by chance.
        return page_hash in self._hashes or bytes.fromhex(page_hash) in self._packed

    def begin(self) -> tuple[tuple[str, ...], list[bytes]]:
        """The hashes of its pages, as SGLang and as the store has them. On the fetching thread, as it takes long."""
        raw = [bytes.fromhex(page_hash) for page_hash in self._hashes] or _unpacked(self._packed)
        self._packed = b"".join(raw)
        self._hashes = self._hashes or tuple(page_hash.hex() for page_hash in raw)
        return self._hashes, raw

    def again(self) -> Fetch:
        """The same once more, after it is over. What came stays leased, now by the new one."""
        fetch = Fetch((), self.windows)
        fetch.pages, fetch._hashes, fetch._packed = self.pages, self._hashes, self._packed
        fetch.take_over(self)
        return fetch

    def take_over(self, before: Fetch) -> None:
        """In place of one that ends here: what came of it stays leased until this one lets go."""
        before.give_up()
        for landing, lease in before._close():
            self.keep(landing, lease)

    def keep(self, landing: Landing, lease: Lease) -> None:
        """Hold on to a lease until `let_go`, or give it back at once after that."""
        with self._lock:
            if not self._is_closed:
                self._leases.append((landing, lease))
                return
        landing.let_go(lease)

    def found_full(self, landing: Landing) -> None:
        self._full.add(landing)

    def give_up(self) -> None:
        """Begin no more reads."""
        self.cancel.set()

    def end(self) -> None:
        if self._packed:
            self._hashes = ()
        self._over.set()

    def wait(self, seconds: float) -> bool:
        """Until it is over; False when it is not by then."""
        return self._over.wait(seconds)

    def let_go(self) -> None:
        """Give back all leases, also those that are still to come."""
        for landing, lease in self._close():
            landing.let_go(lease)

    def rest(self) -> None:
        """After it is over: let go, and take no more memory than one that was begun."""
        if self._hashes:
            self.begin()
            self.end()
        self.let_go()

    def _close(self) -> list[tuple[Landing, Lease]]:
        with self._lock:
            leases, self._leases, self._is_closed = self._leases, [], True
        return leases


def _unpacked(packed: bytes) -> list[bytes]:
    return [packed[at : at + PAGE_HASH_BYTES] for at in range(0, len(packed), PAGE_HASH_BYTES)]


class Fetching:
    """The thread. It ends with `close`.

    Args:
        chain: the tiers.
        pools: by name, each with its landing.
        windowed: those pools of which a prefix needs only its last pages. The first of the others leads: behind a gap
            in it nothing is of use, and what its pages cost to read says how many are worth it.
        recompute: says how much is worth reading; None: all.
        look_around: takes note of what other topologies store.
        tidy: called now and then.
        alone: there is no other rank to agree with.
    """

    def __init__(
        self,
        chain: Chain,
        pools: Mapping[str, tuple[DevicePool, Landing]],
        windowed: frozenset[str],
        recompute: Recompute | None,
        look_around: Callable[[], None],
        tidy: Callable[[], None],
        *,
        alone: bool,
    ) -> None:
        self._alone = alone
        self._chain = chain
        self._whole = [name for name in pools if name not in windowed]  # every page of these
        self._windowed = [name for name in pools if name in windowed]
        self._pools = {name: pools[name] for name in (*self._whole, *self._windowed)}
        self._recompute = recompute
        self._look_around = look_around
        self._tidy = tidy
        self._overdue = Overdue()
        self._seldom = Seldom()
        self._queue: SimpleQueue[Fetch | None] = SimpleQueue()
        self._closing = Event()
        self._tidied = time.monotonic()
        self._thread = threading.Thread(target=self._serve, name="lmcache-fetch", daemon=True)
        self._thread.start()

    def submit(self, fetch: Fetch) -> None:
        self._queue.put(fetch)

    def hangs(self) -> bool:
        """Whether what was submitted may not end: a call to a tier or to the store's folder has not come back in
        time, or the thread is gone."""
        return self._chain.hangs() or bool(self._overdue) or not self._thread.is_alive()

    def close(self) -> None:
        """Read nothing more. Idempotent. A thread that hangs in a tier is left behind."""
        self._closing.set()
        self._queue.put(None)
        self._thread.join(CLOSE_SECONDS)

    def _serve(self) -> None:
        while True:
            try:
                fetch = self._queue.get(timeout=TIDY_SECONDS)
            except Empty:
                self._tidy_up()
                continue
            if fetch is None:
                return
            try:
                self._run(fetch)
            finally:
                fetch.end()
            if time.monotonic() - self._tidied > TIDY_SECONDS:
                self._tidy_up()

    @harmless
    def _tidy_up(self) -> None:
        self._tidied = time.monotonic()
        self._tidy()

    @harmless
    def _run(self, fetch: Fetch) -> None:
        if self._is_given_up(fetch):
            return
        reading = _Reading(fetch, *fetch.begin())
        with self._overdue.expected(LOOK_SECONDS):
            self._look_around()
        reading.standings = {name: pool.standing for name, (pool, _) in self._pools.items()}
        prefixes = self._prefixes(fetch, self._here(reading))
        pages = prefixes[-1] if len(prefixes) else 0
        for name in self._whole if pages else ():
            pages = self._bring(reading, name, range(pages))
        for end in reversed(self._ends(prefixes[prefixes <= pages])):
            for name in self._windowed:
                window = range(max(0, end - fetch.windows.get(name, 1)), end)
                self._bring(reading, name, window)

    def _ends(self, prefixes: restorable.Pages) -> list[int]:
        chosen = prefixes[-1:] if self._alone else restorable.thinned(prefixes, ENDS, ENDS_SCALE)
        return [int(end) for end in chosen]

    def _here(self, reading: _Reading) -> dict[str, NDArray[np.bool_]]:
        """Of each pool which pages the tiers or the landing have."""
        wanted = [Wanted(reading.standings[name], reading.raw) for name in self._pools]
        answers, _ = look_up(self._chain, wanted)
        here: dict[str, NDArray[np.bool_]] = {}
        for (name, (_, landing)), found in zip(self._pools.items(), answers, strict=True):
            lease = landing.hold(reading.hashes, prefix=False)
            reading.fetch.keep(landing, lease)
            landed = lease.slots != NOWHERE
            stored = np.array(found.here, bool)
            if name in self._whole[:1] and not landed.any():
                stored[self._worth(name, found, reading.raw) :] = False
            here[name] = landed | stored
        return here

    def _worth(self, name: str, found: Found, raw: list[bytes]) -> int:
        """How many of the first pages of the pool that leads it pays to read."""
        boundary = restorable.leading(np.array(found.here, bool))
        if self._recompute is None or not boundary:
            return boundary
        pool, _ = self._pools[name]
        rates = [self._chain.rates[tier.name] for tier in found.tiers[:boundary]]
        tokens = pool.identity.page_size
        return self._recompute.pays(rates, pool.page_bytes, tokens, raw[-1])

    def _prefixes(self, fetch: Fetch, here: Mapping[str, NDArray[np.bool_]]) -> restorable.Pages:
        """Those that every pool allows, shortest first."""
        pages = min((restorable.leading(here[name]) for name in self._whole), default=fetch.pages)
        allowed = np.ones(pages, bool)
        for name in self._windowed:
            window = fetch.windows.get(name, 1)
            allowed &= restorable.whole_windows(here[name][:pages], window)
        return restorable.ends(allowed)

    def _is_given_up(self, fetch: Fetch) -> bool:
        return fetch.cancel.is_set() or self._closing.is_set()

    def _bring(self, reading: _Reading, name: str, span: range) -> int:
        """Read those of some pages that have not landed; the end of what is here of them, without a gap."""
        pool, landing = self._pools[name]
        fetch = reading.fetch
        lease = landing.hold(reading.hashes[span.start : span.stop], prefix=False)
        fetch.keep(landing, lease)
        missing = [span[i] for i, slot in enumerate(lease.slots.tolist()) if slot == NOWHERE]
        for batch in _batches(missing, pool.page_bytes):
            came = 0
            if not self._is_given_up(fetch):
                came = self._read(reading, name, batch)
            if came < len(batch):
                return batch[came]
        return span.stop

    def _read(self, reading: _Reading, name: str, batch: list[int]) -> int:
        """Bring one run of pages to the landing; how many of the first of them came."""
        _, landing = self._pools[name]
        room = landing.take(len(batch))
        if len(room.slots) < len(batch):
            self._note_full(reading.fetch, name)
        batch = batch[: len(room.slots)]
        if not batch:
            return 0
        with ExitStack() as failed:
            failed.callback(landing.let_go, room)
            whole, came = self._fill(reading, name, room, range(batch[0], batch[-1] + 1))
            failed.pop_all()
        reading.fetch.keep(landing, came)
        return whole.index(False) if False in whole else len(whole)

    def _fill(
        self, reading: _Reading, name: str, room: Lease, span: range
    ) -> tuple[list[bool], Lease]:
        """Read pages into records; which of them came, and their lease in place of that of the records."""
        pool, landing = self._pools[name]
        standing = reading.standings[name]
        chosen = reading.raw[span.start : span.stop]
        before = reading.raw[span.start - 1] if span.start else b""
        keys = [standing.namespace + page_hash for page_hash in chosen]
        places, limits = landing.places(room), Limits(None, reading.fetch.cancel)
        parent = standing.namespace + before if before else b""
        whole = self._chain.get(keys, places, parent=parent, limits=limits)
        if not all(whole):
            whole = fill_gaps(self._chain, standing, chosen, before, places, whole, limits)
        if pool.namespace != standing.namespace:  # the weights were replaced meanwhile
            whole = [False] * len(whole)
        return whole, landing.came(room, reading.hashes[span.start : span.stop], keys, whole)

    def _note_full(self, fetch: Fetch, name: str) -> None:
        _, landing = self._pools[name]
        fetch.found_full(landing)
        if self._seldom.due(name):
            logger.info(
                "lmcache: the landing of pool %s (%d pages) is full of what waiting requests were promised: others are "
                'restored in part, or computed. "direct": {"landing": SIZE} makes it larger',
                name,
                len(landing.records),
            )


@dataclass
class _Reading:
    """One fetch while it is worked on. Args: raw: the hashes as the store has them."""

    fetch: Fetch
    hashes: tuple[str, ...]
    raw: list[bytes]
    standings: dict[str, Standing] = field(default_factory=dict)


def _batches(pages: Sequence[int], page_bytes: int) -> Iterator[list[int]]:
    """Runs of pages, each small enough to be read at once."""
    most = max(1, min(BATCH_PAGES, BATCH_BYTES // page_bytes))
    batch: list[int] = []
    for page in pages:
        if batch and (page != batch[-1] + 1 or len(batch) == most):
            yield batch
            batch = []
        batch.append(page)
    if batch:
        yield batch
