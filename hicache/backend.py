"""SGLang's storage backend over a chain of tiers.

SGLang's contract (0.5.23, mem_cache/hicache_storage.py): one object a rank. `register_mem_pool_host`
once, on the main thread, before anything else, then `register_mem_host_pool_v2` for each pool of a model
with several, and again when one is added while it serves; then `batch_exists*` and `batch_get_*` on the
prefetch threads and `batch_set_*` on the backup thread, all at once; `close` on detach and on SIGTERM, but
not on SIGINT or SIGKILL, so nothing here depends on it.

Each pool has a namespace of its own, so a page of the radix tree is one page in each. A prefix is
reported only where every pool has what it needs of it, at the time of the lookup; what has gone by the
time of the read is told page by page.

No exception of a tier comes out of here: the chain has turned it into a miss.
"""

from __future__ import annotations

import logging
import time
from threading import Lock
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec
import torch
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    PoolHitPolicy,
    PoolName,
    PoolTransferResult,
)

from ..storage.base import page_key
from . import restorable, weights
from .identity import ModelIdentity
from .pools import HostPool, Sharding, logical_page_size
from .stored_pool import StoredPool

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageExtraInfo, PoolTransfer
    from sglang.srt.observability.metrics_collector import StorageMetrics

    from ..storage.chain import Chain

logger = logging.getLogger(__name__)


# Seen to come back on a real engine with the same tokens. The others are tested against SGLang's own pools
# in this process, and against its file backend's answers, which is not enough to risk a wrong token on.
PROVEN = frozenset({PoolName.KV})


class LMCacheBackend(HiCacheStorage):  # type: ignore[misc]  # SGLang is not typed
    """Stores the pages of one rank's pools.

    Args:
        sharding: SGLang's `HiCacheStorageConfig`.
        model: what computed the pages.
        chain: the open store; closed with this backend.
        require_room: raises when a tier cannot keep a page of so many bytes.
        metrics: makes SGLang's empty `StorageMetrics`, or None when SGLang does not collect them.
        stored: pools whose pages are stored; a model with another one is refused at start.
    """

    def __init__(
        self,
        sharding: Sharding,
        model: ModelIdentity,
        chain: Chain,
        require_room: Callable[[Chain, int], None],
        metrics: Callable[[], StorageMetrics] | None = None,
        stored: frozenset[PoolName] = PROVEN,
    ) -> None:
        self._sharding = sharding
        self._model = model
        self._chain = chain
        self._require_room = require_room
        self._stored = stored
        self._pools: dict[PoolName, StoredPool] = {}
        self._anchor_is_logical = False  # the KV pool has no memory; other pools hold the KV
        self._new_metrics = metrics
        self._metrics = metrics() if metrics else None
        self._metrics_lock = Lock()

    @property
    def pools(self) -> dict[PoolName, StoredPool]:
        """Those whose pages are stored."""
        return self._pools

    def register_mem_pool_host(self, mem_pool_host: HostPool) -> None:
        """Take the KV pool; raises when its pages cannot be kept."""
        super().register_mem_pool_host(mem_pool_host)
        self._anchor_is_logical = getattr(mem_pool_host, "kv_buffer", None) is None
        if not self._anchor_is_logical:  # as DeepSeek V4's
            self._register(mem_pool_host, PoolName.KV)
        elif self._stored == {PoolName.KV}:
            raise _unsupported(PoolName.KV, mem_pool_host)
        weights.on_replaced(self._weights_replaced)

    def register_mem_host_pool_v2(self, host_pool: HostPool, host_pool_name: PoolName) -> None:
        """Take a pool of a model with several; raises when its pages cannot be kept."""
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        known = self._pools.get(host_pool_name)
        logical = host_pool_name == PoolName.KV and self._anchor_is_logical
        if not logical and (known is None or known.host is not host_pool):
            self._register(host_pool, host_pool_name)

    def _register(self, host_pool: HostPool, name: PoolName) -> None:
        if name not in self._stored:
            raise _unsupported(name, host_pool)
        target_layers = getattr(host_pool, "target_layer_num", None)
        if target_layers not in (None, getattr(host_pool, "layer_num", None)):
            raise _unsupported(PoolName.DRAFT, host_pool)  # packed in; its weights are not named
        first_page = torch.arange(logical_page_size(host_pool), dtype=torch.int64)
        pool = StoredPool(host_pool, name.value, self._sharding, first_page)
        self._require_room(self._chain, pool.page_bytes)
        pool.belongs_to(self._model)
        self._pools = self._pools | {name: pool}
        logger.info(
            "lmcache: pool %s: pages of %d tokens and %d bytes, namespace %s (%s)",
            name,
            pool.identity.page_size,
            pool.page_bytes,
            pool.namespace.hex(),
            pool.identity,
        )

    def _weights_replaced(self) -> None:
        """Neither find nor leave anything under the name of the weights that were."""
        settings = self._model.settings | {"weights": weights.epoch()}
        self._model = msgspec.structs.replace(self._model, settings=settings)
        for name, pool in self._pools.items():
            pool.belongs_to(self._model)
            logger.info(
                "lmcache: pool %s: the weights were replaced; namespace %s until they are again, or the "
                "process ends",
                name,
                pool.namespace.hex(),
            )

    def batch_exists(
        self, keys: list[str], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> int:
        """How many of the first pages are stored, without a gap."""
        return (
            len(keys)
            if self._anchor_is_logical
            else self._chain.prefix(self._named(PoolName.KV, keys))
        )

    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    def batch_exists_v2(
        self,
        keys: list[str],
        pool_transfers: list[PoolTransfer] | None = None,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> PoolTransferResult:
        """Which prefixes every pool has what it needs of: the longest, and all of them.

        One lookup for the pages of all pools, so that what is said of them is of one moment.
        """
        transfers = pool_transfers or []
        asked = [self._asked_of(transfer, keys) for transfer in transfers]
        kv = self._named(PoolName.KV, keys)
        found = iter(self._chain.exists([*kv, *(key for some in asked for key in some)]))
        here = [next(found) for _ in kv]
        usable = restorable.all_pages([True] * len(keys) if self._anchor_is_logical else here)
        hits = {PoolName.KV: usable.boundary}
        allowed = usable.prefixes
        for transfer, some in zip(transfers, asked, strict=True):
            its = [next(found) for _ in some]
            allowed &= self._judge(transfer, its[: usable.boundary], its, hits)
        prefixes = sorted(allowed)
        boundaries = {name: pages for name, pages in hits.items() if pages}
        return PoolTransferResult(prefixes[-1] if prefixes else 0, boundaries, prefixes)

    def _judge(
        self,
        transfer: PoolTransfer,
        within: list[bool],
        its: list[bool],
        hits: dict[PoolName, int],
    ) -> frozenset[int]:
        """The prefixes that a pool allows. Args: within: of the pages that the KV pool has."""
        match transfer.hit_policy:
            case PoolHitPolicy.ALL_PAGES:
                verdict = restorable.all_pages(within)
            case PoolHitPolicy.TRAILING_PAGES:
                verdict = restorable.trailing_pages(within, max(1, len(transfer.keys or ())))
            case PoolHitPolicy.BLOCK_GROUPS:
                group, pages = transfer.group_pages, transfer.block_pages
                hits[transfer.name] = restorable.block_groups(its, group, pages)
                return frozenset(range(1, hits[PoolName.KV] + 1))
            case _:
                raise NotImplementedError(f"lmcache: hit policy {transfer.hit_policy}")
        hits[transfer.name] = verdict.boundary
        return verdict.prefixes

    def _asked_of(self, transfer: PoolTransfer, keys: list[str]) -> list[bytes]:
        """The pages of a pool that a lookup concerns: those of the span, or the keys of its groups."""
        groups = transfer.hit_policy == PoolHitPolicy.BLOCK_GROUPS
        return self._named(transfer.name, (transfer.keys or []) if groups else keys)

    def _named(self, name: PoolName, page_hashes: Sequence[str]) -> list[bytes]:
        pool = self._pools.get(name)
        return [] if pool is None else _keys(pool.namespace, page_hashes)

    def batch_get_v1(
        self,
        keys: list[str],
        host_indices: torch.Tensor,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> list[bool]:
        """Copy pages into the host pool; which of them it now holds, verified."""
        if self._anchor_is_logical:
            return [True] * len(keys)
        return self._get(PoolName.KV, keys, host_indices, extra_info)

    def batch_set_v1(
        self,
        keys: list[str],
        host_indices: torch.Tensor,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> list[bool]:
        """Store pages of the host pool; which of them are stored now."""
        if self._anchor_is_logical:
            return [True] * len(keys)
        return self._set(PoolName.KV, keys, host_indices, extra_info)

    def batch_get_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[PoolName, list[bool]]:
        """`batch_get_v1` for several pools, each with keys of its own."""
        return {
            each.name: self._get(
                each.name, each.keys or [], each.host_indices, extra_info, chained=_is_chain(each)
            )
            for each in transfers
        }

    def batch_set_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[PoolName, list[bool]]:
        """`batch_set_v1` for several pools, each with keys of its own."""
        return {
            each.name: self._set(
                each.name, each.keys or [], each.host_indices, extra_info, chained=_is_chain(each)
            )
            for each in transfers
        }

    def _get(
        self,
        name: PoolName,
        page_hashes: list[str],
        host_indices: torch.Tensor | None,
        extra_info: HiCacheStorageExtraInfo | None,
        *,
        chained: bool = True,
    ) -> list[bool]:
        started = time.perf_counter()
        pool = self._pool_with_room(name, page_hashes, host_indices)
        if pool is None or host_indices is None:
            return [False] * len(page_hashes)
        named = pool.namespace
        parent, _ = _before(named, extra_info, chained)
        with pool.access.writing(host_indices) as (into, take):
            held = self._chain.get(_keys(named, page_hashes), into, parent=parent)
            take(held)
        self._measure(read=True, pages=sum(held), size=pool.page_bytes, started=started)
        return held

    def _set(
        self,
        name: PoolName,
        page_hashes: list[str],
        host_indices: torch.Tensor | None,
        extra_info: HiCacheStorageExtraInfo | None,
        *,
        chained: bool = True,
    ) -> list[bool]:
        started = time.perf_counter()
        pool = self._pool_with_room(name, page_hashes, host_indices)
        if pool is None or host_indices is None:
            return [False] * len(page_hashes)
        named = pool.namespace
        parent, position = _before(named, extra_info, chained)
        with pool.access.reading(host_indices) as pages:
            keys = _keys(named, page_hashes)
            kept = self._chain.put(keys, pages, parent=parent, position=position)
        self._measure(read=False, pages=sum(kept), size=pool.page_bytes, started=started)
        return kept

    def _pool_with_room(
        self, name: PoolName, page_hashes: list[str], host_indices: torch.Tensor | None
    ) -> StoredPool | None:
        """The pool, if it is stored and there is a place for each page; SGLang cuts keys and places in
        different functions."""
        pool = self._pools.get(name)
        places = 0 if host_indices is None else int(host_indices.numel())
        if pool is None or places == len(page_hashes) * pool.page_size:
            return pool
        logger.error(
            "lmcache: pool %s: %d pages of %d, but %d places; nothing was moved",
            name,
            len(page_hashes),
            pool.page_size,
            places,
        )
        return None

    def clear(self) -> None:
        """Forget the pages of this model, layout and shard, in every tier; nobody else's."""
        for name, pool in self._pools.items():
            removed = self._chain.clear(pool.namespace)
            logger.info(
                "lmcache: pool %s: cleared %d pages of namespace %s",
                name,
                removed,
                pool.namespace.hex(),
            )

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

    def _measure(self, *, read: bool, pages: int, size: int, started: float) -> None:
        """SGLang's metrics: pages of a batch, and GB/s of it."""
        if pages == 0:
            return
        rate = pages * size / 1e9 / max(time.perf_counter() - started, 1e-9)
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


def _before(
    named: bytes, extra_info: HiCacheStorageExtraInfo | None, chained: bool
) -> tuple[bytes, int]:
    """What comes before a batch: the key of the page before it in its chain, and how many there are.

    Without `hicache_storage_pass_prefix_keys` SGLang does not say; a batch then begins a chain.
    """
    before = getattr(extra_info, "prefix_keys", None) or []
    parent = page_key(named, bytes.fromhex(before[-1])) if before and chained else b""
    return parent, len(before)


def _is_chain(transfer: PoolTransfer) -> bool:
    """Whether the page before the first one may be in the pool too: before a window mostly nothing is."""
    return bool(transfer.hit_policy != PoolHitPolicy.TRAILING_PAGES)


def _unsupported(name: PoolName, pool: object) -> NotImplementedError:
    return NotImplementedError(
        f"lmcache: this model keeps its state in the pool {str(name)!r} ({type(pool).__name__}), and "
        "this version stores plain KV pools only. Serve it without --hicache-storage-backend lmcache"
    )


# SGLang reports type(backend).__name__ as the storage backend of a request's cached tokens.
LMCacheBackend.__name__ = "lmcache"
