"""Pages for who asks: requests, their credit, and in which turn they are read. No socket in it.

Requests take turns, a batch of pages each. A batch is read by a worker into a buffer of its own and sent from there
without another copy; the buffers, and so all memory that requests can take, are bounded (`in_flight`). Only
pages of a namespace that is shared are ever looked up.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from ..base import NAMESPACE_BYTES
from .messages import Cancel, Credit, Get, NotUnderstoodError, Why, Without, split_keys

T = TypeVar("T")

BATCH_BYTES = 4 << 20  # read at once; or one page, if that is larger
REQUESTS_MOST = 1024  # of all askers together
OWNER_MOST = REQUESTS_MOST // 4  # of one
IDLE_SECONDS = 60.0  # without credit, after which a request is forgotten


@dataclass(eq=False, slots=True)
class Request:
    """A `Get` that is being answered.

    Attributes:
        route: of who asked.
        owner: a number for the key that was proved, or the connection where none is: shares are by it.
        next: place of the first page that was not read yet.
        credit: bytes that may still be sent; a page that was begun goes to its end, so it may be negative.
    """

    route: bytes
    owner: int
    number: int
    keys: list[bytes]
    lengths: list[int]
    frame: int
    credit: int
    since: float  # when its asker was last heard of
    next: int = 0
    is_over: bool = False
    is_read: bool = field(default=False)  # a worker is at it

    @property
    def can_go_on(self) -> bool:
        return not self.is_over and not self.is_read and self.credit > 0


@dataclass(frozen=True, slots=True)
class Passed:
    """Pages that do not come, and who is to know."""

    route: bytes
    without: Without


@dataclass(frozen=True, slots=True)
class Batch:
    """Pages to be read together: places `first` to `end` of a request."""

    request: Request
    first: int
    end: int
    bytes: int


class Serving:
    """The requests of all askers.

    Args:
        shares: whether pages of a namespace may be given away.
        per_route: requests of one connection at once.

    Attributes:
        has_room: whether so many bytes may be read now for an owner; what has none waits, and lets others go first.
    """

    def __init__(self, shares: Callable[[bytes], bool], per_route: int) -> None:
        self.shares = shares
        self.per_route = per_route
        self.batch_most = BATCH_BYTES
        self.has_room: Callable[[int, int], bool] = lambda _owner, _bytes: True
        self.turned_away = 0  # requests that there was no room for
        self._requests: OrderedDict[tuple[bytes, int], Request] = OrderedDict()
        self._of_route: Counter[bytes] = Counter()
        self._of_owner: Counter[int] = Counter()
        self._turns: dict[Request, None] = {}  # those that can go on, in their turn

    def __len__(self) -> int:
        return len(self._requests)

    def get(
        self, route: bytes, owner: int, asked: Get, largest: int, now: float
    ) -> Iterator[Passed]:
        """Take a request; what is said at once of pages that will not come.

        Args:
            largest: bytes of the largest page that there is memory for.
        """
        keys = split_keys(asked.keys)
        if not keys or len(keys) != len(asked.lengths):
            raise NotUnderstoodError("keys and lengths must be equally many")
        name = (route, asked.request)
        if self._is_full(route, owner) or name in self._requests:
            self.turned_away += 1
            yield Passed(route, Without(asked.request, 0, len(keys), Why.BUSY))
            return
        lengths = [
            length if length <= largest and self.shares(key[:NAMESPACE_BYTES]) else 0
            for key, length in zip(keys, asked.lengths, strict=True)
        ]
        request = Request(
            route, owner, asked.request, keys, lengths, asked.frame, asked.credit, now
        )
        self._requests[name] = request
        self._of_route[route] += 1
        self._of_owner[owner] += 1
        self._turns[request] = None

    def _is_full(self, route: bytes, owner: int) -> bool:
        """Also where there is room: nobody takes more than his share of it."""
        return (
            self._of_route.get(route, 0) >= self.per_route
            or self._of_owner.get(owner, 0) >= OWNER_MOST
            or len(self) >= REQUESTS_MOST
        )

    def credit(self, route: bytes, more: Credit, now: float) -> None:
        request = self._requests.get((route, more.request))
        if request is None:
            return
        could = request.can_go_on
        request.credit += more.bytes
        request.since = now
        if not could and request.can_go_on:
            self._turns[request] = None

    def cancel(self, route: bytes, cancel: Cancel) -> None:
        request = self._requests.get((route, cancel.request))
        if request is not None:
            self._end(request)

    def gone(self, route: bytes) -> None:
        """Nobody is there any more."""
        for request in [r for r in self._requests.values() if r.route == route]:
            self._end(request)

    def expire(self, now: float) -> None:
        """Forget requests whose askers say nothing more."""
        for request in list(self._requests.values()):
            if now - request.since > IDLE_SECONDS and not request.is_read:
                self._end(request)

    def turn(self) -> Batch | Passed | None:
        """What comes next: pages to read, pages that do not come, or nothing to do."""
        for request in self._turns:
            if not request.lengths[request.next]:
                return self._passed(request)
            batch = self._batch(request)
            if self.has_room(request.owner, batch.bytes):
                return batch
        return None

    def begun(self, batch: Batch) -> None:
        """A worker reads a batch that `turn` named."""
        del self._turns[batch.request]
        batch.request.is_read = True
        batch.request.next = batch.end
        batch.request.credit -= batch.bytes

    def done(self, batch: Batch) -> None:
        """A batch was read, and what came of it was sent."""
        request = batch.request
        request.is_read = False
        if request.next == len(request.keys):
            self._end(request)
        elif request.can_go_on:
            self._turns[request] = None

    def _passed(self, request: Request) -> Passed:
        """Pages that are not shared, or larger than anything that can be sent."""
        first = request.next
        while request.next < len(request.keys) and not request.lengths[request.next]:
            request.next += 1
        if request.next == len(request.keys):
            self._end(request)
        without = Without(request.number, first, request.next - first, Why.ABSENT)
        return Passed(request.route, without)

    def _batch(self, request: Request) -> Batch:
        most = min(self.batch_most, request.credit)
        first, end = request.next, request.next + 1
        size = request.lengths[first]
        while end < len(request.keys) and request.lengths[end]:
            if size + request.lengths[end] > most:
                break
            size += request.lengths[end]
            end += 1
        return Batch(request, first, end, size)

    def _end(self, request: Request) -> None:
        if request.is_over:
            return
        request.is_over = True
        self._turns.pop(request, None)
        name = (request.route, request.number)
        if self._requests.get(name) is request:
            del self._requests[name]
            _count_down(self._of_route, request.route)
            _count_down(self._of_owner, request.owner)


def _count_down(counter: Counter[T], key: T) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]
