"""Memory for pages on their way between the store and blocks, in halves: one is copied from while the other is filled."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from mmap import MADV_HUGEPAGE, mmap
from queue import SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Self

import torch

SPAN_BYTES = (
    8 << 20
)  # of pages that are moved at once: long enough for a disk, short enough for a CPU's cache
HALVES = 2
HUGE_PAGE = 2 << 20  # a virtual disk may read 2 MiB in 512 pieces where memory is of small pages


class Stage:
    """One thread's memory, the same each time. What hangs may write to it later: another thread takes another one.

    It is written to at once, so that no load is the first to touch it.

    Args:
        half_bytes: of each half.
        device: of the blocks; a GPU is to reach the memory.
    """

    def __init__(self, half_bytes: int, device: torch.device) -> None:
        self._half_bytes = -(-half_bytes // HUGE_PAGE) * HUGE_PAGE
        memory = _allocate(HALVES * self._half_bytes + HUGE_PAGE, device).zero_()
        first = -memory.data_ptr() % HUGE_PAGE
        self._halves = [
            memory[start : start + self._half_bytes]
            for start in range(first, first + HALVES * self._half_bytes, self._half_bytes)
        ]

    def records(self, half: int, pages: int, page_bytes: int) -> torch.Tensor:
        """uint8 [page, page_bytes] in a half."""
        return self._halves[half][: pages * page_bytes].view(pages, page_bytes)


class Copier:
    """A thread that copies, one call after the other. A daemon: one that hangs, on a GPU say, must not keep a process."""

    def __init__(self, name: str) -> None:
        self._given: SimpleQueue[tuple[Future[object], Callable[[], object]] | None] = SimpleQueue()
        Thread(target=self._run, name=name, daemon=True).start()

    def submit(self, copy: Callable[[], object]) -> Future[object]:
        future: Future[object] = Future()
        self._given.put((future, copy))
        return future

    def close(self) -> None:
        """The thread ends when it has done what it was given."""
        self._given.put(None)

    def _run(self) -> None:
        while (given := self._given.get()) is not None:
            future, copy = given
            try:
                future.set_result(copy())
            except Exception as error:  # noqa: BLE001  # raised where the result is asked for
                future.set_exception(error)


class Copies:
    """Copies from the halves of one stage, which another thread does, in turn.

    Leaving the block waits for all, and raises what one of them raised.
    """

    def __init__(self, thread: Copier) -> None:
        self._thread = thread
        self._begun: deque[Future[object]] = deque()
        self._next = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        while self._begun:
            self._begun.popleft().result()

    def half(self) -> int:
        """The one to fill next, once nothing is copied from it any more."""
        if len(self._begun) == HALVES:
            self._begun.popleft().result()
        return self._next

    def begin(self, copy: Callable[[], object]) -> None:
        """Copy from the half that was filled."""
        self._begun.append(self._thread.submit(copy))
        self._next = (self._next + 1) % HALVES


def span_bytes(page_bytes: int) -> int:
    """Of as many pages as are moved at once, at least one."""
    return max(1, SPAN_BYTES // page_bytes) * page_bytes


def spans(pages: Sequence[int], page_bytes: int) -> list[range]:
    """Runs of pages that follow one another, none longer than half a stage."""
    most = span_bytes(page_bytes) // page_bytes
    found: list[range] = []
    for page in pages:
        if found and page == found[-1].stop and len(found[-1]) < most:
            found[-1] = range(found[-1].start, page + 1)
        else:
            found.append(range(page, page + 1))
    return found


def _allocate(size: int, device: torch.device) -> torch.Tensor:
    if device.type != "cuda":
        memory = mmap(-1, size)
        with suppress(OSError):  # a kernel that has none
            memory.madvise(MADV_HUGEPAGE)
        return torch.frombuffer(memory, dtype=torch.uint8)
    with torch.cuda.device(device):  # which a new thread has not chosen
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
