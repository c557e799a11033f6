"""Pages on their way from the device to the tiers, on a thread of their own.

What is stored already is not read from the device. The rest is gathered into staging memory, a batch at a time,
and put. Results come in the order of the offers.

All ranks must take the same offers, since SGLang locks the nodes of those that were taken, and counts them in step.
So how much waits is counted in pages from an offer to the taking of its result, which are the same on all ranks,
and not from what this rank's tiers have got through.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import torch

from ..kernels.pages import PageSegments
from ..storage.chain import CLOSE_SECONDS
from .guard import harmless
from .streams import OwnStream

if TYPE_CHECKING:
    from ..storage.chain import Chain
    from .device_pools import DevicePool

logger = logging.getLogger(__name__)

WAITING_BYTES = 1 << 30  # of pages that are taken and not yet done with; one offer may be larger
DEVICE_SHARE = 0.5  # and no more of the device's own memory, whose nodes SGLang keeps meanwhile
AGAIN_SHARE = 0.25  # of these bytes, for what is offered again because a window of it may have come
REMEMBERED = 16384  # offers that may be offered again
STAGE_BYTES = 32 << 20
GRACE_SECONDS = 5.0  # longest that SGLang's thread waits for what is still to be stored


@dataclass(frozen=True, slots=True)
class Part:
    """Pages of one pool.

    Attributes:
        namespace: when they were offered.
        page_hashes: one run of a chain.
        indices: their places on the device, as SGLang gave them.
        before: the hash of the page before them; empty when they begin their chain, or it is not known.
        position: of the first of them in the chain.
    """

    pool: DevicePool
    namespace: bytes
    page_hashes: list[str]
    indices: torch.Tensor
    before: str = ""
    position: int = 0

    @property
    def bytes(self) -> int:
        return len(self.page_hashes) * self.pool.page_bytes


@dataclass(frozen=True, slots=True)
class _Offer:
    number: int
    parts: Sequence[Part]
    ready: Sequence[Any]
    is_whole: bool


class _Budget:
    """Bytes that may wait."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._waiting = 0

    def takes(self, size: int) -> bool:
        """One that is larger than all that may wait is taken alone."""
        if self._waiting and self._waiting + size > self._most:
            return False
        self._waiting += size
        return True

    def give_back(self, size: int) -> None:
        self._waiting -= size


class Offloading:
    """The thread. It ends with `close`. All calls come from SGLang's thread.

    Args:
        most: bytes that may wait.
    """

    def __init__(self, chain: Chain, most: int) -> None:
        self._chain = chain
        again = int(most * AGAIN_SHARE)
        self._first, self._again = _Budget(most - again), _Budget(again)
        self._lacking: OrderedDict[tuple[str, ...], None] = OrderedDict()
        self._sizes: deque[tuple[_Budget, int]] = deque()  # of the offers without a taken result
        self._queue: SimpleQueue[_Offer | None] = SimpleQueue()
        self._offered = 0
        self._changed = threading.Condition()  # around all below
        self._unanswered = 0
        self._dropped = (
            0  # offers below this number are not stored, nor read from the device, any more
        )
        self._forgotten = 0  # and of those below this one nobody wants the result
        self._is_reading = False
        self._results: deque[bool] = deque()
        self._thread = threading.Thread(target=self._serve, name="lmcache-offload", daemon=True)
        self._thread.start()

    def offer(self, parts: Sequence[Part], ready: Sequence[Any], *, is_whole: bool = True) -> bool:
        """Take pages, unless too much waits.

        Args:
            ready: events after which they can be read.
            is_whole: there is something of each pool; else the result is a no, whatever is stored, and SGLang offers
                the same again, before its children. What it offers again has a budget of its own: else a long prefix
                without windows would leave no room for what is new, each time anew.
        """
        mark = () if is_whole else tuple(part.page_hashes[-1] for part in parts)
        budget = self._again if mark in self._lacking else self._first
        size = sum(part.bytes for part in parts)
        if not budget.takes(size):
            return False
        if mark:
            self._remember(mark)
        self._sizes.append((budget, size))
        with self._changed:
            self._unanswered += 1
        self._queue.put(_Offer(self._offered, parts, ready, is_whole))
        self._offered += 1
        return True

    def _remember(self, mark: tuple[str, ...]) -> None:
        self._lacking[mark] = None
        self._lacking.move_to_end(mark)
        if len(self._lacking) > REMEMBERED:
            self._lacking.popitem(last=False)

    def done(self) -> int:
        """Results that can be taken."""
        return len(self._results)

    def take(self) -> bool:
        """The oldest result: whether all pages of that offer are stored."""
        kept = self._results.popleft()
        budget, size = self._sizes.popleft()
        budget.give_back(size)
        return kept

    def wait(self, seconds: float) -> bool:
        """Until every offer has its result; False when the time is over."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._unanswered, seconds)

    def cut_off(self, seconds: float = GRACE_SECONDS) -> bool:
        """Store no more of what was offered than can be in this time; the results of the rest are no's.

        Returns:
            Whether nothing of it is being written any more; a tier that hangs may still write one batch.
        """
        is_done = self.wait(seconds)
        with self._changed:
            if not is_done:
                logger.warning(
                    "lmcache: a tier is slow: %d offloads are not stored", self._unanswered
                )
            self._dropped = self._offered
            self._changed.wait_for(
                lambda: not self._is_reading
            )  # as long as a copy in memory takes
        return is_done or self.wait(0.0)

    def settle(self, seconds: float = GRACE_SECONDS) -> bool:
        """Read nothing from the device any more, and forget all results; what the time is too short for is dropped.

        Returns:
            Whether nothing is being written any more.
        """
        is_done = self.cut_off(seconds)
        with self._changed:
            self._forgotten = self._offered
            self._results.clear()
        while self._sizes:
            budget, size = self._sizes.popleft()
            budget.give_back(size)
        return is_done

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Idempotent. A thread that hangs in a tier is left behind."""
        is_done = self.settle(seconds)
        self._queue.put(None)
        if is_done:
            self._thread.join()

    def _serve(self) -> None:
        stage, own = _Stage(), OwnStream()
        while (offer := self._queue.get()) is not None:
            kept = self._store_all(stage, own, offer)
            self._answer(offer, kept=kept is True)

    def _answer(self, offer: _Offer, *, kept: bool) -> None:
        with self._changed:
            self._unanswered -= 1
            if offer.number >= self._forgotten:
                self._results.append(kept)
            self._changed.notify_all()

    @harmless
    def _store_all(self, stage: _Stage, own: OwnStream, offer: _Offer) -> bool:
        if offer.number < self._dropped:
            return False
        for event in offer.ready:
            event.synchronize()
        # The KV last: a prefix is one only where its window, or its state, is there too.
        parts = reversed(offer.parts)
        return all(self._store(stage, own, offer, part) for part in parts) and offer.is_whole

    def _store(self, stage: _Stage, own: OwnStream, offer: _Offer, part: Part) -> bool:
        """Whether every page is stored now."""
        if not part.pool.is_stored_here:
            return True
        keys = [part.namespace + bytes.fromhex(each) for each in part.page_hashes]
        kept = True
        for run in _runs(self._chain.exists(keys), stage.pages(part.pool)):
            records = stage.records(part.pool, len(run))
            if not self._gather(own, offer, part, run, records):
                return False
            before = part.namespace + bytes.fromhex(part.before) if part.before else b""
            outcome = self._chain.store(
                keys[run.start : run.stop],
                _rows(records),
                parent=keys[run.start - 1] if run.start else before,
                position=part.position + run.start,
            )
            kept = kept and all(page.kept for page in outcome)
        return kept

    def _gather(
        self, own: OwnStream, offer: _Offer, part: Part, run: range, records: torch.Tensor
    ) -> bool:
        """Copy pages from the device, unless they were dropped: their places may be another's by now."""
        with self._changed:
            if offer.number < self._dropped:
                return False
            self._is_reading = True
        try:
            with own.on(part.indices.device) as stream:
                firsts = part.pool.first_rows(part.indices)
                part.pool.pages.gather(firsts[run.start : run.stop], records)
                if stream is not None:
                    stream.synchronize()
        finally:
            with self._changed:
                self._is_reading = False
                self._changed.notify_all()
        return True


class _Stage:
    """Memory that pages are gathered into, one for all pools in turn."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    @staticmethod
    def pages(pool: DevicePool) -> int:
        return max(1, STAGE_BYTES // pool.page_bytes)

    def records(self, pool: DevicePool, pages: int) -> torch.Tensor:
        """uint8 [page, page_bytes]; pinned where the pool is on a device."""
        size = pages * pool.page_bytes
        if len(self._memory) < size:
            pinned = pool.pages.is_on_device
            self._memory = torch.empty(max(size, STAGE_BYTES), dtype=torch.uint8, pin_memory=pinned)
        return self._memory[:size].view(pages, pool.page_bytes)


def _runs(stored: Sequence[bool], most: int) -> Iterator[range]:
    """The pages that are not stored, in runs of no more than so many."""
    start = None
    for page, there in enumerate([*stored, True]):
        if start is not None and (there or page - start == most):
            yield range(start, page)
            start = None
        if not there and start is None:
            start = page


def _rows(records: torch.Tensor) -> PageSegments:
    size, start = records.shape[1], records.data_ptr()
    addresses = [start + row * size for row in range(len(records))]
    return PageSegments(addresses, [size] * len(addresses), 1, records)
