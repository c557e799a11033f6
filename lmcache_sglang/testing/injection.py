"""Storage made slow, broken or deadly at a chosen step (storage/csrc/steps.hpp), for this whole process.

with injected(Failing("write", errno.EIO)):
    ...
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from ..storage import _native

Hook = Callable[
    [str, int, int], int
]  # name, offset and bytes of a step; returns an errno, or 0 to go on

STEPS = (
    "read",
    "write",
    "flush",
    "index_begin",
    "index_commit",
    "index_committed",
    "reserve",
    "publish",
)
DATA_STEPS = ("read", "write", "flush")
UNDER_THE_MUTEX = ("index_begin", "index_commit", "index_committed", "reserve")


@contextmanager
def injected(hook: Hook) -> Iterator[None]:
    """Steps of this process ask the hook, on whatever thread they are, for the length of the block."""
    _native.set_step_hook(hook)
    try:
        yield
    finally:
        _native.set_step_hook(None)


@dataclass
class Failing:
    """Steps of one name fail, from the `first` one on, `times` in all."""

    name: str
    error: int
    first: int = 0
    times: int = 1 << 30
    seen: int = 0

    def __call__(self, name: str, offset: int, size: int) -> int:
        if name != self.name:
            return 0
        self.seen += 1
        return self.error if self.first < self.seen <= self.first + self.times else 0


@dataclass
class Slow:
    """Steps of one name take so long."""

    name: str
    seconds: float

    def __call__(self, name: str, offset: int, size: int) -> int:
        if name == self.name:
            time.sleep(self.seconds)
        return 0


@dataclass
class Signalled:
    """The step of that number, counted from 1 over all names or over one, signals its own process."""

    number: int
    signal: signal.Signals = signal.SIGKILL
    name: str | None = None
    seen: int = 0

    def __call__(self, name: str, offset: int, size: int) -> int:
        if self.name in (None, name):
            self.seen += 1
            if self.seen == self.number:
                os.kill(os.getpid(), self.signal)
        return 0


@dataclass
class Recorded:
    """Every step, in order."""

    steps: list[tuple[str, int, int]] = field(default_factory=list)

    def __call__(self, name: str, offset: int, size: int) -> int:
        self.steps.append((name, offset, size))
        return 0

    @property
    def names(self) -> list[str]:
        return [name for name, _, _ in self.steps]
