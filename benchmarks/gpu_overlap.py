"""Whether attention on a layer can run while the next one is loading: copies a layer at a time beside matrix products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from time import perf_counter

import torch

from benchmarks.gpu_copies import LARGE
from lmcache_sglang.kernels.copy_plan import CopyPlan
from lmcache_sglang.kernels.cuda import CudaCopier
from lmcache_sglang.testing.torch_pools import Pool, PoolShape

MATRIX = 4096
ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Overlap:
    """Milliseconds, the best of some rounds.

    Attributes:
        copy: of all layers, alone.
        compute: of as much work on each layer, alone.
        both: of both, each layer's work behind its copy.
        whole_first: of the work behind the copy of all layers in one launch.
        asking: of the thread that enqueues the copies of all layers.
        right: the bytes were compared afterwards.
    """

    copy: float
    compute: float
    both: float
    whole_first: float
    asking: float
    right: bool

    @property
    def hidden(self) -> float:
        """Which part of the shorter one costs no time: 1 is all of it."""
        return (self.copy + self.compute - self.both) / min(self.copy, self.compute)


def measure(copier: CudaCopier, shape: PoolShape = LARGE) -> Overlap:
    """On the current GPU."""
    work = _Work(copier, shape)
    return Overlap(
        copy=_best(work.copy_by_layer),
        compute=_best(work.compute),
        both=_best(work.both),
        whole_first=_best(work.whole_first),
        asking=_asking(work.copy_by_layer),
        right=work.is_right(),
    )


class _Work:
    """As much work as the copy takes, cut into layers."""

    def __init__(self, copier: CudaCopier, shape: PoolShape) -> None:
        self._copier = copier
        self._src = Pool("page_first", shape, pinned=True)
        self._dst = Pool("device", shape, device="cuda")
        self._plan = CopyPlan.of_pages(
            range(shape.pages), range(shape.pages), page_size=shape.page_size
        )
        self._loading = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._a, self._b = (torch.randn(MATRIX, MATRIX, device="cuda").half() for _ in range(2))
        self._layers, self._products = shape.layers, 1
        self._products = max(1, round(_best(self.copy_by_layer) / _best(self.compute)))

    def copy_by_layer(self) -> list[torch.cuda.Event]:
        self._loading.wait_stream(torch.cuda.current_stream())
        events = self._copier.copy_by_layer(
            self._plan, self._src.layout, self._dst.layout, stream=self._loading
        )
        torch.cuda.current_stream().wait_stream(self._loading)
        return events  # type: ignore[return-value]  # what the copier gets of torch

    def is_right(self) -> bool:
        """Whether one more such copy, beside the work, brings all bytes."""
        self._src.fill(1)
        self._dst.fill(2)
        torch.cuda.synchronize()
        self.both()
        torch.cuda.synchronize()
        return all(
            torch.equal(
                self._src.rows(plane, layer).contiguous().view(torch.uint8),
                self._dst.rows(plane, layer).cpu().contiguous().view(torch.uint8),
            )
            for plane, layer in product(range(self._src.planes), range(self._layers))
        )

    def compute(self) -> None:
        for _ in range(self._layers):
            self._compute_a_layer()

    def both(self) -> None:
        self._loading.wait_stream(torch.cuda.current_stream())
        events = self._copier.copy_by_layer(
            self._plan, self._src.layout, self._dst.layout, stream=self._loading
        )
        for event in events:
            torch.cuda.current_stream().wait_event(event)  # type: ignore[arg-type]
            self._compute_a_layer()

    def whole_first(self) -> None:
        self._copier.copy(self._plan, self._src.layout, self._dst.layout)
        self.compute()

    def _compute_a_layer(self) -> None:
        for _ in range(self._products):
            torch.mm(self._a, self._b)


def _best(work: Callable[[], object]) -> float:
    return min(milliseconds(work) for _ in range(ROUNDS))


def milliseconds(work: Callable[[], object]) -> float:
    """Of what one call enqueues, on the GPU's clock."""
    begin, end = (_event() for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _asking(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    begun = perf_counter()
    work()
    taken = (perf_counter() - begun) * 1e3
    torch.cuda.synchronize()
    return taken
