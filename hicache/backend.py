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
from collections import Counter
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import msgspec
import torch
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    PoolHitPolicy,
    PoolName,
    PoolTransferResult,
)

from ..errors import TierError
from ..storage.base import PAGE_HASH_BYTES, Stored
from . import events, patience, restorable, weights
from .assembly import fill_gaps
from .guard import guarded
from .identity import ModelIdentity
from .lookup import Found, Wanted, look_up
from .namespaces import Namespaces
from .pools import HostPool, Sharding, logical_page_size
from .statistics import Statistics, StoreMetrics
from .stored_pool import StoredPool, is_logical

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageExtraInfo, PoolTransfer

    from ..storage.base import Tier
    from ..storage.chain import Chain
    from .recompute import Recompute
    from .tiling import Tiling

logger = logging.getLogger(__name__)


# Seen to come back on a real engine with the same tokens. Of the others SGLang's own pools and controller were
# seen to get back the bytes they gave, as from its file backend; no engine that has them runs without a GPU.
PROVEN = frozenset({PoolName.KV, PoolName.SWA, PoolName.MAMBA})


def _nothing(
    _: LMCacheBackend, __: PoolName, page_hashes: list[str], /, *___: Any, **____: Any
) -> list[bool]:
    return [False] * len(page_hashes)


class LMCacheBackend(HiCacheStorage):  # type: ignore[misc]  # SGLang is not typed
    """Stores the pages of one rank's pools.

    Args:
        sharding: SGLang's `HiCacheStorageConfig`.
        model: what computed the pages.
        chain: the open store; closed with this backend.
        require_room: raises when a tier cannot keep a page of so many bytes.
        metrics: whether SGLang collects any.
        draft: what computed those of a draft model; None without one.
        kv_heads: of the whole model; 0 where it is not known.
        recompute: declines to restore what is computed sooner; None restores whatever there is.
    """

    def __init__(
        self,
        sharding: Sharding,
        model: ModelIdentity,
        chain: Chain,
        require_room: Callable[[Chain, int], None],
        metrics: bool = False,
        draft: ModelIdentity | None = None,
        kv_heads: int = 0,
        recompute: Recompute | None = None,
    ) -> None:
        self._sharding = sharding
        self._model = model
        self._chain = chain
        self._require_room = require_room
        self._draft = draft
        self._kv_heads = kv_heads
        self._recompute = recompute
        self._pools: dict[PoolName, StoredPool] = {}
        self._namespaces = Namespaces(chain.directories)
        self._naming = Lock()  # held where a pool's standing changes
        self._apart: dict[bytes, str] = {}  # why pages of others are of no use, as was logged
        self._is_complete = False  # whether SGLang has given all the pools of the model
        self._anchor_is_logical = False  # the KV pool has no memory; other pools hold the KV
        self._statistics = Statistics(metrics, self._reasons)

    @property
    def pools(self) -> dict[PoolName, StoredPool]:
        """Those whose pages are stored."""
        return self._pools

    def register_mem_pool_host(self, mem_pool_host: HostPool) -> None:
        """Take the KV pool; raises when its pages cannot be kept."""
        super().register_mem_pool_host(mem_pool_host)
        self._anchor_is_logical = is_logical(mem_pool_host)
        if not self._anchor_is_logical:
            self._register(mem_pool_host, PoolName.KV)
        weights.on_replaced(self._weights_replaced)

    def register_mem_host_pool_v2(self, host_pool: HostPool, host_pool_name: PoolName) -> None:
        """Take a pool of a model with several; raises when its pages cannot be kept."""
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        known = self._pools.get(host_pool_name)
        logical = host_pool_name == PoolName.KV and self._anchor_is_logical
        if not logical and (known is None or known.host is not host_pool):
            self._register(host_pool, host_pool_name)

    def on_host_pools_registered(self) -> None:
        """SGLang has no more pools for now; before any page is moved."""
        self._is_complete = True
        # With several pools the KV pool, registered first, counts layers on its own, too.
        if len(self._pools) > 1:
            with self._naming:
                for pool in self._pools.values():
                    pool.is_of_stage(self._sharding)
                    pool.belongs_to(self._model_of(pool))
        for pool in self._pools.values():
            self._announce(pool)

    def _announce(self, pool: StoredPool) -> None:
        """Tell the log, and engines of other topologies, what its pages are."""
        if pool.standing.kind.model.lasting:
            self._namespaces.add(pool.standing.kind)
        logger.info(
            "lmcache: pool %s: pages of %d tokens and %d bytes, namespace %s (%s)",
            pool.name,
            pool.identity.page_size,
            pool.page_bytes,
            pool.namespace.hex(),
            pool.identity,
        )

    def _register(self, host_pool: HostPool, name: PoolName) -> None:
        first_page = torch.arange(logical_page_size(host_pool), dtype=torch.int64)
        pool = StoredPool(host_pool, name.value, self._sharding, first_page, self._kv_heads)
        self._require_room(self._chain, pool.page_bytes)
        with self._naming:
            pool.belongs_to(self._model_of(pool))
            self._pools = self._pools | {name: pool}
        if name not in PROVEN:
            logger.info(
                "lmcache: pool %s: tested with SGLang's pools, not yet with an engine", name
            )
        if self._is_complete:  # one that came while the model serves
            self._announce(pool)

    def _model_of(self, pool: StoredPool) -> ModelIdentity:
        """Raises: NotImplementedError: nobody knows what computed it."""
        if not pool.is_draft:
            return self._model
        if self._draft is None:
            raise NotImplementedError(
                f"lmcache: the pool {pool.name!r} is a draft model's, and SGLang names no speculative "
                "decoding. Serve this model without --hicache-storage-backend lmcache"
            )
        return self._draft

    def _weights_replaced(self) -> None:
        """Neither find nor leave anything under the name of the weights that were."""
        with self._naming:
            self._model = _with_new_weights(self._model)
            self._draft = self._draft and _with_new_weights(self._draft)
            for pool in self._pools.values():
                pool.belongs_to(self._model_of(pool))
        events.of_this_process.cleared()
        for name, pool in self._pools.items():
            logger.info(
                "lmcache: pool %s: the weights were replaced; namespace %s until they are again, or the "
                "engine ends",
                name,
                pool.namespace.hex(),
            )

    def _look_around(self) -> bool:
        """Take note of what engines of other topologies have begun to store; whether that is anything new."""
        if not self._model.lasting or not self._namespaces.news():
            return False
        kinds = self._namespaces.kinds()
        with self._naming:
            if not self._model.lasting:  # replaced just now
                return False
            found = {name: pool.look_around(kinds) for name, pool in self._pools.items()}
        for name, tiling in found.items():
            self._say(name, tiling)
        return any(tiling.covers for tiling in found.values())

    def _say(self, name: PoolName, tiling: Tiling) -> None:
        for cover in tiling.covers:
            logger.debug("lmcache: pool %s: can be read from %s", name, cover)
        for namespace, why in tiling.apart.items():
            if self._apart.get(namespace) != why:
                self._apart[namespace] = why
                logger.info(
                    "lmcache: pool %s: pages of namespace %s cannot be read here: %s",
                    name,
                    namespace.hex(),
                    why,
                )

    def failed(self, call: str) -> None:
        """One of the calls below did not end as it should (guard.py)."""
        self._statistics.missed(f"failed.{call.strip('_')}", 1)

    @guarded(lambda *_, **__: 0)
    def batch_exists(
        self, keys: list[str], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> int:
        """How many of the first pages are stored, without a gap."""
        if self._anchor_is_logical:
            return len(keys)
        (kv,) = self._here(keys)
        found = restorable.all_pages(kv.here).boundary
        events.of_this_process.lost(keys[found:])
        return self._worth(kv.tiers[:found], keys)

    def _worth(self, tiers: Sequence[Tier], keys: Sequence[str]) -> int:
        """How many of the first KV pages it pays to restore. Args: tiers: that have them."""
        pool = self._pools.get(PoolName.KV)
        if self._recompute is None or pool is None or not tiers:
            return len(tiers)
        rates = [self._chain.rates[tier.name] for tier in tiers]
        return self._recompute.pays(rates, pool.page_bytes, pool.page_size, bytes.fromhex(keys[-1]))

    def _here(self, keys: list[str], transfers: Sequence[PoolTransfer] = ()) -> list[Found]:
        """Which pages of each pool are stored, whole or in pieces that others stored. The KV pool comes first."""
        asked = _asked(keys, transfers)
        # SGLang reads on one thread: a request would wait behind the call that hangs.
        if self._chain.hangs():
            self._statistics.missed("reader.hangs", len(keys))
            return [Found([None] * len(each.page_hashes)) for each in asked]
        answers = self._look_up(asked)
        if any(None in found.holders for found in answers) and self._look_around():
            return self._look_up(asked)
        return answers

    def _look_up(self, asked: Sequence[Asked]) -> list[Found]:
        """`_here`, for the kinds of page that are known."""
        pools = [self._pools.get(each.pool) for each in asked]
        wanted = [
            Wanted(pool.standing if pool else None, each.page_hashes, each.beside_kv)
            for pool, each in zip(pools, asked, strict=True)
        ]
        found, partly = look_up(self._chain, wanted)
        self._statistics.missed("pieces.missing", partly)
        return found

    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    @guarded(lambda *_, **__: PoolTransferResult(0, {}, []))
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
        kv, *others = self._here(keys, transfers)
        usable = restorable.all_pages([True] * len(keys) if self._anchor_is_logical else kv.here)
        hits = {PoolName.KV: usable.boundary}
        worth = (
            self._worth(kv.tiers[: usable.boundary], keys)
            if not self._anchor_is_logical
            else len(keys)
        )
        allowed = frozenset(pages for pages in usable.prefixes if pages <= worth)
        for transfer, found in zip(transfers, others, strict=True):
            its = found.here
            allowed &= self._judge(transfer, its[: usable.boundary], its, hits)
        prefixes = sorted(allowed)
        events.of_this_process.lost(keys[usable.boundary :])
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

    @guarded(_nothing)
    def _get(
        self,
        name: PoolName,
        page_hashes: list[str],
        /,
        host_indices: torch.Tensor | None,
        extra_info: HiCacheStorageExtraInfo | None,
        *,
        chained: bool = True,
    ) -> list[bool]:
        started = time.perf_counter()
        pool = self._pool_with_room(name, page_hashes, host_indices)
        if pool is None or host_indices is None:
            return [False] * len(page_hashes)
        standing, raw = pool.standing, _raw(page_hashes)
        before, _ = _before(extra_info, chained)
        with pool.access.writing(host_indices) as (into, take):
            keys = [standing.namespace + page_hash for page_hash in raw]
            parent = standing.namespace + before if before else b""
            limits = patience.current()
            held = self._chain.get(keys, into, parent=parent, limits=limits)
            if not all(held):
                self._look_around()  # SGLang does not always ask first whether pages are here
                held = fill_gaps(self._chain, pool.standing, raw, before, into, held, limits)
            take(held)
        given_up = limits.cancel is not None and limits.cancel.is_set()
        if name == PoolName.KV and not all(held) and not given_up:
            events.of_this_process.lost([page_hashes[i] for i, came in enumerate(held) if not came])
        self._statistics.moved(read=True, pages=sum(held), size=pool.page_bytes, started=started)
        return held

    @guarded(_nothing)
    def _set(
        self,
        name: PoolName,
        page_hashes: list[str],
        /,
        host_indices: torch.Tensor | None,
        extra_info: HiCacheStorageExtraInfo | None,
        *,
        chained: bool = True,
    ) -> list[bool]:
        started = time.perf_counter()
        pool = self._pool_with_room(name, page_hashes, host_indices)
        if pool is None or host_indices is None:
            return [False] * len(page_hashes)
        named = pool.standing.namespace
        before, position = _before(extra_info, chained)
        parent = named + before if before else b""
        with pool.access.reading(host_indices) as pages:
            keys = [named + page_hash for page_hash in _raw(page_hashes)]
            stored = self._chain.store(keys, pages, parent=parent, position=position)
        self._statistics.moved(
            read=False, pages=stored.count(Stored.STORED), size=pool.page_bytes, started=started
        )
        return [page.kept for page in stored]

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
        """Forget the pages of this model, layout and shard, in every tier; nobody else's.

        SGLang tells its user that it succeeded whatever happens, so where a tier could not, the log has an error.
        """
        for name, pool in self._pools.items():
            try:
                removed = self._chain.clear(pool.namespace)
            except TierError as error:
                logger.error(
                    "lmcache: pool %s: pages of namespace %s are still in the store (%s). Clear it again",
                    name,
                    pool.namespace.hex(),
                    error,
                )
                continue
            logger.info(
                "lmcache: pool %s: cleared %d pages of namespace %s",
                name,
                removed,
                pool.namespace.hex(),
            )
        events.of_this_process.cleared()

    def get_stats(self) -> StoreMetrics | None:
        """What SGLang's metrics have not seen yet; None when SGLang does not collect any."""
        return self._statistics.take()

    def reasons(self) -> dict[str, int]:
        """Why pages were not restored, as `StoreMetrics.reasons`."""
        return self._statistics.reasons()

    def _reasons(self) -> dict[str, int]:
        declined = self._recompute.declined if self._recompute else 0
        apart = Counter(f"kinds.{why}" for why in list(self._apart.values()))
        own = dict(apart) | ({"recompute.faster": declined} if declined else {})
        return self._chain.faults.counts() | own

    def close(self) -> None:
        """Write what is still on its way to the disk and let go of the store. Idempotent."""
        events.of_this_process.cleared()
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


def _raw(page_hashes: Sequence[str]) -> list[bytes]:
    """Raises: ValueError for what is no SHA-256, of which a key could be made that is another page's."""
    raw = [bytes.fromhex(text) for text in page_hashes]
    if any(len(page_hash) != PAGE_HASH_BYTES for page_hash in raw):
        raise ValueError("lmcache: a page hash is 64 hexadecimal digits")
    return raw


class Asked(NamedTuple):
    """What a lookup asks of one pool: the pages of the span, or of its groups of blocks."""

    pool: PoolName
    page_hashes: list[bytes]
    beside_kv: bool


def _asked(keys: list[str], transfers: Sequence[PoolTransfer]) -> list[Asked]:
    """Of the KV pool, and of each other; the span's hashes are made once for all of them."""
    span = _raw(keys)
    asked = [Asked(PoolName.KV, span, True)]
    for transfer in transfers:
        groups = transfer.hit_policy == PoolHitPolicy.BLOCK_GROUPS
        own = _raw(transfer.keys or []) if groups else span
        asked.append(Asked(transfer.name, own, not groups))
    return asked


def _before(extra_info: HiCacheStorageExtraInfo | None, chained: bool) -> tuple[bytes, int]:
    """What comes before a batch: the hash of the page before it in its chain, and how many there are.

    Without `hicache_storage_pass_prefix_keys` SGLang does not say; a batch then begins a chain.
    """
    before = getattr(extra_info, "prefix_keys", None) or []
    last = _raw(before[-1:])[0] if before and chained else b""
    return last, len(before)


def _is_chain(transfer: PoolTransfer) -> bool:
    """Whether the page before the first one may be in the pool too: before a window mostly nothing is."""
    return bool(transfer.hit_policy != PoolHitPolicy.TRAILING_PAGES)


def _with_new_weights(model: ModelIdentity) -> ModelIdentity:
    settings = model.settings | {"weights": weights.epoch()}
    return msgspec.structs.replace(model, settings=settings)


# SGLang reports type(backend).__name__ as the storage backend of a request's cached tokens.
LMCacheBackend.__name__ = "lmcache"
