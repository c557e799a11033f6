"""A copy a layer at a time, so that attention on a layer may start while the next one is on its way."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self


class LayeredCopy:
    """A copy of which everything but the launches is done. `CudaCopier.layered` makes it; for one thread at a time.

    Nothing here waits for the GPU. The memory of the layouts must live until the stream is past the last layer.

    Args:
        enqueue: the copy of one layer.
        done: nothing more will be enqueued.

    Attributes:
        layers: that may be copied, each as often and in the order that is wanted.
        layer_bytes: that are read for one layer.
    """

    def __init__(
        self,
        layers: range,
        layer_bytes: int,
        enqueue: Callable[[int], None],
        done: Callable[[], None],
    ) -> None:
        self.layers = layers
        self.layer_bytes = layer_bytes
        self._enqueue = enqueue
        self._done: Callable[[], None] | None = done

    def copy(self, layer: int) -> None:
        """Enqueues one layer, by its number in the layouts.

        Raises:
            IndexError: it is none of `layers`.
            ValueError: this is closed.
            CudaError: the driver refused.
        """
        if self._done is None:
            raise ValueError("layer: this copy is closed")
        if layer not in self.layers:
            raise IndexError(f"layer: {layer} is none of {self.layers}")
        self._enqueue(layer)

    def close(self) -> None:
        """Ends it. What was enqueued goes on; its tables are used again when the GPU is past it."""
        done, self._done = self._done, None
        if done is not None:
            done()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
