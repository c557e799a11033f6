"""Mooncake Store with an embedded segment: this process lends the memory that its pages go to.

The calls are those of SGLang's MooncakeStore: memory registered once, batch_put_from, batch_is_exist,
batch_get_into.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

# Its local transfers are plain copies with this, as its documentation says. It is read at import.
os.environ.setdefault("MC_STORE_MEMCPY", "1")

# Not a dependency of this project: it is in its own environment (benchmarks/peers).
import mooncake  # type: ignore[import-not-found]
from mooncake.store import MooncakeDistributedStore  # type: ignore[import-not-found]

from benchmarks.subjects.base import Batch, Options, Rows, Service, Subject, SubjectError, addresses
from benchmarks.subjects.ports import free_port, wait_for_port

SPARE = 2  # times a round's bytes; the master evicts at 95 %
START_SECONDS = 20.0
BUFFER = 16 << 20  # local buffer of its other calls; the zero-copy ones need none
LEASE = "50"  # ms, instead of 5000: a page just read could not be removed between two rounds


class Mooncake(Subject):
    setup: ClassVar[str] = (
        "embedded segment, MC_STORE_MEMCPY=1, protocol tcp, P2PHANDSHAKE, mooncake_master with "
        "eviction_high_watermark_ratio=0.95 and a lease of 50 ms, zero-copy batch calls"
    )
    durable: ClassVar[str] = "in memory"

    @classmethod
    def serve(cls, options: Options) -> Service:
        port, metrics = free_port(), free_port()
        command = [
            str(Path(mooncake.__path__[0]) / "mooncake_master"),
            f"--rpc_port={port}",
            f"--metrics_port={metrics}",
            "--eviction_high_watermark_ratio=0.95",
            f"--default_kv_lease_ttl={LEASE}",
        ]
        process = subprocess.Popen(command, cwd=options.directory)
        service = Service({"master": f"127.0.0.1:{port}"}, [process])
        try:
            wait_for_port(port, process, START_SECONDS)
        except SubjectError:
            service.stop()
            raise
        return service

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._store: Any = MooncakeDistributedStore()
        self._memory: set[int] = set()
        self._calls: dict[bytes, tuple[list[str], list[int], list[int], list[int]]] = {}
        code = self._store.setup(
            "127.0.0.1",
            "P2PHANDSHAKE",
            max(64 << 20, options.pages * options.page_bytes * SPARE),
            BUFFER,
            "tcp",
            "",
            options.service["master"],
        )
        if code:
            raise SubjectError(f"setup returned {code}")

    def version(self) -> str:
        return f"mooncake-transfer-engine-non-cuda {version('mooncake-transfer-engine-non-cuda')}"

    def prepare(self, batch: Batch) -> None:
        self._register(batch.source)
        self._register(batch.target)
        sizes = [self.options.page_bytes] * len(batch)
        names = [key.hex() for key in batch.keys]
        self._calls[batch.keys[0]] = names, sizes, addresses(batch.source), addresses(batch.target)

    def put(self, batch: Batch) -> None:
        names, sizes, source, _ = self._calls[batch.keys[0]]
        if any(self._store.batch_put_from(names, source, sizes)):
            raise SubjectError("batch_put_from refused a page")

    def get(self, batch: Batch) -> None:
        names, sizes, _, target = self._calls[batch.keys[0]]
        if self._store.batch_get_into(names, target, sizes) != sizes:
            raise SubjectError("batch_get_into missed a page")

    def exists(self, batch: Batch) -> int:
        here = self._store.batch_is_exist(self._calls[batch.keys[0]][0])
        return next((i for i, answer in enumerate(here) if answer != 1), len(here))

    def forget(self, batches: Sequence[Batch]) -> None:
        time.sleep(2 * int(LEASE) / 1000)
        for batch in batches:
            for name in self._calls.pop(batch.keys[0])[0]:
                code = self._store.remove(name)
                if code:
                    raise SubjectError(f"remove returned {code}")

    def close(self) -> None:
        self._store.close()

    def _register(self, rows: Rows) -> None:
        if rows.ctypes.data not in self._memory:
            self._memory.add(rows.ctypes.data)
            code = self._store.register_buffer(rows.ctypes.data, rows.nbytes)
            if code:
                raise SubjectError(f"register_buffer returned {code}")
