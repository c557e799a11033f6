"""Pages on their way from the landing to the device, layer by layer, on a thread of their own.

SGLang's attention waits for each layer by the counter, so it works on one while the next is copied. When all are
there, the records are verified once more: what was copied before the last look at it may be damaged all the same,
and the scheduler asks about that after the forward pass, before anything of it is used.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from queue import Queue
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .landing import NOWHERE, Landing, Lease
from .layer_counter import LayerCounter
from .streams import OwnStream

if TYPE_CHECKING:
    from .device_pools import DevicePool

logger = logging.getLogger(__name__)


class Damaged(RuntimeError):
    """What was promised is not what the landing has."""


@dataclass(frozen=True, slots=True)
class Part:
    """Pages of one pool for one request.

    Attributes:
        lease: their records, given back when they are loaded, or will not be.
        indices: their places on the device, as SGLang gave them.
    """

    pool: DevicePool
    landing: Landing
    lease: Lease
    indices: torch.Tensor

    def let_go(self) -> None:
        self.landing.let_go(self.lease)


@dataclass(frozen=True, slots=True)
class _Batch:
    index: int
    parts: Sequence[Part]
    ready: Sequence[Any]  # events after which nobody writes to these places any more
    verdict: Future[bool]


class Loading:
    """The thread. It ends with `close`.

    Args:
        layers: that a load goes through.
        tell: of so many damaged records.
    """

    def __init__(self, layers: int, tell: Callable[[int], None]) -> None:
        self.counter = LayerCounter(layers)
        self._layers = layers
        self._tell = tell
        self._verdicts: dict[int, Future[bool]] = {}
        self._queue: Queue[_Batch | None] = Queue()
        self._thread = threading.Thread(target=self._serve, name="lmcache-load", daemon=True)
        self._thread.start()

    def start(self, parts: Sequence[Part], ready: Sequence[Any]) -> int:
        """Begin to load; the counter's index for it.

        Args:
            ready: events after which nobody writes to the places of these pages any more. A forward pass that is
                still under way may: SGLang gives out the places of a request that has ended while the pass after
                its last one still writes to them.
        """
        index: int = self.counter.update_producer()
        verdict = self._verdicts[index] = Future()
        self._queue.put(_Batch(index, parts, ready, verdict))
        return index

    def finish(self, index: int) -> bool:
        """Wait until a load has ended; whether everything of it came, and was whole afterwards."""
        landed = self.counter.finish(index)
        verdict = self._verdicts.pop(index, None)
        return bool(landed) and (verdict is None or verdict.result())

    def settle(self) -> None:
        """Wait until nothing is loaded any more, and forget what was."""
        self._queue.join()
        self._verdicts.clear()
        self.counter.reset()

    def close(self) -> None:
        """Idempotent."""
        self._queue.put(None)
        self._thread.join()

    def _serve(self) -> None:
        own = OwnStream()
        while (batch := self._queue.get()) is not None:
            whole = False
            try:
                with own.on(batch.parts[0].indices.device) as stream:
                    whole = self._load(batch, stream)
            except Exception as error:  # of every kind:
                # Attention waits for the layers of this load with no limit, so whatever went wrong, torch's
                # and the driver's errors too, must reach the counter. That hands it on, and these requests are aborted.
                logger.error("lmcache: a load failed", exc_info=error)
                self.counter.fail(batch.index, error)
            finally:
                for part in batch.parts:
                    part.let_go()
                batch.verdict.set_result(whole)
                self._queue.task_done()
        self._queue.task_done()

    def _load(self, batch: _Batch, stream: Any) -> bool:
        """Whether what was copied is whole. Raises: Damaged: it is not there."""
        for event in batch.ready:
            event.synchronize()
        try:
            self._copy(batch, stream)
        finally:
            if stream is not None:
                stream.synchronize()  # also after a failure: the records are given back, and the pages too
        wrong = sum(len(part.landing.damaged(part.lease)) for part in batch.parts)
        if wrong:
            self._tell(wrong)
        return not wrong

    def _copy(self, batch: _Batch, stream: Any) -> None:
        with ExitStack() as copies:
            scatters = [
                copies.enter_context(pool.pages.scattering(rows, landing.records, chosen))
                for pool, landing, rows, chosen in _by_pool(batch.parts)
            ]
            for layer in range(self._layers):
                for scatter in scatters:
                    scatter(layer)
                self.counter.enqueued(batch.index, layer, stream)


def _by_pool(
    parts: Sequence[Part],
) -> list[tuple[DevicePool, Landing, torch.Tensor, torch.Tensor]]:
    """For each pool the pages of all requests: its landing, their first rows, their records.

    Raises: Damaged.
    """
    groups: dict[str, list[Part]] = {}
    for part in parts:
        groups.setdefault(part.pool.name, []).append(part)
    return [
        (
            same[0].pool,
            same[0].landing,
            torch.cat([part.pool.first_rows(part.indices) for part in same]),
            torch.from_numpy(_slots(same)),
        )
        for same in groups.values()
    ]


def _slots(parts: Sequence[Part]) -> Any:
    slots = np.concatenate([part.lease.slots for part in parts])
    if (slots == NOWHERE).any():
        raise Damaged(f"pages of {parts[0].pool.name} are not in the landing any more")
    return slots
