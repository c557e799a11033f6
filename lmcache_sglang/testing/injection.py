"""Storage made slow, broken or deadly at a chosen step (storage/csrc/steps.hpp), for this whole process.

with injected(Failing("write", errno.EIO)):
    ...
"""

from __future__ import annotations

import errno
import io
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from types import FrameType

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
MAY_BE_FULL = ("index_begin", "index_commit")
INDEX_FULL = -30792  # LMDB's MDB_MAP_FULL: an error of the steps above only
GIVEN_UP = (
    -30795
)  # MDB_PANIC: LMDB will have nothing more to do with the file until it is opened anew
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
class FailingAt:
    """The steps of those numbers fail, counted from 1 over all names, each with its error."""

    errors: Mapping[int, int]
    names: list[str] = field(default_factory=list)  # of the steps, in order

    def __post_init__(self) -> None:
        self._numbers = count(1)  # no two threads get the same one

    def __call__(self, name: str, offset: int, size: int) -> int:
        self.names.append(name)
        error = self.errors.get(next(self._numbers), 0)
        return errno.EIO if error == INDEX_FULL and name not in MAY_BE_FULL else error


@dataclass
class Flaky:
    """Every step fails with that probability, with one error or another."""

    share: float
    rng: random.Random
    errors: tuple[int, ...] = (errno.EIO, errno.ENOSPC, errno.EAGAIN)
    failed: int = 0

    def __call__(self, name: str, offset: int, size: int) -> int:
        if self.rng.random() >= self.share:
            return 0
        self.failed += 1
        return self.rng.choice(self.errors)


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

    def __post_init__(self) -> None:
        self._numbers = count(1)  # no two threads get the same one

    def __call__(self, name: str, offset: int, size: int) -> int:
        if self.name in (None, name):
            self.seen = number = next(self._numbers)
            if number == self.number:
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


FILE_CALLS = {
    *("mkdir", "open", "write", "flush", "fsync", "close"),
    *("ftruncate", "posix_fallocate", "rename", "replace", "unlink"),
    *("flock", "lockf"),
}


@contextmanager
def killed_at_file_call(number: int) -> Iterator[Callable[[], int]]:
    """Before its call of that number, counted from 1, that changes files in Python this process kills
    itself; the native side's are steps. Yields: how many there were.
    """
    numbers, seen, process = count(1), [0], os.getpid()

    def look(frame: FrameType, event: str, called: object) -> None:
        if event != "c_call" or not _changes_files(called) or os.getpid() != process:
            return  # a child's are its own
        seen[0] = next(numbers)
        if seen[0] == number:
            os.kill(process, signal.SIGKILL)

    threading.setprofile(look)
    sys.setprofile(look)
    try:
        yield lambda: seen[0]
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def _changes_files(called: object) -> bool:
    if getattr(called, "__name__", None) not in FILE_CALLS:
        return False
    if getattr(called, "__module__", None) in ("posix", "fcntl", "_io"):
        return True
    return isinstance(getattr(called, "__self__", None), io.IOBase)
