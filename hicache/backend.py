"""SGLang's storage backend over a chain of tiers.

SGLang's contract (0.5.23, mem_cache/hicache_storage.py): one object a rank. `register_mem_pool_host`
once, on the main thread, before anything else; then `batch_exists` and `batch_get_v1` on the prefetch
threads and `batch_set_v1` on the backup thread, all at once; `close` on detach and on SIGTERM, but not
on SIGINT or SIGKILL, so nothing here depends on it.

No exception of a tier comes out of here: the chain has turned it into a miss.
"""

from __future__ import annotations

import logging
import time
from threading import Lock
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec
import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, PoolName

from ..kernels.pages import PageSegments
from ..storage.base import page_key
from . import weights
from .identity import ModelIdentity, PageIdentity, namespace
from .pools import HostPool, Sharding, describe, logical_page_size, page_bytes, segments

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageExtraInfo
    from sglang.srt.observability.metrics_collector import StorageMetrics

    from ..storage.chain import Chain

logger = logging.getLogger(__name__)


class LMCacheBackend(HiCacheStorage):  # type: ignore[misc]  # SGLang is not typed
    """Stores the pages of one rank's KV pool.

    Args:
        sharding: SGLang's `HiCacheStorageConfig`.
        model: what computed the pages.
        chain: the open store; closed with this backend.
        require_room: raises when a tier cannot keep a page of so many bytes.
        metrics: makes SGLang's empty `StorageMetrics`, or None when SGLang does not collect them.
    """

    def __init__(
        self,
        sharding: Sharding,
        model: ModelIdentity,
        chain: Chain,
        require_room: Callable[[Chain, int], None],
        metrics: Callable[[], StorageMetrics] | None = None,
    ) -> None:
        self._sharding = sharding
        self._model = model
        self._chain = chain
        self._require_room = require_room
        self._pool: HostPool | None = None
        self._page: PageIdentity | None = None
        self._namespace = b""
        self._page_bytes = 0
        self._new_metrics = metrics
        self._metrics = metrics() if metrics else None
        self._metrics_lock = Lock()

    def register_mem_pool_host(self, mem_pool_host: HostPool) -> None:
        """Take the KV pool; raises when its pages cannot be kept."""
        if getattr(mem_pool_host, "kv_buffer", None) is None:  # as DeepSeek V4's
            raise _unsupported(PoolName.KV, mem_pool_host)
        if (
            getattr(mem_pool_host, "target_layer_num", mem_pool_host.layer_num)
            != mem_pool_host.layer_num
        ):
            raise _unsupported(
                PoolName.DRAFT, mem_pool_host
            )  # packed in; its weights are not named
        super().register_mem_pool_host(mem_pool_host)
        first_page = torch.arange(logical_page_size(mem_pool_host), dtype=torch.int64)
        self._page_bytes = page_bytes(mem_pool_host, first_page)
        self._require_room(self._chain, self._page_bytes)
        page = describe(mem_pool_host, PoolName.KV.value, self._sharding, self._page_bytes)
        self._namespace = namespace(self._model, page)
        self._page = page
        self._pool = mem_pool_host
        weights.on_replaced(self._weights_replaced)
        logger.info(
            "lmcache: pages of %d tokens and %d bytes, namespace %s (%s)",
            page.page_size,
            page.page_bytes,
            self._namespace.hex(),
            page,
        )

    def _weights_replaced(self) -> None:
        """Neither find nor leave anything under the name of the weights that were."""
        assert self._page is not None
        settings = self._model.settings | {"weights": weights.epoch()}
        self._model = msgspec.structs.replace(self._model, settings=settings)
        self._namespace = namespace(self._model, self._page)
        logger.info(
            "lmcache: the weights were replaced; namespace %s until they are again, or the process ends",
            self._namespace.hex(),
        )

    def register_mem_host_pool_v2(self, host_pool: HostPool, host_pool_name: PoolName) -> None:
        """Take a pool of a model with several; only the KV pool is stored in this version."""
        if host_pool is self._pool:
            return
        raise _unsupported(host_pool_name, host_pool)

    def batch_exists(
        self, keys: list[str], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> int:
        """How many of the first pages are stored, without a gap."""
        return self._chain.prefix(_keys(self._namespace, keys))

    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    def batch_get_v1(
        self,
        keys: list[str],
        host_indices: torch.Tensor,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> list[bool]:
        """Copy pages into the host pool; which of them it now holds, verified."""
        started = time.perf_counter()
        named = self._namespace
        parent, _ = _before(named, extra_info)
        into = self._segments(host_indices)
        held = self._chain.get(_keys(named, keys), into, parent=parent)
        self._measure(read=True, pages=sum(held), started=started)
        return held

    def batch_set_v1(
        self,
        keys: list[str],
        host_indices: torch.Tensor,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> list[bool]:
        """Store pages of the host pool; which of them are stored now."""
        started = time.perf_counter()
        named = self._namespace
        parent, position = _before(named, extra_info)
        pages = self._segments(host_indices)
        kept = self._chain.put(_keys(named, keys), pages, parent=parent, position=position)
        self._measure(read=False, pages=sum(kept), started=started)
        return kept

    def clear(self) -> None:
        """Forget the pages of this model, layout and shard, in every tier; nobody else's."""
        removed = self._chain.clear(self._namespace)
        logger.info("lmcache: cleared %d pages of namespace %s", removed, self._namespace.hex())

    def get_stats(self) -> StorageMetrics | None:
        """What SGLang's metrics have not seen yet; None when SGLang does not collect any."""
        if self._new_metrics is None:
            return None
        with self._metrics_lock:
            seen, self._metrics = self._metrics, self._new_metrics()
        return seen

    def close(self) -> None:
        """Write what is still on its way to the disk and let go of the store. Idempotent."""
        self._chain.close()

    def get(self, *_: Any, **__: Any) -> NoReturn:
        """Not called: the plug-in selects SGLang's zero-copy calls for this backend."""
        raise NotImplementedError("lmcache: use batch_get_v1")

    def batch_get(self, *_: Any, **__: Any) -> NoReturn:
        """Not called, as `get`."""
        raise NotImplementedError("lmcache: use batch_get_v1")

    def set(self, *_: Any, **__: Any) -> NoReturn:
        """Not called, as `get`."""
        raise NotImplementedError("lmcache: use batch_set_v1")

    def batch_set(self, *_: Any, **__: Any) -> NoReturn:
        """Not called, as `get`."""
        raise NotImplementedError("lmcache: use batch_set_v1")

    def _segments(self, host_indices: torch.Tensor) -> PageSegments:
        assert self._pool is not None, "SGLang registers the pool before it stores pages"
        return segments(self._pool, host_indices)

    def _measure(self, *, read: bool, pages: int, started: float) -> None:
        """SGLang's metrics: pages of a batch, and GB/s of it."""
        if pages == 0:
            return
        rate = pages * self._page_bytes / 1e9 / max(time.perf_counter() - started, 1e-9)
        with self._metrics_lock:
            if (metrics := self._metrics) is None:
                return
            counts = metrics.prefetch_pgs if read else metrics.backup_pgs
            rates = metrics.prefetch_bandwidth if read else metrics.backup_bandwidth
            counts.append(pages)
            rates.append(rate)


# Both get a namespace that their caller reads once: a replacement of weights may come in between.


def _keys(named: bytes, page_hashes: Sequence[str]) -> list[bytes]:
    return [page_key(named, bytes.fromhex(text)) for text in page_hashes]


def _before(named: bytes, extra_info: HiCacheStorageExtraInfo | None) -> tuple[bytes, int]:
    """What comes before a batch in its chain: the key of the last page, and how many there are.

    Without `hicache_storage_pass_prefix_keys` SGLang does not say; a batch then begins a chain.
    """
    before = getattr(extra_info, "prefix_keys", None)
    return (page_key(named, bytes.fromhex(before[-1])), len(before)) if before else (b"", 0)


def _unsupported(name: PoolName, pool: object) -> NotImplementedError:
    return NotImplementedError(
        f"lmcache: this model keeps its state in the pool {str(name)!r} ({type(pool).__name__}), and "
        "this version stores plain KV pools only. Serve it without --hicache-storage-backend lmcache"
    )


# SGLang reports type(backend).__name__ as the storage backend of a request's cached tokens.
LMCacheBackend.__name__ = "lmcache"
