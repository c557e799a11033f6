"""Copies of pages on one GPU: between its pools, and between them and pinned memory of the host."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ...errors import CudaError, CudaUnavailableError
from ..copy_plan import CopyPlan
from ..layout import PageLayout
from .build import Built, cubin_for
from .choice import Way, blocks_for, choose
from .driver import Gpu
from .layered import LayeredCopy
from .prepared import PreparedCopy, PreparedLayers
from .reach import Reach
from .staging import SMALLEST, Area, Passed, Staging

if TYPE_CHECKING:
    import torch

PINNED_AHEAD = 8  # areas for tables


class Stream(Protocol):
    """A torch.cuda.Stream."""

    @property
    def cuda_stream(self) -> int: ...


class Memory(Protocol):
    """Where tables are put, and how one knows that the GPU is past something."""

    def area(self, size: int, stream: Stream) -> Area: ...
    def passed(self, stream: Stream) -> Passed: ...
    def current_stream(self) -> Stream: ...


class CudaCopier:
    """The copies of one GPU. Safe for many threads, but for `close`; lives until the GPU is past its copies.

    No call but `close` waits for the GPU, and none is made under a lock that another one takes.

    Args:
        device: the GPU.
        cubins: folder in which compiled kernels are kept.
        memory: torch's, but in tests.

    Attributes:
        built: the kernels in use.

    Raises:
        ValueError: `device` is no GPU.
        CudaUnavailableError: kernels can be built or run by nothing that is here. Use the engine's own.
    """

    def __init__(
        self, device: torch.device | int, *, cubins: Path, memory: Memory | None = None
    ) -> None:
        index = device if isinstance(device, int) else _index_of(device)
        self._gpu = Gpu(index)
        try:
            with self._gpu.current():
                self.built: Built = cubin_for(self._gpu.arch, cubins, self._take)
            self._memory = memory or _TorchMemory(index)
        except CudaError:
            self._gpu.close()
            raise
        self._staging: dict[int, Staging] = {}
        self._used: dict[int, Stream] = {}
        self._reach = Reach(self._gpu.allocation_at)
        self._closed = False

    def copy(
        self,
        plan: CopyPlan,
        src: PageLayout,
        dst: PageLayout,
        *,
        scales: PageLayout | None = None,
        stream: torch.cuda.Stream | None = None,
        way: Way | None = None,
        most_blocks: int | None = None,
    ) -> int:
        """Enqueues one copy. The memory of all layouts must live until the stream is past it.

        Args:
            scales: as of `copy_pages`.
            stream: torch's; None: the current one.
            way: kernel or copy engine; None: as `choice.choose` says.
            most_blocks: of a launch, at least 1; None: as `choice.blocks_for` says.

        Returns:
            Bytes that are read.

        Raises:
            ValueError, IndexError: as `copy_pages`; or memory that the GPU does not reach; or this is closed. Nothing
                is enqueued.
            CudaError: the driver refused.
        """
        self._require_open()
        if most_blocks is not None and most_blocks < 1:
            raise ValueError(f"most_blocks: {most_blocks} is less than 1")
        prepared = PreparedCopy(plan, src, dst, scales)
        if prepared.run_count == 0:
            return 0
        onto: Stream = stream or self._memory.current_stream()
        with self._gpu.current():
            over_link = self._over_link(src, dst, scales)
            if (way or self._choose(prepared, prepared.bytes, over_link)) is Way.ENGINE:
                self._use(onto)
                self._gpu.copy_batch(*prepared.runs(), onto.cuda_stream)
            else:
                blocks = most_blocks or blocks_for(over_link=over_link, sms=self._gpu.sms)
                self._launch(prepared, onto, blocks)
        return prepared.bytes

    def layered(
        self,
        plan: CopyPlan,
        src: PageLayout,
        dst: PageLayout,
        *,
        scales: PageLayout | None = None,
        stream: torch.cuda.Stream | None = None,
    ) -> LayeredCopy:
        """Plans the copies of all layers of the plan at once, and enqueues what their launches read.

        Args:
            scales: as of `copy_pages`.
            stream: torch's, of all layers; None: the current one.

        Raises:
            ValueError, IndexError: as `copy`. Nothing is enqueued, of no layer.
            CudaError: the driver refused.
        """
        self._require_open()
        prepared = PreparedLayers(plan, src, dst, scales)
        onto: Stream = stream or self._memory.current_stream()
        if prepared.run_count == 0:
            return self._layered(prepared, lambda _: None)
        with self._gpu.current():
            over_link = self._over_link(src, dst, scales)
            if self._choose(prepared, prepared.layer_bytes, over_link) is Way.ENGINE:
                return self._by_engine(prepared, onto)
            blocks = blocks_for(over_link=over_link, sms=self._gpu.sms)
            return self._by_kernel(prepared, onto, blocks)

    def copy_by_layer(
        self,
        plan: CopyPlan,
        src: PageLayout,
        dst: PageLayout,
        *,
        scales: PageLayout | None = None,
        stream: torch.cuda.Stream | None = None,
    ) -> list[Passed]:
        """Enqueues all layers of `layered` at once, in order.

        Returns:
            For each layer of the plan, in order, an event that is passed when it is there (a torch.cuda.Event).

        Raises:
            ValueError, IndexError: as `copy`. Nothing is enqueued, of no layer.
            CudaError: the driver refused. Layers before it may have been enqueued: what `dst` holds is undefined, and
                neither side may be freed before the stream is past them.
        """
        onto: Stream = stream or self._memory.current_stream()
        events = []
        with self.layered(plan, src, dst, scales=scales, stream=onto) as copies:  # type: ignore[arg-type]
            for layer in copies.layers:
                copies.copy(layer)
                events.append(self._memory.passed(onto))
        return events

    def close(self) -> None:
        """Waits for the streams that copies were enqueued on, and gives the kernels back.

        No other call may be under way. Those that follow raise ValueError, of copies made by `layered` too.
        """
        if self._closed:
            return
        self._closed = True
        try:
            for stream in self._used.values():
                self._memory.passed(stream).synchronize()
        finally:
            self._staging.clear()
            self._gpu.close()

    def _take(self, built: Built) -> None:
        self._gpu.load(built.cubin, built.source)

    def _require_open(self) -> None:
        if self._closed:
            raise ValueError("copier: it is closed")

    def _over_link(self, src: PageLayout, dst: PageLayout, scales: PageLayout | None) -> bool:
        """Whether memory of the host takes part. Raises ValueError where the GPU does not reach all of it."""
        sides = [src, dst] if scales is None else [src, dst, scales]
        on_host = [self._reach.is_on_host(side) for side in sides]  # all are looked at
        return any(on_host)

    def _choose(
        self, prepared: PreparedCopy | PreparedLayers, bytes_moved: int, over_link: bool
    ) -> Way:
        return choose(
            converts=prepared.converts,
            bytes_moved=bytes_moved,
            runs=prepared.run_count,
            over_link=over_link,
            batched=self._gpu.batches,
        )

    def _launch(self, prepared: PreparedCopy, stream: Stream, most_blocks: int) -> None:
        staging = self._use(stream)
        area = staging.take(prepared.table_bytes)
        try:
            launches = prepared.launches(area.host, area.device, most_blocks)
            self._upload(area, prepared.table_bytes, stream)
            for launch in launches:
                self._gpu.launch(launch, stream.cuda_stream)
        finally:
            staging.give(area, self._memory.passed(stream))

    def _by_kernel(self, prepared: PreparedLayers, stream: Stream, most_blocks: int) -> LayeredCopy:
        staging = self._use(stream)
        area = staging.take(prepared.table_bytes)

        def enqueue(layer: int) -> None:
            for launch in launches[layer]:
                self._gpu.launch(launch, stream.cuda_stream)

        def give() -> None:
            staging.give(area, self._memory.passed(stream))

        try:
            launches = prepared.launches(area.host, area.device, most_blocks)
            self._upload(area, prepared.table_bytes, stream)
        except (ValueError, CudaError):
            give()
            raise
        return self._layered(prepared, enqueue, give)

    def _by_engine(self, prepared: PreparedLayers, stream: Stream) -> LayeredCopy:
        copies = prepared.copies()
        self._use(stream)

        def enqueue(layer: int) -> None:
            self._gpu.copy_batch(*copies[layer].runs(), stream.cuda_stream)

        return self._layered(prepared, enqueue)

    def _layered(
        self,
        prepared: PreparedLayers,
        enqueue: Callable[[int], None],
        done: Callable[[], None] = lambda: None,
    ) -> LayeredCopy:
        def within_the_context(layer: int) -> None:
            self._require_open()
            with self._gpu.current():
                enqueue(layer)

        return LayeredCopy(prepared.layers, prepared.layer_bytes, within_the_context, done)

    def _upload(self, area: Area, size: int, stream: Stream) -> None:
        """Tables first, by a small copy on the same stream: the GPU reads them often, and not over the link."""
        self._gpu.copy(area.device, area.host, size, stream.cuda_stream)

    def _use(self, stream: Stream) -> Staging:
        """Memory for tables; of each stream its own: torch gives out what work on the asking one may still use."""
        key = stream.cuda_stream
        self._used.setdefault(key, stream)
        if key not in self._staging:
            self._staging.setdefault(key, Staging(lambda size: self._memory.area(size, stream)))
        return self._staging[key]


def _index_of(device: torch.device) -> int:
    """Of a GPU among those that are visible; without a number it is the current one, as torch has it."""
    if device.type != "cuda":
        raise ValueError(f"device: {device} is no GPU of NVIDIA's")
    if device.index is not None:
        return device.index
    import torch

    return torch.cuda.current_device()


def _pinned(size: int) -> torch.Tensor:
    import torch

    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


class _TorchMemory:
    """torch's streams, events and memory."""

    def __init__(self, index: int) -> None:
        self._index = index
        # torch keeps pinned memory that was given back, and pinning some for the first time may wait for the GPU.
        try:
            for_later = [_pinned(SMALLEST) for _ in range(PINNED_AHEAD)]
        except RuntimeError as error:
            raise CudaUnavailableError(f"torch pins no memory: {error}") from error
        del for_later

    def area(self, size: int, stream: Stream) -> Area:
        import torch

        host = _pinned(size)
        with torch.cuda.stream(stream):  # type: ignore[arg-type]
            device = torch.empty(size, dtype=torch.uint8, device=f"cuda:{self._index}")
        return Area(host.data_ptr(), device.data_ptr(), size, (host, device))

    def passed(self, stream: Stream) -> Passed:
        import torch

        event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(stream)  # type: ignore[arg-type]
        return event

    def current_stream(self) -> Stream:
        import torch

        return torch.cuda.current_stream(self._index)
