"""A copy as the CUDA driver gets it: looked over once, and its tables counted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

from .. import _native
from ..copy_plan import CopyPlan, native_arguments
from ..layout import PageLayout


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel launch.

    Attributes:
        kernel: its name in the cubin.
        params: the bytes of its one parameter, `CopyLaunch` of csrc/launch.hpp.
        blocks: of `_native.THREADS` threads each.
    """

    kernel: str
    params: bytes
    blocks: int


_Made: TypeAlias = list[tuple[str, bytes, int]]  # what the native side makes


class PreparedCopy:
    """A plan and two layouts, made into launches or into runs.

    Attributes:
        converts: numbers become others on the way.
        bytes: that are read.
        table_bytes: of memory that `launches` wants, on the host and on the GPU alike.
        run_count: contiguous runs, before those that follow one another are joined.

    Raises:
        ValueError, IndexError: as `copy_pages`.
    """

    def __init__(
        self, plan: CopyPlan, src: PageLayout, dst: PageLayout, scales: PageLayout | None
    ) -> None:
        self._plan = _native.Plan(*native_arguments(plan, src, dst, scales))
        self.converts = scales is not None
        self.bytes = self._plan.bytes
        self.table_bytes = self._plan.table_bytes
        self.run_count = self._plan.run_count

    def launches(self, host: int, device: int, most_blocks: int) -> list[Launch]:
        """All of the copy, in any order; one launch unless K and V are of different lengths.

        Args:
            host: where the tables are written now: `table_bytes` of memory, aligned to 8.
            device: where a GPU will read them: the same memory, or what it is copied to before the launch.
            most_blocks: of a launch.
        """
        return _launches(self._plan.launches(host, device, most_blocks))

    def runs(self) -> tuple[list[int], list[int], list[int]]:
        """Destinations, sources and lengths of contiguous runs, those that follow one another joined.

        Raises:
            ValueError: the numbers are to be converted.
        """
        return self._plan.runs()


class PreparedLayers:
    """A plan and two layouts, made into launches or into runs of each layer; planned and checked once for all.

    Attributes:
        layers: of the plan.
        converts: numbers become others on the way.
        layer_bytes: that are read for one layer.
        table_bytes: of memory that `launches` wants, on the host and on the GPU alike.
        run_count: contiguous runs of a layer, before those that follow one another are joined.

    Raises:
        ValueError, IndexError: as `copy_pages`.
    """

    def __init__(
        self, plan: CopyPlan, src: PageLayout, dst: PageLayout, scales: PageLayout | None
    ) -> None:
        self._plan = _native.LayeredPlan(*native_arguments(plan, src, dst, scales))
        self._asked = plan, src, dst, scales
        self.layers = range(src.layers) if plan.layers is None else plan.layers
        self.converts = scales is not None
        self.layer_bytes = self._plan.bytes
        self.table_bytes = self._plan.table_bytes
        self.run_count = self._plan.run_count

    def launches(self, host: int, device: int, most_blocks: int) -> dict[int, list[Launch]]:
        """Of each layer, as `PreparedCopy.launches`. They read one table, each its own part of it."""
        made = _launches(self._plan.launches(host, device, most_blocks))
        each = len(made) // len(self.layers)
        return {layer: made[i * each : (i + 1) * each] for i, layer in enumerate(self.layers)}

    def copies(self) -> dict[int, PreparedCopy]:
        """Each layer's copy apart, for a copy engine."""
        plan, src, dst, scales = self._asked
        return {
            layer: PreparedCopy(replace(plan, layers=range(layer, layer + 1)), src, dst, scales)
            for layer in self.layers
        }


def _launches(made: _Made) -> list[Launch]:
    return [Launch(kernel, params, blocks) for kernel, params, blocks in made]
