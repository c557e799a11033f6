"""Pages on their way from the device to the tiers, on a thread of their own.

What is stored already is not read from the device. The rest is gathered into staging memory, a batch at a time,
and put. Results come in the order of the offers.

All ranks must take the same offers, since SGLang locks the nodes of those that were taken, and counts them in step.
So how much waits is counted in pages from an offer to the taking of its result, which are the same on all ranks,
and not from what this rank's tiers have got through.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from queue import Empty, Queue, SimpleQueue
from typing import TYPE_CHECKING, Any

import torch

from ..kernels.pages import PageSegments
from .guard import harmless

if TYPE_CHECKING:
    from ..storage.chain import Chain
    from .device_pools import DevicePool

WAITING_BYTES = 1 << 30  # of pages that are taken and not yet done with; one offer may be larger
DEVICE_SHARE = 0.5  # and no more of the device's own memory, whose nodes SGLang keeps meanwhile
STAGE_BYTES = 32 << 20


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
    parts: Sequence[Part]
    ready: Sequence[Any]
    is_whole: bool


class Offloading:
    """The thread. It ends with `close`.

    Args:
        most: bytes that may wait.
    """

    def __init__(self, chain: Chain, most: int) -> None:
        self._chain = chain
        self._most = most
        self._sizes: deque[int] = deque()  # of the offers without a taken result
        self._waiting = 0
        self._queue: Queue[_Offer | None] = Queue()
        self._results: SimpleQueue[bool] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="lmcache-offload", daemon=True)
        self._thread.start()

    def offer(self, parts: Sequence[Part], ready: Sequence[Any], *, is_whole: bool = True) -> bool:
        """Take pages, unless too much waits.

        Args:
            ready: events after which they can be read.
            is_whole: there is something of each pool; else the result is a no, whatever is stored.
        """
        size = sum(part.bytes for part in parts)
        if self._waiting and self._waiting + size > self._most:
            return False
        self._waiting += size
        self._sizes.append(size)
        self._queue.put(_Offer(parts, ready, is_whole))
        return True

    def done(self) -> int:
        """Results that can be taken."""
        return self._results.qsize()

    def take(self) -> bool:
        """The oldest result: whether all pages of that offer are stored."""
        kept = self._results.get_nowait()
        self._waiting -= self._sizes.popleft()
        return kept

    def settle(self) -> None:
        """Wait until nothing is read from the device any more, and forget all results."""
        self._queue.join()
        while True:
            try:
                self.take()
            except Empty:
                return

    def close(self) -> None:
        """Idempotent."""
        self._queue.put(None)
        self._thread.join()

    def _serve(self) -> None:
        stage = _Stage()
        while (offer := self._queue.get()) is not None:
            kept = self._store_all(stage, offer)
            self._results.put(bool(kept))
            self._queue.task_done()
        self._queue.task_done()

    @harmless
    def _store_all(self, stage: _Stage, offer: _Offer) -> bool:
        for event in offer.ready:
            event.synchronize()
        # The KV last: a prefix is one only where its window, or its state, is there too.
        return all(self._store(stage, part) for part in reversed(offer.parts)) and offer.is_whole

    def _store(self, stage: _Stage, part: Part) -> bool:
        """Whether every page is stored now."""
        if not part.pool.is_stored_here:
            return True
        keys = [part.namespace + bytes.fromhex(each) for each in part.page_hashes]
        firsts = part.pool.first_rows(part.indices)
        kept = True
        for run in _runs(self._chain.exists(keys), stage.pages(part.pool)):
            records = stage.records(part.pool, len(run))
            part.pool.pages.gather(firsts[run.start : run.stop], records)
            before = part.namespace + bytes.fromhex(part.before) if part.before else b""
            outcome = self._chain.store(
                keys[run.start : run.stop],
                _rows(records),
                parent=keys[run.start - 1] if run.start else before,
                position=part.position + run.start,
            )
            kept = kept and all(page.kept for page in outcome)
        return kept


class _Stage:
    """Memory that pages are gathered into, one for all pools in turn."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    @staticmethod
    def pages(pool: DevicePool) -> int:
        return max(1, STAGE_BYTES // pool.page_bytes)

    def records(self, pool: DevicePool, pages: int) -> torch.Tensor:
        """uint8 [page, page_bytes]."""
        size = pages * pool.page_bytes
        if len(self._memory) < size:
            self._memory = torch.empty(max(size, STAGE_BYTES), dtype=torch.uint8)
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
