"""A disk that does not answer, for an engine that runs in a process of its own.

    stall = Stall(folder)
    with server(model, Setup(..., env=stall.env), log):
        with stall.held():
            ...  # every read, write and flush of a store waits in the kernel, as on a device that hangs

The engine loads the injection as a plug-in of SGLang's (entry-point group ``sglang.srt.plugins``) from a folder on
its PYTHONPATH. What its threads wait for is a file lock, which the test holds: the kernel wakes them when it
lets go, or dies.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..storage import _native
from .injection import DATA_STEPS

_PLUGIN = """
from pathlib import Path

from lmcache_sglang.testing.stalling import stall_here


def activate() -> None:
    stall_here(Path({lock!r}), {steps!r})
"""
_ENTRY_POINT = "[sglang.srt.plugins]\nlmcache_stall = lmcache_stall:activate\n"
_METADATA = "Metadata-Version: 2.1\nName: lmcache-stall\nVersion: 0\n"


@dataclass(frozen=True, slots=True)
class Stall:
    """Stalls the stores of engines that are started with `env`.

    Attributes:
        folder: of the plug-in and the lock.
        steps: of `injection.STEPS`. Of reads and writes the tier in memory has its own; `flush` is the disk's.
    """

    folder: Path
    steps: Sequence[str] = DATA_STEPS

    def __post_init__(self) -> None:
        info = self.folder / "lmcache_stall-0.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (info / "entry_points.txt").write_text(_ENTRY_POINT)
        (info / "METADATA").write_text(_METADATA)
        plugin = _PLUGIN.format(lock=str(self._lock), steps=tuple(self.steps))
        (self.folder / "lmcache_stall.py").write_text(plugin)
        self._lock.touch()

    @property
    def _lock(self) -> Path:
        return self.folder / "lock"

    @property
    def env(self) -> dict[str, str]:
        """Of the engine."""
        return {"PYTHONPATH": str(self.folder)}

    @contextmanager
    def held(self) -> Iterator[None]:
        """The stall lasts as long as the block."""
        with self._lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @property
    def waits(self) -> int:
        """How many steps have had to wait so far, those that still do included."""
        waits = _waits(self._lock)
        return waits.stat().st_size if waits.exists() else 0


def stall_here(lock: Path, steps: Sequence[str]) -> None:
    """Steps of this process, of these names, wait while somebody else holds the lock."""
    names = frozenset(steps)

    def wait(name: str, offset: int, size: int) -> int:
        if name in names:
            with lock.open("rb") as file:
                _take(file.fileno(), lock)
        return 0

    _native.set_step_hook(wait)


def _take(file: int, lock: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        with _waits(lock).open("ab", buffering=0) as waits:
            waits.write(b".")
        fcntl.flock(file, fcntl.LOCK_SH)


def _waits(lock: Path) -> Path:
    return lock.with_suffix(".waits")
