"""NIXL's POSIX plugin with O_DIRECT, one file a page.

The calls are those of SGLang's HiCacheNixl: memory registered once, files registered by path for each
batch, one transfer a batch, polled until it is done. Three things are kinder to NIXL than HiCacheNixl is:
a page is one file (not one for K and one for V), all files are in one directory (not in 256, each of which
would have to be synced), and the polling does not sleep.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

# Not a dependency of this project: it is in its own environment (benchmarks/peers).
from nixl._api import nixl_agent, nixl_agent_config  # type: ignore[import-not-found]

from benchmarks.subjects.base import (
    Batch,
    Options,
    Rows,
    Subject,
    SubjectError,
    drop_files,
    sync_files,
)


class _Nixl(Subject):
    engine: ClassVar[str]
    durable: ClassVar[str] = (
        "nobody in NIXL; here the harness, by fsync of each file with 8 threads"
    )

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._name = f"bench-{options.rank}"
        self._agent: Any = nixl_agent(self._name, nixl_agent_config(backends=[]))
        self._agent.create_backend("POSIX", {self.engine: "true"})
        self._files = itertools.count(1)
        self._registered: list[Any] = []
        self._memory: set[int] = set()
        self._paths: dict[bytes, list[Path]] = {}

    def version(self) -> str:
        return f"nixl {version('nixl')}"

    def prepare(self, batch: Batch) -> None:
        names = [key.hex() for key in batch.keys]
        self._paths[batch.keys[0]] = [self.options.directory / name for name in names]
        self._register(batch.source)
        self._register(batch.target)

    def put(self, batch: Batch) -> None:
        self._move(batch, batch.source, "WRITE", "rw,create,direct")

    def get(self, batch: Batch) -> None:
        self._move(batch, batch.target, "READ", "ro,direct")

    def exists(self, batch: Batch) -> int:
        wanted = [(0, 0, 0, str(path)) for path in self._paths[batch.keys[0]]]
        found = self._agent.query_memory(wanted, "POSIX", mem_type="FILE")
        here = [answer is not None for answer in found]
        return here.index(False) if False in here else len(here)

    def sync(self, batches: Sequence[Batch]) -> None:
        paths = [path for batch in batches for path in self._paths[batch.keys[0]]]
        sync_files(paths, [self.options.directory])

    def drop_cache(self) -> None:
        drop_files(self.options.directory.iterdir())

    def forget(self, batches: Sequence[Batch]) -> None:
        for batch in batches:
            for path in self._paths.pop(batch.keys[0]):
                path.unlink(missing_ok=True)

    def close(self) -> None:
        for handle in self._registered:
            self._agent.deregister_memory(handle)
        self._registered.clear()

    def _register(self, rows: Rows) -> None:
        """Tell NIXL about this memory, once for as long as the worker keeps it."""
        if rows.ctypes.data in self._memory:
            return
        self._memory.add(rows.ctypes.data)
        whole = self._agent.get_reg_descs([(rows.ctypes.data, rows.nbytes, 0, "")], "DRAM")
        self._registered.append(self._agent.register_memory(whole))

    def _move(self, batch: Batch, rows: Rows, direction: str, mode: str) -> None:
        agent, size = self._agent, rows.shape[1]
        memory = np.zeros((len(rows), 3), dtype=np.uint64)
        memory[:, 0] = rows.ctypes.data + np.arange(len(rows), dtype=np.uint64) * np.uint64(size)
        memory[:, 1] = size
        host = agent.get_xfer_descs(memory, "DRAM")
        with self._opened(self._paths[batch.keys[0]], size, mode) as files:
            request = agent.initialize_xfer(direction, host, files, self._name)
            try:
                state = agent.transfer(request)
                while state == "PROC":
                    state = agent.check_xfer_state(request)
            finally:
                agent.release_xfer_handle(request)
            if state != "DONE":
                raise SubjectError(f"{direction} ended as {state}")

    @contextmanager
    def _opened(self, paths: Sequence[Path], size: int, mode: str) -> Iterator[Any]:
        """Files registered by path; NIXL opens and closes them."""
        wanted = [(0, size, next(self._files), f"{mode}:{path}") for path in paths]
        handle = self._agent.register_memory(self._agent.get_reg_descs(wanted, "FILE"))
        try:
            yield handle.trim()
        finally:
            self._agent.deregister_memory(handle)


class NixlUring(_Nixl):
    engine: ClassVar[str] = "use_uring"
    setup: ClassVar[str] = (
        "POSIX plugin, O_DIRECT, io_uring as SGLang's sample configuration has it, memory registered "
        "once, path-mode files, busy polling"
    )


class NixlAio(_Nixl):
    engine: ClassVar[str] = "use_aio"
    setup: ClassVar[str] = (
        "POSIX plugin, O_DIRECT, Linux AIO as is its default, memory registered once, path-mode files, "
        "busy polling"
    )
