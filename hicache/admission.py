"""One pass of SGLang's scheduler over its waiting requests: which of them go on, the same on every rank.

A request that waits for its pages on one rank must wait on all, or their batches differ. Ranks agree once a pass,
and not once a request: a collective between two decode steps costs everybody who is decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch


class Waits(Protocol):
    """What is asked of a linker; all of it of this rank alone."""

    def is_ready(self, rid: str) -> bool:
        """Whether a request need not wait any longer. Changes nothing."""

    def held_up(self, rid: str) -> None:
        """The scheduler wanted the request, and it waits."""

    def goes_on(self, rid: str) -> None:
        """The scheduler wanted the request, and it does not wait."""


class Pass:
    """Ends when the scheduler's pass does.

    Args:
        linker: of this rank.
        waiting: the scheduler's queue; looked at when the first of it is asked about, as it grows until then.
        agree: makes a tensor of all ranks the least of each element, in place.
    """

    def __init__(
        self,
        linker: Waits,
        waiting: Callable[[], Sequence[str]],
        agree: Callable[[torch.Tensor], None],
    ) -> None:
        self._linker = linker
        self._waiting = waiting
        self._agree = agree
        self._ready: dict[str, bool] | None = None

    def may_go(self, rid: str) -> bool:
        """Whether a request need not wait any longer, on any rank."""
        if self._ready is None:
            self._ready = self._ask()
        is_ready = self._ready.get(rid, True)
        if is_ready:
            self._linker.goes_on(rid)
        else:
            self._linker.held_up(rid)
        return is_ready

    def _ask(self) -> dict[str, bool]:
        rids = self._waiting()
        answers = torch.tensor([self._linker.is_ready(rid) for rid in rids], dtype=torch.int)
        self._agree(answers)
        return dict(zip(rids, map(bool, answers.tolist()), strict=True))
