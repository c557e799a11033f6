"""SGLang's HiCacheFile: one file a page, written buffered and renamed into place.

It is called as SGLang's storage thread calls it: batch_set, batch_exists_v2, batch_get, one thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheFile, HiCacheStorageConfig

from benchmarks.subjects.base import (
    Batch,
    Options,
    Subject,
    SubjectError,
    drop_files,
    sync_files,
)

MODEL = "bench"


class HiCacheFileStore(Subject):
    setup: ClassVar[str] = (
        "one thread, as SGLang's controller calls it; metadata cache on (enable_metadata_cache, no expiry)"
    )
    durable: ClassVar[str] = (
        "nobody in SGLang; here the harness, by fsync of each file with 8 threads"
    )

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        config = HiCacheStorageConfig(
            tp_rank=0,
            tp_size=1,
            pp_rank=0,
            pp_size=1,
            attn_cp_rank=0,
            attn_cp_size=1,
            is_mla_model=False,
            enable_storage_metrics=False,
            is_page_first_layout=True,
            model_name=MODEL,
            extra_config={"enable_metadata_cache": True, "metadata_ttl": -1},
        )
        self._store = HiCacheFile(config, file_path=str(options.directory))
        self._calls: dict[bytes, tuple[list[str], list[torch.Tensor], list[torch.Tensor]]] = {}

    def version(self) -> str:
        return f"sglang {version('sglang')}"

    def prepare(self, batch: Batch) -> None:
        keys = [key.hex() for key in batch.keys]
        source = list(torch.from_numpy(batch.source).unbind())
        target = list(torch.from_numpy(batch.target).unbind())
        self._calls[batch.keys[0]] = keys, source, target

    def put(self, batch: Batch) -> None:
        keys, source, _ = self._calls[batch.keys[0]]
        if not self._store.batch_set(keys, source):
            raise SubjectError("batch_set failed")

    def sync(self, batches: Sequence[Batch]) -> None:
        sync_files(self._files(batches), [self.options.directory])

    def get(self, batch: Batch) -> None:
        keys, _, target = self._calls[batch.keys[0]]
        if any(page is None for page in self._store.batch_get(keys, target)):
            raise SubjectError("batch_get missed a page")

    def exists(self, batch: Batch) -> int:
        found: int = self._store.batch_exists_v2(self._calls[batch.keys[0]][0]).kv_hit_pages
        return found

    def drop_cache(self) -> None:
        drop_files(self.options.directory.glob("*.bin"))

    def forget(self, batches: Sequence[Batch]) -> None:
        for path in self._files(batches):
            path.unlink(missing_ok=True)
        for batch in batches:
            for key in self._calls.pop(batch.keys[0])[0]:
                self._store.metadata_cache.remove(self._store._get_suffixed_key(key))

    def close(self) -> None:
        self._calls.clear()

    def _files(self, batches: Sequence[Batch]) -> list[Path]:
        names = (name for batch in batches for name in self._calls[batch.keys[0]][0])
        return [
            self.options.directory / f"{self._store._get_suffixed_key(name)}.bin" for name in names
        ]
