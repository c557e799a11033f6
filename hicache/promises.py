"""What requests were promised, and how long they wait until more can be.

SGLang aborts a request whose load fails after a hit was promised. So a lookup promises what lies in the landing,
leased for that request; and what does not is fetched by another thread, so that a later lookup finds it. Until
then the request waits, as SGLang's prefetch policy has it (patience.py): the plug-in asks `is_ready` where
SGLang's scheduler asks about its own prefetches.

Who does what:

    the plug-in  has SGLang look up when a request arrives and, as SGLang does by itself, when its turn comes. Before
                 that turn it asks `is_ready` of all that wait, and holds up whom any rank holds up (admission.py); after
                 it, `lost`. When a request was admitted or given up, it calls `end`: SGLang does not say of one that
                 goes on without a load.
    a lookup     begins a fetch only for pages that this request has not asked for yet, so one for a request whose
                 turn has come begins nothing, but where its turn came to more pages than it had asked for: the
                 device had their beginning, and lost it.
    `held_up`    begins the fetch once more where the first found the landing full and there is room now, or where the
                 request waited so long that what it held was given back.

Ranks may differ in what they answer to `is_ready`, since they agree on that; and in nothing else: `lost` is the same on
all, as all of them look up the same pages of the same requests in the same order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np

from . import restorable
from .fetching import Fetch
from .landing import NOWHERE

if TYPE_CHECKING:
    from .landing import Landing, Lease

FORGET_SECONDS = 60.0  # that a request holds pages which nobody asks for: others may need the room
MOST_REQUESTS = (
    65536  # of which the oldest is given up, by number and not by time: ranks must agree
)
BACK = 256  # pages that are looked at first for a window, from the end
LAST, SCALE = 16, 4  # of the prefixes that are told to other ranks: restorable.thinned

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
    fetch: Fetch | None = (
        None  # of all that it asked for; over from the start where all of that had landed
    )
    waits_since: float | None = None  # until it was first held up, it has waited for nothing
    asked: int = 0  # pages at most
    went_back: bool = (
        False  # its last lookup asked for more than those before, and its turn was not since then
    )
    was_short: bool = False  # its fetch, and it was begun once more
    is_forgotten: bool = False  # it holds nothing any more


class Promises:
    """Of one rank. Its calls come from the scheduler's thread, but for `expire`.

    Args:
        landings: of each pool by its name.
        windowed: those pools of which a prefix needs only its last pages.
        fetch: begins a fetch in another thread.
        patience: how long a request waits for one.
        hangs: whether the fetching thread may be in a call that has not come back in time, or has ended.
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
        self._again: list[Fetch] = []  # that were begun once more, and are not over

    def __len__(self) -> int:
        """Requests that hold something, or wait."""
        return len(self._requests)

    def look_up(self, rid: str, hashes: Sequence[str], windows: Mapping[str, int]) -> list[int]:
        """The prefixes, in pages, that a load of this request cannot miss. What it was promised before ends.

        Pages that it has not asked for yet, and that have not landed, begin to be fetched: see the module.

        Args:
            hashes: of the pages behind what the device has; nothing is done for fewer than `Patience.least_pages`.
            windows: of each pool that needs only the last pages of a prefix, how many.

        Returns:
            Shortest first: of an engine of one rank the longest, of several so many that they find a common one.
        """
        if len(hashes) < self._patience.least_pages:
            self.end(rid)
            return []
        promise, prefixes = self._hold(hashes, windows)
        lacks = not len(prefixes) or prefixes[-1] < len(hashes)
        with self._lock:
            request = self._requests.setdefault(rid, _Request(self._clock()))
            before, request.promise = request.promise, promise
            request.seen = self._clock()
            if len(hashes) > request.asked:
                request.asked, request.went_back = len(hashes), True
            known = request.fetch
            asked = self._ask_for(request, hashes, windows, lacks=lacks)
            oldest = self._surplus()
        _let_go(before)
        if oldest is not None:
            _close(oldest)
        if asked is not None and known is not None:
            asked.take_over(known)
        if asked is not None and lacks:
            self._fetch(asked)
        told = prefixes[-1:] if self._alone else restorable.thinned(prefixes, LAST, SCALE)
        return [int(prefix) for prefix in told]

    def _surplus(self) -> _Request | None:
        """A request that nobody told the end of, taken out."""
        if len(self._requests) <= MOST_REQUESTS:
            return None
        return self._requests.pop(next(iter(self._requests)))

    def _ask_for(
        self,
        request: _Request,
        hashes: Sequence[str],
        windows: Mapping[str, int],
        *,
        lacks: bool,
    ) -> Fetch | None:
        """The fetch of these pages, in place of the request's; None where it asked for them before."""
        known = request.fetch
        if (known is not None and known.asked_for(hashes[0])) or (lacks and self._hangs()):
            return None
        request.fetch = fetch = Fetch(tuple(hashes), dict(windows))
        request.waits_since = None
        request.was_short, request.is_forgotten = False, False
        if not lacks:
            fetch.end()
        return fetch

    def _hold(
        self, hashes: Sequence[str], windows: Mapping[str, int]
    ) -> tuple[Leases, restorable.Pages]:
        """Lease what is here of the pages; the prefixes that this allows, shortest first."""
        held: Leases = []
        pages = len(hashes)
        for name, landing in self._landings.items():
            if name in self._windowed:
                continue
            lease = landing.hold(hashes[:pages], prefix=True)
            held.append((landing, lease))
            pages = restorable.leading(lease.slots != NOWHERE)
        if not self._windowed:
            return held, np.arange(pages if pages and self._alone else 1, pages + 1)
        back = BACK if self._alone else pages
        while True:
            start = max(0, pages - back)
            leases, prefixes = self._ends_behind(start, hashes[start:pages], windows)
            if len(prefixes) or not start:
                return held + leases, prefixes
            _let_go(leases)
            back *= 8

    def _ends_behind(
        self, start: int, hashes: Sequence[str], windows: Mapping[str, int]
    ) -> tuple[Leases, restorable.Pages]:
        """Lease what is here of the windows of these pages; the prefixes that end among them with whole windows, all
        of which lie behind page `start`."""
        held: Leases = []
        allowed = np.ones(len(hashes), bool)
        for name in self._windowed:
            lease = self._landings[name].hold(hashes, prefix=False)
            held.append((self._landings[name], lease))
            window = windows.get(name, 1)
            allowed &= restorable.whole_windows(lease.slots != NOWHERE, window)
            if start:
                allowed[: window - 1] = False  # these begin before what was looked at
        return held, restorable.ends(allowed) + start

    def is_ready(self, rid: str) -> bool:
        """Whether a request need not wait any longer, for all that this rank knows. Changes nothing of it."""
        request = self._requests.get(rid)
        if request is None or request.fetch is None:
            return True
        if request.fetch.is_over:
            return not self._may_begin_again(request)
        waited = 0.0 if request.waits_since is None else self._clock() - request.waits_since
        return self._patience.is_spent(waited, request.fetch.pages) or self._hangs()

    def held_up(self, rid: str) -> None:
        """The scheduler wanted the request, and some rank is not ready. From the first time on its patience counts."""
        request = self._turn_of(rid)
        if request is None or request.fetch is None:
            return
        if request.fetch.is_over and self._may_begin_again(request):
            self._begin_again(request, request.fetch)
        if request.waits_since is None:
            request.waits_since = request.seen

    def goes_on(self, rid: str) -> None:
        """The scheduler wanted the request, and no rank holds it up: nothing more is read for it."""
        request = self._turn_of(rid)
        if request is not None and request.fetch is not None:
            request.fetch.give_up()

    def _turn_of(self, rid: str) -> _Request | None:
        request = self._requests.get(rid)
        if request is not None:
            request.seen = self._clock()
            request.went_back = False
        return request

    def _may_begin_again(self, request: _Request) -> bool:
        """Whether a fetch that is over might bring more now. Of one that was given up it would not."""
        fetch = request.fetch
        if fetch is None or self._patience.is_spent(0.0, fetch.pages) or self._hangs():
            return False
        if request.is_forgotten:
            return True
        if request.was_short or not fetch.was_short:
            return False
        self._again = [each for each in self._again if not each.is_over]
        return fetch.has_room_now(sum(each.pages for each in self._again))

    def _begin_again(self, request: _Request, before: Fetch) -> None:
        with self._lock:
            request.was_short = request.was_short or not request.is_forgotten
            request.is_forgotten = False
            request.waits_since = None
            request.fetch = fetch = before.again()
        self._again.append(fetch)
        self._fetch(fetch)

    def lost(self, rid: str) -> bool:
        """Whether a request whose turn has come should be held up after all, the same on every rank.

        Its lookup came to more pages than it had asked for: a device prefix that was there when it arrived is lost, and
        what is stored of that is being fetched only now. To be asked after the lookup of a turn, in the same pass. It
        does not repeat itself: each time there are more pages than before. Never where the policy does not wait.
        """
        request = self._requests.get(rid)
        if request is None or not request.went_back:
            return False
        return not self._patience.is_spent(0.0, request.asked)

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
        """Let go of what requests hold that nobody has asked for in a long time. They may come back, and then ask for
        it again. On the fetching thread."""
        long_ago = self._clock() - FORGET_SECONDS
        with self._lock:
            old = [each for each in self._requests.values() if each.seen < long_ago]
            held = [_forgotten(each) for each in old if not each.is_forgotten]
        for promise, fetch in held:
            _let_go(promise)
            if fetch is not None:
                fetch.rest()


def _forgotten(request: _Request) -> tuple[Leases, Fetch | None]:
    """What a request holds and is to be let go: what it was promised, and its fetch, if that is over."""
    promise, request.promise = request.promise, []
    request.is_forgotten = request.fetch is not None and request.fetch.is_over
    return promise, request.fetch if request.is_forgotten else None


def _close(request: _Request) -> None:
    if request.fetch is not None:
        request.fetch.give_up()
        request.fetch.let_go()
    _let_go(request.promise)


def _let_go(leases: Leases) -> None:
    for landing, lease in leases:
        landing.let_go(lease)
