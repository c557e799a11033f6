"""What requests were promised, and how long they wait until more can be.

SGLang aborts a request whose load fails after a hit was promised. So a lookup promises what lies in the landing,
leased for that request; and what does not is fetched by another thread, so that a later lookup finds it. Until
then the request waits, as SGLang's prefetch policy has it (patience.py): the plug-in asks `is_ready` where
SGLang's scheduler asks about its own prefetches.

A promise ends when the request loads, when SGLang gives the request up, or when nobody has asked for it for
`FORGET_SECONDS`: SGLang does not say when a request went on without loading. Between a lookup and the load
there is one pass of the scheduler, and it looks up in each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING

from . import restorable
from .fetching import Fetch
from .landing import NOWHERE

if TYPE_CHECKING:
    from .landing import Landing, Lease

FORGET_SECONDS = 60.0

Leases = list[tuple["Landing", "Lease"]]


@dataclass(frozen=True, slots=True)
class Patience:
    """SGLang's prefetch policy.

    Attributes:
        policy: `best_effort`, `wait_complete` or `timeout`.
        base: seconds that `timeout` waits at least.
        per_page: seconds more for each page that was asked for.
        least_pages: that are not on the device, from which on the store is asked.
    """

    policy: str = "timeout"
    base: float = 1.0
    per_page: float = 0.0
    least_pages: int = 1

    def is_spent(self, waited: float, pages: int) -> bool:
        if self.policy == "wait_complete":
            return False
        return self.policy == "best_effort" or waited > self.base + self.per_page * pages


@dataclass
class _Request:
    seen: float
    promise: Leases = field(default_factory=list)
    fetch: Fetch | None = None
    waits_since: float | None = None  # until it was first held up, it has waited for nothing


class Promises:
    """Of one rank. Its calls come from the scheduler's thread, but for `expire`.

    Args:
        landings: of each pool by its name; "kv" first.
        windowed: those pools of which a prefix needs only its last pages.
        fetch: begins a fetch in another thread.
        patience: how long a request waits for one.
        hangs: whether a call to a tier has not come back in time; the fetching thread may be in it.
        alone: no other rank must stop at the same page, so only the longest prefix need be told.
    """

    def __init__(
        self,
        landings: Mapping[str, Landing],
        windowed: Iterable[str],
        fetch: Callable[[Fetch], None],
        patience: Patience,
        *,
        alone: bool,
        hangs: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._landings = landings
        self._windowed = frozenset(windowed)
        self._fetch = fetch
        self._patience = patience
        self._alone = alone
        self._hangs = hangs
        self._clock = clock
        self._lock = Lock()  # where requests come and go; around nothing that takes long
        self._requests: dict[str, _Request] = {}

    def __len__(self) -> int:
        """Requests that hold something, or wait."""
        return len(self._requests)

    def look_up(self, rid: str, hashes: Sequence[str], windows: Mapping[str, int]) -> list[int]:
        """The prefixes, in pages, that a load of this request cannot miss.

        Args:
            hashes: of the pages behind what the device has.
            windows: of each pool that needs only the last pages of a prefix, how many.
        """
        if len(hashes) < self._patience.least_pages:
            return []
        promise, prefixes = self._hold(hashes, windows)
        with self._lock:
            request = self._requests.setdefault(rid, _Request(self._clock()))
            before, request.promise = request.promise, promise
            request.seen = self._clock()
            longest = prefixes[-1] if prefixes else 0
            fetch = self._fetch_of(request, hashes, windows) if longest < len(hashes) else None
        _let_go(before)
        if fetch is not None:
            self._fetch(fetch)
        return prefixes[-1:] if self._alone else prefixes

    def _hold(self, hashes: Sequence[str], windows: Mapping[str, int]) -> tuple[Leases, list[int]]:
        """Lease what is here of the pages; the prefixes that this allows, shortest first."""
        held: Leases = []
        pages = len(hashes)
        for name, landing in self._landings.items():
            if name in self._windowed:
                continue
            lease = landing.hold(hashes[:pages], prefix=True)
            held.append((landing, lease))
            missing = lease.slots == NOWHERE
            pages = int(missing.argmax()) if missing.any() else len(lease.slots)
        if not self._windowed and self._alone:
            return held, [pages] if pages else []
        allowed = frozenset(range(1, pages + 1))
        for name in self._windowed:
            landing = self._landings[name]
            lease = landing.hold(hashes[:pages], prefix=False)
            held.append((landing, lease))
            here = (lease.slots != NOWHERE).tolist()
            allowed &= restorable.trailing_pages(here, windows.get(name, 1)).prefixes
        return held, sorted(allowed)

    def _fetch_of(
        self, request: _Request, hashes: Sequence[str], windows: Mapping[str, int]
    ) -> Fetch | None:
        """A new one, unless these pages were asked for already."""
        known = request.fetch
        if (known is not None and known.asked_for(hashes[0])) or self._hangs():
            return None
        if known is not None:
            known.give_up()
        request.fetch = Fetch(tuple(hashes), dict(windows))
        request.waits_since = None
        return request.fetch

    def is_ready(self, rid: str) -> bool:
        """Whether a request need not wait any longer. From the first no on its time counts."""
        request = self._requests.get(rid)
        if request is None or request.fetch is None or request.fetch.is_over:
            return True
        now = self._clock()
        if request.waits_since is None:
            request.waits_since = now
        waited = now - request.waits_since
        request.seen = now
        is_spent = self._patience.is_spent(waited, len(request.fetch.hashes))
        if not is_spent and not self._hangs():
            return False
        request.fetch.give_up()
        return True

    def end(self, rid: str) -> None:
        """The request has loaded, or will not."""
        with self._lock:
            request = self._requests.pop(rid, None)
        if request is not None:
            _close(request)

    def end_all(self) -> None:
        with self._lock:
            requests, self._requests = self._requests, {}
        for request in requests.values():
            _close(request)

    def expire(self) -> None:
        """Forget requests that nobody has asked for in a long time."""
        long_ago = self._clock() - FORGET_SECONDS
        with self._lock:
            old = [rid for rid, request in self._requests.items() if request.seen < long_ago]
            gone = [self._requests.pop(rid) for rid in old]
        for request in gone:
            _close(request)


def _close(request: _Request) -> None:
    if request.fetch is not None:
        request.fetch.give_up()
        request.fetch.let_go()
    _let_go(request.promise)


def _let_go(leases: Leases) -> None:
    for landing, lease in leases:
        landing.let_go(lease)
