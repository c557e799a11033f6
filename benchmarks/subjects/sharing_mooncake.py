"""Mooncake Store between two processes: the holder lends the memory, the getter lends none."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

# Not a dependency of this project: it is in its own environment (benchmarks/peers).
import mooncake  # type: ignore[import-not-found]
from mooncake.store import MooncakeDistributedStore  # type: ignore[import-not-found]

from benchmarks.subjects.base import Batch, Options, Rows, SubjectError, addresses
from benchmarks.subjects.ports import free_port, wait_for_port
from benchmarks.subjects.sharing import Getter, Holder

SPARE = 2  # times the pages' bytes; the master evicts at 95 %
LEAST = 64 << 20
BUFFER = 16 << 20  # local buffer of its other calls; the zero-copy ones need none
START_SECONDS = 20.0


def _store(segment: int, master: str) -> Any:
    store = MooncakeDistributedStore()
    code = store.setup("127.0.0.1", "P2PHANDSHAKE", segment, BUFFER, "tcp", "", master)
    if code:
        raise SubjectError(f"setup returned {code}")
    return store


class MooncakeHolder(Holder):
    """The master, and the only segment."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        port, metrics = free_port(), free_port()
        self._address = f"127.0.0.1:{port}"
        command = [
            str(Path(mooncake.__path__[0]) / "mooncake_master"),
            f"--rpc_port={port}",
            f"--metrics_port={metrics}",
            "--eviction_high_watermark_ratio=0.95",
        ]
        self._master = subprocess.Popen(command, cwd=options.directory)
        wait_for_port(port, self._master, START_SECONDS)
        segment = max(LEAST, options.pages * options.page_bytes * SPARE)
        self._store = _store(segment, self._address)

    def address(self) -> dict[str, str]:
        return {"master": self._address}

    def hold(self, keys: Sequence[bytes], rows: Rows) -> None:
        self._store.register_buffer(rows.ctypes.data, rows.nbytes)
        sizes = [self.options.page_bytes] * len(keys)
        names = [key.hex() for key in keys]
        if any(self._store.batch_put_from(names, addresses(rows), sizes)):
            raise SubjectError("batch_put_from refused a page")
        self._store.unregister_buffer(rows.ctypes.data)

    def close(self) -> None:
        self._store.close()
        self._master.terminate()
        self._master.wait()


class Mooncake(Getter):
    setup: ClassVar[str] = (
        "TCP, P2PHANDSHAKE, MC_STORE_MEMCPY=0, MC_TCP_ENABLE_CONNECTION_POOL=1 with its 4 lanes, MC_TCP_SLICE_SIZE of "
        "1 MiB, the segment in the holder, batch_get_into in registered memory; tried with pages of 2 MiB: no pool and "
        "slices of 64 KiB, 256 KiB and 4 MiB made no difference beyond the spread, 1, 2 and 8 lanes and two threads "
        "that call were slower"
    )
    holder: ClassVar[type[Holder]] = MooncakeHolder

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._store = _store(0, options.service["master"])
        self._memory: set[int] = set()
        self._calls: dict[bytes, tuple[list[str], list[int], list[int]]] = {}

    def version(self) -> str:
        return f"mooncake-transfer-engine-non-cuda {version('mooncake-transfer-engine-non-cuda')}"

    def prepare(self, batch: Batch) -> None:
        at = batch.target.ctypes.data
        if at not in self._memory:
            self._memory.add(at)
            code = self._store.register_buffer(at, batch.target.nbytes)
            if code:
                raise SubjectError(f"register_buffer returned {code}")
        names = [key.hex() for key in batch.keys]
        sizes = [self.options.page_bytes] * len(batch)
        self._calls[batch.keys[0]] = names, addresses(batch.target), sizes

    def get(self, batch: Batch) -> None:
        names, target, sizes = self._calls[batch.keys[0]]
        if self._store.batch_get_into(names, target, sizes) != sizes:
            raise SubjectError("batch_get_into missed a page")

    def close(self) -> None:
        self._store.close()
        super().close()
