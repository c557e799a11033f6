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
from queue import Empty, SimpleQueue
from threading import Event, Lock
from typing import TYPE_CHECKING

from ..storage.base import Cancel, Limits
from . import restorable
from .assembly import fill_gaps
from .guard import harmless
from .landing import NOWHERE, Landing, Lease
from .lookup import Found, Wanted, look_up

if TYPE_CHECKING:
    from ..storage.chain import Chain
    from .device_pools import DevicePool
    from .recompute import Recompute
    from .stored_pool import Standing

logger = logging.getLogger(__name__)

BATCH_BYTES = 16 << 20  # read at once, after which a fetch looks whether it was given up
BATCH_PAGES = 128
TIDY_SECONDS = 15.0
ENDS = (
    4  # places where a prefix may end whose windows are read, so that ranks find one that all have
)
LOOK_EVERY_SECONDS = 1.0  # for what engines of other topologies store


class Fetch:
    """What one request waits for.

    Args:
        hashes: of the pages behind what the device has, without a gap.
        windows: of each pool that needs only the last pages of a prefix, how many.
    """

    def __init__(self, hashes: tuple[str, ...], windows: dict[str, int]) -> None:
        self.hashes = hashes
        self.windows = windows
        self.cancel = Cancel()
        self._over = Event()
        self._among: frozenset[str] | None = None  # of the hashes, made by the fetching thread
        self._lock = Lock()
        self._leases: list[tuple[Landing, Lease]] = []
        self._is_closed = False

    @property
    def is_over(self) -> bool:
        return self._over.is_set()

    def asked_for(self, page_hash: str) -> bool:
        """Whether a page is among its pages; taken to be until that is known."""
        return self._among is None or page_hash in self._among

    def begin(self) -> None:
        self._among = frozenset(self.hashes)

    def keep(self, landing: Landing, lease: Lease) -> None:
        """Hold on to a lease until `let_go`, or give it back at once after that."""
        with self._lock:
            if not self._is_closed:
                self._leases.append((landing, lease))
                return
        landing.let_go(lease)

    def give_up(self) -> None:
        """Begin no more reads."""
        self.cancel.set()

    def end(self) -> None:
        self._over.set()

    def wait(self, seconds: float) -> bool:
        """Until it is over; False when it is not by then."""
        return self._over.wait(seconds)

    def let_go(self) -> None:
        """Give back all leases, also those that are still to come."""
        with self._lock:
            leases, self._leases, self._is_closed = self._leases, [], True
        for landing, lease in leases:
            landing.let_go(lease)


class Fetching:
    """The thread. It ends with `close`.

    Args:
        chain: the tiers.
        pools: by name, each with its landing; "kv" first.
        windowed: those pools of which a prefix needs only its last pages.
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
        self._ends = 1 if alone else ENDS
        self._chain = chain
        self._pools = pools
        self._windowed = windowed
        self._recompute = recompute
        self._look_around = look_around
        self._tidy = tidy
        self._queue: SimpleQueue[Fetch | None] = SimpleQueue()
        self._tidied = time.monotonic()
        self._thread = threading.Thread(target=self._serve, name="lmcache-fetch", daemon=True)
        self._thread.start()

    def submit(self, fetch: Fetch) -> None:
        self._queue.put(fetch)

    def close(self) -> None:
        """Returns once nothing more is read. Idempotent."""
        self._queue.put(None)
        self._thread.join()

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

    def _tidy_up(self) -> None:
        self._tidied = time.monotonic()
        self._tidy()

    @harmless
    def _run(self, fetch: Fetch) -> None:
        fetch.begin()
        if fetch.cancel.is_set():
            return
        self._look_around()
        standings = {name: pool.standing for name, (pool, _) in self._pools.items()}
        raw = [bytes.fromhex(page_hash) for page_hash in fetch.hashes]
        here = self._here(fetch, standings, raw)
        prefixes = self._prefixes(fetch, here)
        pages = prefixes[-1] if prefixes else 0
        for name in self._pools:
            if name not in self._windowed and pages:
                pages = self._bring(fetch, name, standings[name], raw, range(pages))
        ends = [prefix for prefix in prefixes if prefix <= pages][-self._ends :]
        for name in self._windowed:
            for end in reversed(ends):
                window = range(max(0, end - fetch.windows.get(name, 1)), end)
                self._bring(fetch, name, standings[name], raw, window)

    def _here(
        self, fetch: Fetch, standings: Mapping[str, Standing], raw: list[bytes]
    ) -> dict[str, list[bool]]:
        """Of each pool which pages the tiers or the landing have."""
        wanted = [Wanted(standings[name], raw) for name in self._pools]
        answers, _ = look_up(self._chain, wanted)
        here: dict[str, list[bool]] = {}
        for (name, (_, landing)), found in zip(self._pools.items(), answers, strict=True):
            lease = landing.hold(fetch.hashes, prefix=False)
            fetch.keep(landing, lease)
            landed = (lease.slots != NOWHERE).tolist()
            stored = found.here
            if name == "kv" and not any(landed):
                worth = self._worth(found, raw)
                stored[worth:] = [False] * (len(stored) - worth)
            here[name] = [a or b for a, b in zip(landed, stored, strict=True)]
        return here

    def _worth(self, found: Found, raw: list[bytes]) -> int:
        """How many of the first KV pages it pays to read."""
        boundary = restorable.all_pages(found.here).boundary
        if self._recompute is None or not boundary:
            return boundary
        pool, _ = self._pools["kv"]
        rates = [self._chain.rates[tier.name] for tier in found.tiers[:boundary]]
        tokens = pool.identity.page_size
        return self._recompute.pays(rates, pool.page_bytes, tokens, raw[-1])

    def _prefixes(self, fetch: Fetch, here: Mapping[str, list[bool]]) -> list[int]:
        boundaries = [
            restorable.all_pages(its).boundary
            for name, its in here.items()
            if name not in self._windowed
        ]
        pages = min(boundaries, default=0)
        allowed = frozenset(range(1, pages + 1))
        for name in self._windowed:
            window = fetch.windows.get(name, 1)
            allowed &= restorable.trailing_pages(here[name][:pages], window).prefixes
        return sorted(allowed)

    def _bring(
        self, fetch: Fetch, name: str, standing: Standing, raw: list[bytes], span: range
    ) -> int:
        """Read those of some pages that have not landed; the end of what is here of them, without a gap."""
        pool, landing = self._pools[name]
        lease = landing.hold(fetch.hashes[span.start : span.stop], prefix=False)
        fetch.keep(landing, lease)
        missing = [span[i] for i, slot in enumerate(lease.slots.tolist()) if slot == NOWHERE]
        for batch in _batches(missing, pool.page_bytes):
            came = 0
            if not fetch.cancel.is_set():
                came = self._read(fetch, pool, landing, standing, raw, batch)
            if came < len(batch):
                return batch[came]
        return span.stop

    def _read(
        self,
        fetch: Fetch,
        pool: DevicePool,
        landing: Landing,
        standing: Standing,
        raw: list[bytes],
        batch: list[int],
    ) -> int:
        """Bring one run of pages to the landing; how many of the first of them came."""
        room = landing.take(len(batch))
        batch = batch[: len(room.slots)]
        if not batch:
            return 0
        chosen = raw[batch[0] : batch[-1] + 1]
        before = raw[batch[0] - 1] if batch[0] else b""
        keys = [standing.namespace + page_hash for page_hash in chosen]
        places, limits = landing.places(room), Limits(None, fetch.cancel)
        parent = standing.namespace + before if before else b""
        try:
            whole = self._chain.get(keys, places, parent=parent, limits=limits)
            if not all(whole):
                whole = fill_gaps(self._chain, standing, chosen, before, places, whole, limits)
        except BaseException:
            landing.let_go(room)
            raise
        if pool.namespace != standing.namespace:  # the weights were replaced meanwhile
            whole = [False] * len(whole)
        hashes = fetch.hashes[batch[0] : batch[-1] + 1]
        fetch.keep(landing, landing.came(room, hashes, keys, whole))
        return whole.index(False) if False in whole else len(whole)


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
