"""Our store as a tier of vLLM's OffloadingConnector, the other seam that it could have: a sketch to compare with.

Pages are what the primary tier holds, so in vLLM's own form: SGLang cannot read them. A page has no name but vLLM's hash.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from queue import SimpleQueue
from typing import Any

import numpy as np
from vllm.v1.kv_offload.base import LookupResult, Medium, RequestOffloadingContext
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob

from lmcache_sglang.config import Config
from lmcache_sglang.storage.base import page_key
from lmcache_sglang.store import Store

NAMESPACE = b"benchmarks.vllm."
FLUSH_SECONDS = 60.0


class StoreTier(SecondaryTierManager):  # type: ignore[misc]  # vLLM is not typed here
    """Args: settings: of the store."""

    medium = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        settings: Mapping[str, Any],
        backpressure_detector: Any = None,
    ) -> None:
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        self._rows = np.asarray(primary_kv_view)  # [chunks, bytes]
        self._store = Store(Config.load(dict(settings)))
        self._loads, self._saves = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._done: SimpleQueue[JobResult] = SimpleQueue()
        self._under_way = 0

    def on_new_request(self, req_context: Any) -> RequestOffloadingContext:
        return RequestOffloadingContext()

    def lookup(self, key: Any, req_context: Any) -> LookupResult:
        (found,) = self._store.exists([_key(key)])
        return LookupResult.HIT if found else LookupResult.MISS

    def submit_store(self, job_metadata: TransferJob) -> None:
        self._submit(self._saves, self._store.put, job_metadata)

    def submit_load(self, job_metadata: TransferJob) -> None:
        self._submit(self._loads, self._store.get, job_metadata)

    def get_finished_jobs(self) -> Iterable[JobResult]:
        while not self._done.empty():
            self._under_way -= 1
            yield self._done.get()

    def has_pending_work(self) -> bool:
        return self._under_way > 0

    def drain_jobs(self) -> None:
        self._store.flush(FLUSH_SECONDS)

    def shutdown(self) -> None:
        self._loads.shutdown()
        self._saves.shutdown()
        self._store.close()

    def _submit(
        self, pool: ThreadPoolExecutor, move: Callable[..., list[bool]], job: TransferJob
    ) -> None:
        self._under_way += 1
        pool.submit(self._move, move, job)

    def _move(self, move: Callable[..., list[bool]], job: TransferJob) -> None:
        begun = time.monotonic()
        keys = list(job.keys)
        moved = [False] * len(keys)
        try:
            rows = [self._rows[int(chunk)] for chunk in job.chunk_ids]
            moved = move([_key(key) for key in keys], rows)
        finally:
            good = [key for key, is_good in zip(keys, moved, strict=True) if is_good]
            seconds, size = time.monotonic() - begun, len(good) * self._rows.shape[1]
            self._done.put(JobResult(job.job_id, all(moved), good or None, seconds, size))


def _key(key: bytes) -> bytes:
    return page_key(NAMESPACE, blake2b(key, digest_size=32).digest())
