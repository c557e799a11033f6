"""Processor time of processes, their own and the kernel's on their behalf. Linux."""

from __future__ import annotations

import time
from pathlib import Path

_SCHEDULED = 2  # the clock of a whole process that counts nanoseconds: CPUCLOCK_SCHED


def of_process(pid: int) -> float:
    """Seconds of all its threads, those that ended too; but not its children's. Raises OSError: it is gone."""
    return time.clock_gettime((~pid << 3) | _SCHEDULED)


def of_tree(pid: int) -> float:
    """Seconds of a process and of its living descendants."""
    return of_process(pid) + sum(of_tree(child) for child in _children(pid))


def _children(pid: int) -> list[int]:
    threads = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for each in threads for child in (each / "children").read_text().split()]
