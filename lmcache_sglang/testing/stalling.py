"""A disk that does not answer, for an engine that runs in a process of its own.

    stall = Stall(folder)
    with server(model, Setup(..., env=stall.env), log):
        with stall.held():
            ...  # every read, write and flush of a store waits in the kernel, as on a device that hangs

The engine loads the injection as a plug-in of SGLang's. What its threads wait for is a file lock, which the
test holds: the kernel wakes them when it lets go, or dies.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..storage import _native
from .injection import DATA_STEPS
from .plugin_folder import make_plugin


@dataclass(frozen=True, slots=True)
class Stall:
    """Stalls the stores of engines that are started with `env`.

    Attributes:
        folder: of the plug-in and the lock.
        steps: of `injection.STEPS`. The tier in memory reads and writes, too; `flush` is the disk's alone.
    """

    folder: Path
    steps: Sequence[str] = DATA_STEPS

    @property
    def _lock(self) -> Path:
        return self.folder / "lock"

    @property
    def env(self) -> dict[str, str]:
        """Of the engine."""
        self.folder.mkdir(exist_ok=True)
        self._lock.touch()
        code = (
            "from pathlib import Path\n"
            "from lmcache_sglang.testing.stalling import stall_here\n"
            f"stall_here(Path({str(self._lock)!r}), {tuple(self.steps)!r})"
        )
        return make_plugin(self.folder, "lmcache_stall", code)

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
