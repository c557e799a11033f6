"""What SGLang's metrics are told of a backend, and why pages were not restored."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock

from sglang.srt.observability.metrics_collector import StorageMetrics


@dataclass
class StoreMetrics(StorageMetrics):  # type: ignore[misc]  # SGLang is not typed
    """SGLang's own, and more for who asks: SGLang reads its own fields and passes over the rest.

    Attributes:
        reasons: says why pages were not restored or not stored, and how many times, since the backend was
            attached. ``"<tier>.<reason>"`` of a tier's failures; ``pieces.missing`` of pages that others stored
            only a part of; ``recompute.faster`` of pages that were not worth reading; ``reader.hangs`` of pages
            asked for while a read is overdue; ``kinds.<why>`` of kinds of page in the store that this engine cannot
            read; ``failed.<call>`` of calls that ended in a mistake of this package's own.
    """

    reasons: Callable[[], dict[str, int]] = field(default=dict, compare=False, repr=False)


class Statistics:
    """Of one backend; its storage threads report, SGLang's scheduler takes.

    Args:
        collected: whether SGLang collects metrics; if not, there is nothing to take.
        reasons: as `StoreMetrics.reasons`, of what is counted elsewhere.
    """

    def __init__(self, collected: bool, reasons: Callable[[], dict[str, int]]) -> None:
        self._collected = collected
        self._elsewhere = reasons
        self._lock = Lock()
        self._counts: Counter[str] = Counter()
        self._metrics = StoreMetrics(reasons=self.reasons)

    def moved(self, *, read: bool, pages: int, size: int, started: float) -> None:
        """A batch ended. Args: pages: that moved. size: bytes of each. started: by `time.perf_counter`."""
        if pages == 0 or not self._collected:
            return
        rate = pages * size / 1e9 / max(time.perf_counter() - started, 1e-9)
        with self._lock:
            metrics = self._metrics
            counts = metrics.prefetch_pgs if read else metrics.backup_pgs
            rates = metrics.prefetch_bandwidth if read else metrics.backup_bandwidth
            counts.append(pages)
            rates.append(rate)

    def missed(self, reason: str, pages: int) -> None:
        """Pages were not restored."""
        if pages:
            with self._lock:
                self._counts[reason] += pages

    def take(self) -> StoreMetrics | None:
        """What was not taken yet; None when SGLang does not collect any."""
        if not self._collected:
            return None
        with self._lock:
            taken, self._metrics = self._metrics, StoreMetrics(reasons=self.reasons)
        return taken

    def reasons(self) -> dict[str, int]:
        """All there are, by name."""
        with self._lock:
            counted = dict(self._counts)
        return dict(sorted((counted | self._elsewhere()).items()))
