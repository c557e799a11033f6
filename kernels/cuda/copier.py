"""Copies of pages on one GPU: between its pools, and between them and pinned memory of the host."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from weakref import ref

from ..copy_plan import CopyPlan
from ..layout import PageLayout
from .build import Built, cubin_for
from .choice import Way, blocks_for, choose
from .driver import Gpu
from .prepared import PreparedCopy
from .staging import Area, Passed, Staging

if TYPE_CHECKING:
    import torch


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
    """The copies of one GPU. Safe for many threads; lives until the GPU is past its copies, for which `close` waits.

    Args:
        device: the GPU.
        cubins: folder in which compiled kernels are kept.
        memory: torch's, but in tests.

    Attributes:
        built: the kernels in use.

    Raises:
        CudaUnavailableError: kernels can be built or run by nothing that is here. Use the engine's own.
    """

    def __init__(
        self, device: torch.device | int, *, cubins: Path, memory: Memory | None = None
    ) -> None:
        index = device if isinstance(device, int) else device.index or 0
        self._gpu = Gpu(index)
        self.built: Built = cubin_for(self._gpu.arch, cubins)
        with self._gpu.current():
            self._gpu.load(self.built.cubin, self.built.source)
        self._memory = memory or _TorchMemory(index)
        self._staging: dict[int, Staging] = {}
        self._seen = _Seen(self._gpu)

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
            most_blocks: of a launch; None: as `choice.blocks_for` says.

        Returns:
            Bytes that are read.

        Raises:
            ValueError, IndexError: as `copy_pages`; or memory that the GPU does not reach. Nothing is enqueued.
            CudaError: the driver refused.
        """
        prepared = PreparedCopy(plan, src, dst, scales)
        if prepared.run_count == 0:
            return 0
        onto: Stream = stream or self._memory.current_stream()
        with self._gpu.current():
            sides = [src, dst] if scales is None else [src, dst, scales]
            on_host = [self._seen.is_on_host(side) for side in sides]  # all are looked at
            over_link = any(on_host)
            if (way or self._choose(prepared, over_link)) is Way.ENGINE:
                self._gpu.copy_batch(*prepared.runs(), onto.cuda_stream)
            else:
                blocks = most_blocks or blocks_for(over_link=over_link, sms=self._gpu.sms)
                self._launch(prepared, onto, blocks)
        return prepared.bytes

    def copy_by_layer(
        self,
        plan: CopyPlan,
        src: PageLayout,
        dst: PageLayout,
        *,
        scales: PageLayout | None = None,
        stream: torch.cuda.Stream | None = None,
    ) -> list[Passed]:
        """One launch a layer, so that attention on a layer may start while the next one is loading.

        Returns:
            For each layer of the plan, in order, an event that is passed when it is there (a torch.cuda.Event).
        """
        onto: Stream = stream or self._memory.current_stream()
        layers = range(src.layers) if plan.layers is None else plan.layers
        events = []
        for layer in layers:
            one = replace(plan, layers=range(layer, layer + 1))
            self.copy(one, src, dst, scales=scales, stream=onto)  # type: ignore[arg-type]
            events.append(self._memory.passed(onto))
        return events

    def close(self) -> None:
        """Waits for what is under way, and gives the kernels back."""
        for staging in self._staging.values():
            staging.drain()
        self._staging.clear()
        self._gpu.unload()

    def _choose(self, prepared: PreparedCopy, over_link: bool) -> Way:
        return choose(
            converts=prepared.converts,
            bytes_moved=prepared.bytes,
            runs=prepared.run_count,
            over_link=over_link,
            batched=self._gpu.batches,
        )

    def _launch(self, prepared: PreparedCopy, stream: Stream, most_blocks: int) -> None:
        """Tables first, by a small copy on the same stream: the GPU reads them often, and not over the link."""
        staging = self._staging_of(stream)
        area = staging.take(prepared.table_bytes)
        try:
            launches = prepared.launches(area.host, area.device, most_blocks)
            self._gpu.copy(area.device, area.host, prepared.table_bytes, stream.cuda_stream)
            for launch in launches:
                self._gpu.launch(launch, stream.cuda_stream)
        finally:
            staging.give(area, self._memory.passed(stream))

    def _staging_of(self, stream: Stream) -> Staging:
        """One for each stream: torch gives out memory that work on the asking stream may still use."""
        key = stream.cuda_stream
        if key not in self._staging:
            self._staging.setdefault(key, Staging(lambda size: self._memory.area(size, stream)))
        return self._staging[key]


class _Seen:
    """Layouts whose memory was looked at, which costs about a microsecond a tensor."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._known: dict[int, tuple[ref[PageLayout], bool]] = {}

    def is_on_host(self, layout: PageLayout) -> bool:
        """Whether any of it is.

        Raises:
            ValueError: the GPU does not reach all of it.
        """
        key = id(layout)
        known = self._known.get(key)
        if known is not None and known[0]() is layout:
            return known[1]
        on_host = [self._gpu.is_on_host(*each) for each in layout.memory if each[1] > 0]
        forget = ref(layout, lambda _: self._known.pop(key, None))
        self._known[key] = forget, any(on_host)
        return any(on_host)


class _TorchMemory:
    """torch's streams, events and memory."""

    def __init__(self, index: int) -> None:
        self._index = index

    def area(self, size: int, stream: Stream) -> Area:
        import torch

        host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
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
