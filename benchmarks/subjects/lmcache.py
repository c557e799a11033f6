"""LMCache in process: its engine, with its CPU tier or its disk tier.

LMCache knows tokens, not pages: a batch is one sequence, a page is one chunk of it. Its "GPU connector" is
ours and does the least that one can: one copy of a chunk to or from the caller's memory.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

os.environ.setdefault("LMCACHE_TRACK_USAGE", "false")  # it is read at import
os.environ.setdefault("LMCACHE_DISABLE_BANNER", "1")
os.environ.setdefault("LMCACHE_LOG_LEVEL", "WARNING")

import numpy as np
import torch

# Not a dependency of this project: it is in its own environment (benchmarks/peers).
from lmcache.v1.cache_engine import LMCacheEngineBuilder  # type: ignore[import-not-found]
from lmcache.v1.config import LMCacheEngineConfig  # type: ignore[import-not-found]
from lmcache.v1.gpu_connector.mock_gpu_connector import (  # type: ignore[import-not-found]
    MockGPUConnector,
)
from lmcache.v1.metadata import LMCacheMetadata  # type: ignore[import-not-found]

from benchmarks.subjects.base import Batch, Options, Subject, SubjectError, drop_files, sync_files

CHUNK = 64  # tokens; SGLang's usual page
SPARE = 2.5  # times a round's bytes
WRITE_SECONDS = 300.0
MODEL = "bench"


def tokens_of(batch: Batch) -> list[int]:
    """A sequence whose chunks are this batch's pages and nobody else's."""
    seed = int.from_bytes(batch.keys[0][:8], "little")
    numbers = np.random.default_rng(seed).integers(0, 1 << 17, len(batch) * CHUNK)
    return [int(number) for number in numbers]


def kv_shape(page_bytes: int) -> tuple[int, int, int, int, int]:
    """One layer in bfloat16: (layers, K and V, tokens, heads, head size)."""
    return 1, 2, CHUNK, 1, page_bytes // (2 * CHUNK * 2)


class _Connector(MockGPUConnector):  # type: ignore[misc]
    """Copies chunks from and to the rows of the batch at hand."""

    rows: torch.Tensor

    def batched_from_gpu(self, memory_objs: Any, starts: Any, ends: Any, **_: Any) -> None:
        for chunk, start in zip(memory_objs, starts, strict=True):
            chunk.tensor.view(torch.uint8).view(-1).copy_(self.rows[start // CHUNK])

    def batched_to_gpu(self, memory_objs: Any, starts: Any, ends: Any, **_: Any) -> None:
        for chunk, start in zip(memory_objs, starts, strict=True):
            self.rows[start // CHUNK].copy_(chunk.tensor.view(torch.uint8).view(-1))


class _InProcess(Subject):
    disk: ClassVar[bool]

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        torch.set_num_threads(options.threads)
        shape = kv_shape(options.page_bytes)
        metadata = LMCacheMetadata(
            model_name=MODEL,
            world_size=1,
            local_world_size=1,
            worker_id=0,
            local_worker_id=0,
            kv_dtype=torch.bfloat16,
            kv_shape=shape,
            role="worker",
            chunk_size=CHUNK,
        )
        self._connector = _Connector(shape)
        self._engine: Any = LMCacheEngineBuilder.get_or_create(
            MODEL, self._config(), metadata, self._connector, _no_broadcast, _no_broadcast
        )
        self._engine.post_init()
        self._tokens: dict[bytes, list[int]] = {}

    def _config(self) -> Any:
        gib = max(0.25, self.options.pages * self.options.page_bytes * SPARE / (1 << 30))
        settings: dict[str, Any] = {
            "chunk_size": CHUNK,
            "local_cpu": True,
            "max_local_cpu_size": gib,
        }
        if self.disk:
            settings |= {
                "local_cpu": False,  # its memory is then a staging area only
                "local_disk": f"file://{self._folder}/",
                "max_local_disk_size": 1024.0,  # it does not give removed pages' room back
                "extra_config": {"use_odirect": True, "disk_io_threads": 8},
            }
        return LMCacheEngineConfig.from_defaults(**settings)

    @property
    def _folder(self) -> Path:
        return self.options.directory / str(self.options.rank)

    def version(self) -> str:
        return f"lmcache {version('lmcache')}, torch {version('torch')}"

    def prepare(self, batch: Batch) -> None:
        self._tokens[batch.keys[0]] = tokens_of(batch)

    def put(self, batch: Batch) -> None:
        self._connector.rows = torch.from_numpy(batch.source)
        self._engine.store(tokens=self._tokens[batch.keys[0]])

    def get(self, batch: Batch) -> None:
        self._connector.rows = torch.from_numpy(batch.target)
        if not bool(self._engine.retrieve(tokens=self._tokens[batch.keys[0]]).all()):
            raise SubjectError("retrieve missed a chunk")

    def exists(self, batch: Batch) -> int:
        found: int = self._engine.lookup(tokens=self._tokens[batch.keys[0]])
        return found // CHUNK

    def forget(self, batches: Sequence[Batch]) -> None:
        for batch in batches:
            self._engine.clear(tokens=self._tokens.pop(batch.keys[0]))

    def close(self) -> None:
        LMCacheEngineBuilder.destroy(MODEL)


def _no_broadcast(*_: Any) -> None:
    raise SubjectError("LMCache wanted to broadcast in a world of one")


class LMCacheCpu(_InProcess):
    disk: ClassVar[bool] = False
    setup: ClassVar[str] = (
        f"LMCacheEngine, LocalCPUBackend, chunks of {CHUNK} tokens, one layer, torch with as many threads "
        "as said, one copy a chunk"
    )
    durable: ClassVar[str] = "in memory"


class LMCacheDisk(_InProcess):
    disk: ClassVar[bool] = True
    setup: ClassVar[str] = (
        f"LMCacheEngine, LocalDiskBackend with use_odirect and 8 disk_io_threads, local_cpu off, chunks "
        f"of {CHUNK} tokens, one layer"
    )
    durable: ClassVar[str] = (
        "nobody in LMCache; here the harness waits for its writer and then syncs each file with 8 threads"
    )

    def sync(self, batches: Sequence[Batch]) -> None:
        deadline = time.monotonic() + WRITE_SECONDS
        while any(self.exists(batch) < len(batch) for batch in batches):
            if time.monotonic() > deadline:
                raise SubjectError("its disk writer did not end")
            time.sleep(0.0005)
        sync_files(self._folder.glob("*.pt"), [self._folder])

    def drop_cache(self) -> None:
        drop_files(self._folder.glob("*.pt"))
