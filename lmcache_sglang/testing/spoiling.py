"""Faults of the direct path in an engine that runs in a process of its own, each switched on by a file.

fault = Spoiling(folder)
with server(model, Setup(..., direct=True, env=fault.env), log):
    with fault.no_reads():
        ...  # no tier delivers a page
    with fault.damage():
        ...  # of the next load a bit is changed, after it was promised
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..storage import _native
from .plugin_folder import make_plugin


@dataclass(frozen=True, slots=True)
class Spoiling:
    """Args: folder: of the plug-in and the switches."""

    folder: Path

    @property
    def env(self) -> dict[str, str]:
        """Of the engine."""
        self.folder.mkdir(exist_ok=True)
        code = (
            "from pathlib import Path\n"
            "from lmcache_sglang.testing.spoiling import spoil_here\n"
            f"spoil_here(Path({str(self.folder)!r}))"
        )
        return make_plugin(self.folder, "lmcache_spoiling", code)

    @contextmanager
    def no_reads(self) -> Iterator[None]:
        with _switched_on(_reads(self.folder)):
            yield

    @contextmanager
    def damage(self) -> Iterator[None]:
        with _switched_on(_loads(self.folder)):
            yield


def spoil_here(folder: Path) -> None:
    """Watch the switches in this process."""
    _native.set_step_hook(
        lambda name, _, __: errno.EIO if name == "read" and _reads(folder).exists() else 0
    )
    from ..hicache.loading import Loading

    start = Loading.start

    def start_spoiled(loading: Loading, parts: Any, ready: Any) -> int:
        if _loads(folder).exists():
            slot = int(parts[0].lease.slots[0])
            parts[0].landing.records[slot, 3] ^= 1
        return start(loading, parts, ready)

    setattr(Loading, "start", start_spoiled)  # noqa: B010  # an assignment is none to a type checker


@contextmanager
def _switched_on(switch: Path) -> Iterator[None]:
    switch.touch()
    try:
        yield
    finally:
        switch.unlink()


def _reads(folder: Path) -> Path:
    return folder / "no reads"


def _loads(folder: Path) -> Path:
    return folder / "damage"
