"""SGLang's `UnifiedCacheLinker` over the store: from the device to the tiers and back, with no host pool between.

SGLang's contract (0.5.23, mem_cache/unified_cache/unified_cache_linker.py): one object a rank, all of whose calls come
on the scheduler's thread. None of them here waits for a tier or moves a page; three threads do.

    lookup      promises what lies verified in the landing (promises.py, landing.py); what does not is fetched from
                the tiers (fetching.py), and found by a later lookup
    load        is queued for its request; `start_layer_wise_loading` hands all that is queued to the thread that
                copies it layer by layer (loading.py); `finish_layer_wise_loading` says whether it was whole
    offload     is queued, or refused when too much waits, and stored by a thread that leaves out what is stored
                (offloading.py)

A tier that fails is a miss for lookups, and an offload that SGLang may offer again. A load can fail only where this
process's own memory is damaged; SGLang then aborts the requests of that batch with status 503.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from threading import Lock
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from sglang.srt.mem_cache.hicache_storage import PoolName
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import UnifiedCacheLinker

from ..errors import TierError
from . import engine, offloading, sources, weights
from .admission import Pass
from .device_copiers import on_gpu
from .device_pools import DevicePool, pool_group, ranks
from .fetching import Fetching
from .landing import Landing
from .loading import Loading, Part
from .namespaces import Namespaces
from .offloading import Offloading
from .opening import Opened, open_store
from .promises import Patience, Promises
from .recompute import Recompute

if TYPE_CHECKING:
    from sglang.srt.mem_cache.hicache_storage import PoolTransfer

logger = logging.getLogger(__name__)

# Keys of the settings that SGLang takes out of a storage backend's, and leaves in a linker's.
_THRESHOLD = "prefetch_threshold"
_BASE = "prefetch_timeout_base"
_PER_KI_TOKEN = "prefetch_timeout_per_ki_token"

_WINDOWED = frozenset({PoolName.SWA, PoolName.MAMBA})  # pools, and whose indices follow theirs


class LMCacheLinker(UnifiedCacheLinker):  # type: ignore[misc]  # SGLang is not typed
    """Of one rank.

    Attributes:
        name: by which the plug-in knows it.

    Args:
        server_args: SGLang's `ServerArgs`.
        params: SGLang's `CacheInitParams`.
        components: of the tree, SGLang's `ComponentType`s.
        extra_config: the store's settings, with SGLang's prefetch keys beside them.
        forward_stream: that the model runs on.

    Raises:
        ConfigError: names the setting that cannot be used.
        NotImplementedError: pools that no linker loads.
    """

    name = "lmcache"

    def __init__(
        self,
        server_args: Any,
        params: Any,
        *,
        components: set[Any],
        extra_config: Mapping[str, Any] | None = None,
        forward_stream: Any = None,
    ) -> None:
        settings = dict(extra_config or {})
        group = params.attn_tp_cache_group or params.tp_cache_group
        self.forward_stream = forward_stream
        self._group = pool_group(params, components)
        self.pools = self._group.entry_map
        weights.loaded(sources.seen)
        weights.begin(group)
        self._patience = _patience(server_args, settings, params.page_size)
        self._model = engine.model_identity(server_args.served_model_name)
        sharding, heads = ranks(params), engine.kv_heads()
        self._stored = {
            entry.name: DevicePool(entry, sharding, heads) for entry in self._group.entries
        }
        if len(self._stored) > 1:
            for pool in self._stored.values():
                pool.is_of_stage(sharding)
        for pool in self._stored.values():
            pool.belongs_to(self._model)
        opened = open_store(settings)  # last of what may fail for another reason: it must be closed
        self._chain = opened.chain
        self._closes = ExitStack()
        with ExitStack() as failing:
            failing.callback(self._closes.close)
            self._closes.callback(self._chain.close)
            self._open(opened, alone=_is_alone(params))
            failing.pop_all()
        self.layer_done_counter = self._loading.counter
        if PoolName.MAMBA in self.pools:
            params.req_to_token_pool.register_layer_transfer_counter(self.layer_done_counter)
        weights.on_replaced(self._weights_replaced)

    def _open(self, opened: Opened, *, alone: bool) -> None:
        for pool in self._stored.values():
            opened.require_room(self._chain, pool.page_bytes)
        buffer = next(iter(self.pools.values())).kv_buffer[0]
        pages = [pool.pages for pool in self._stored.values()]
        on_gpu(pages, buffer.device, opened.cubins, self._closes)
        self._landings = {
            pool.name: _landing(pool, opened.landing // len(self._stored))
            for pool in self._stored.values()
        }
        self._namespaces = Namespaces(self._chain.directories)
        self._naming = Lock()  # held where a pool's standing changes
        self._queued: dict[str, list[Part]] = {}
        self._before = ("", 0)
        self._pass: Pass | None = None
        sources_of = self._group.sources
        windowed = frozenset(n.value for n in self._stored if sources_of[n] in _WINDOWED)
        self._with_windows = frozenset(sources_of.values()) & _WINDOWED
        recompute = None if opened.restores_always else Recompute()
        pools = {pool.name: (pool, self._landings[pool.name]) for pool in self._stored.values()}
        self._fetching = Fetching(
            self._chain,
            pools,
            windowed,
            recompute,
            self._look_around,
            self._tidy,
            alone=alone,
        )
        self._closes.callback(self._fetching.close)
        self._promises = Promises(
            self._landings,
            windowed,
            self._fetching.submit,
            self._patience,
            alone=alone,
            hangs=self._fetching.hangs,
        )
        self._offloading = Offloading(self._chain, self._may_wait())
        self._closes.callback(self._offloading.close)
        self._loading = Loading(self._group.num_layers, self._tell_of_damage)
        self._closes.callback(self._loading.close)
        self._announce()

    def _may_wait(self) -> int:
        """Bytes of offloads; SGLang keeps their nodes on the device until they are done. The same on all ranks."""
        buffers = [buffer for pool in self.pools.values() for buffer in pool.kv_buffer]
        device = sum(buffer.nbytes for buffer in buffers)
        return min(offloading.WAITING_BYTES, int(device * offloading.DEVICE_SHARE))

    def _announce(self) -> None:
        for pool in self._stored.values():
            if pool.standing.kind.model.lasting:
                self._namespaces.add(pool.standing.kind)
            logger.info(
                "lmcache: pool %s: pages of %d tokens and %d bytes, namespace %s (%s); %d of them can land",
                pool.name,
                pool.identity.page_size,
                pool.page_bytes,
                pool.namespace.hex(),
                pool.identity,
                len(self._landings[pool.name].records),
            )

    def _look_around(self) -> None:
        """Take note of what engines of other topologies have begun to store. On the fetching thread."""
        if not self._model.lasting or not self._namespaces.news():
            return
        kinds = self._namespaces.kinds()
        with self._naming:
            for pool in self._stored.values():
                pool.look_around(kinds)

    def _tidy(self) -> None:
        self._promises.expire()

    def _tell_of_damage(self, records: int) -> None:
        detail = "a page in memory changed before it was loaded, and its requests were aborted"
        self._chain.faults.record("landing", "corrupt", detail, records)

    def _weights_replaced(self) -> None:
        """Neither find nor leave anything under the name of the weights that were."""
        settings = self._model.settings | {"weights": weights.epoch()}
        self._model = msgspec.structs.replace(self._model, settings=settings)
        with self._naming:
            for pool in self._stored.values():
                pool.belongs_to(self._model)
        for landing in self._landings.values():
            landing.empty()

    def lookup(self, rid: str, transfers: list[PoolTransfer]) -> list[int]:
        """The prefixes, in pages, that a load cannot miss: those that lie in the landing, leased for this request."""
        resolved = {each.name: each for each in self._group.resolve_transfers(transfers)}
        if not resolved:
            return []
        kv = next(each for each in transfers if each.name == PoolName.KV)
        windows = {
            name.value: max(1, len(each.keys))
            for name, each in resolved.items()
            if self._group.sources[name] in _WINDOWED
        }
        return self._promises.look_up(rid, kv.keys, windows)

    # For the plug-in, of which SGLang's interface knows nothing (sglang_direct.py).

    def begin_pass(
        self, waiting: Callable[[], Sequence[str]], agree: Callable[[torch.Tensor], None]
    ) -> None:
        """SGLang's scheduler goes through its waiting requests. Args: as of `Pass`."""
        self._pass = Pass(self._promises, waiting, agree)

    def may_go(self, rid: str) -> bool:
        """Whether a request need not wait any longer for pages that are being fetched, on any rank. Within a pass."""
        return self._pass is None or self._pass.may_go(rid)

    def end_pass(self) -> None:
        self._pass = None

    def lost(self, rid: str) -> bool:
        """Whether a request whose turn has come is to be held up after all: its lookup has just begun a fetch. Within a
        pass, as nobody else would ask for it again."""
        return self._pass is not None and self._promises.lost(rid)

    def release(self, rid: str) -> None:
        """A request was admitted, or SGLang gives it up."""
        self._promises.end(rid)

    def load(self, rid: str, transfers: list[PoolTransfer]) -> bool:
        """Queue what was promised."""
        resolved = self._group.resolve_transfers(
            transfers, allow_partial=True, allow_missing_kv=True
        )
        if not resolved:
            return False
        if rid in self._queued:
            raise RuntimeError(f"lmcache: a load for {rid} is queued already")
        with ExitStack() as held:
            parts = []
            for each in resolved:
                parts.append(self._part(each))
                held.callback(parts[-1].let_go)
            held.pop_all()
        self._queued[rid] = parts
        self._promises.end(rid)  # the parts have leases of their own now
        return True

    def _part(self, transfer: PoolTransfer) -> Part:
        pool = self._stored[transfer.name]
        landing = self._landings[pool.name]
        lease = landing.hold(transfer.keys, prefix=False)
        return Part(pool, landing, lease, transfer.host_indices)

    def cancel_queued_load(self, rid: str) -> bool:
        parts = self._queued.pop(rid, None)
        for part in parts or ():
            part.let_go()
        return parts is not None

    def start_layer_wise_loading(self) -> int:
        """Begin what is queued; -1 when nothing is."""
        if not self._queued:
            return -1
        queued, self._queued = self._queued, {}
        parts = [part for parts in queued.values() for part in parts]
        # As for an offload: the forward pass that may still write to these places.
        return self._loading.start(parts, self.record_offload_ready())

    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        return self._loading.finish(counter_index)

    def follows(self, before: str, position: int) -> None:
        """The next offload continues a chain: the hash of its last page, and how many they are. For the plug-in;
        without it each offload begins one."""
        self._before = (before, position)

    def offload(self, transfers: list[PoolTransfer], session_id: str | None = None) -> bool:
        """Queue pages to be stored; False when too much waits."""
        before, position = self._before
        self._before = ("", 0)
        parts = [
            offloading.Part(
                pool,
                pool.namespace,
                each.keys,
                each.host_indices,
                *((before, position) if self._group.sources[each.name] == PoolName.KV else ()),
            )
            for each in self._group.resolve_transfers(transfers, allow_partial=True)
            for pool in (self._stored[each.name],)
        ]
        # SGLang takes a node for stored once for all pools, and a window or a state may come to it later: at the end
        # of a stem that several prompts share. So a node without one is offered again when it is next used.
        is_whole = self._with_windows <= {each.name for each in transfers}
        return bool(parts) and self._offloading.offer(
            parts, self.record_offload_ready(), is_whole=is_whole
        )

    def num_completed_offloads(self) -> int:
        return self._offloading.done()

    def pop_completed_offload(self) -> bool:
        return self._offloading.take()

    def reset(self) -> None:
        """Wait for what moves, and forget what was promised, queued and landed; the tiers stay as they are."""
        self._cancel_all()
        self._loading.settle()
        self._offloading.settle()
        self._unland()
        weights.emptied()

    def _unland(self) -> None:
        """Between two passes of the scheduler: what is promised in one is loaded in it."""
        self._promises.end_all()
        for landing in self._landings.values():
            landing.empty()

    def clear(self) -> bool:
        """Forget the pages of this model, layout and shard, in every tier, and nobody else's; whether all are gone."""
        is_clear = self._offloading.cut_off()  # what was offered before would be stored after
        if not is_clear:
            logger.error(
                "lmcache: a tier is still writing pages that are to be cleared. Clear again"
            )
        self._unland()
        for pool in self._stored.values():
            try:
                removed = self._chain.clear(pool.namespace)
            except TierError as error:
                logger.error(
                    "lmcache: pool %s is not cleared (%s). Clear it again", pool.name, error
                )
                is_clear = False
                continue
            logger.info("lmcache: pool %s: cleared %d pages", pool.name, removed)
        return is_clear

    def close(self) -> None:
        """End the threads, write what is on its way to the disk, and let go of the store. Idempotent."""
        self._cancel_all()
        self._closes.close()

    def _cancel_all(self) -> None:
        """Forget the loads that have not begun."""
        for rid in list(self._queued):
            self.cancel_queued_load(rid)


def _is_alone(params: Any) -> bool:
    """Whether SGLang asks no other rank what it may restore (UnifiedRadixCache._all_reduce_attn_groups)."""
    groups = (params.attn_cp_cache_group, params.attn_tp_cache_group, params.tp_cache_group)
    sizes = (torch.distributed.get_world_size(each) for each in groups if each is not None)
    return all(size == 1 for size in sizes)


def _landing(pool: DevicePool, size: int) -> Landing:
    pages = max(1, size // pool.page_bytes)
    return Landing(pages, pool.page_bytes, pinned=pool.pages.is_on_device)


def _patience(server_args: Any, settings: dict[str, Any], page_size: int) -> Patience:
    """Takes SGLang's keys out of the settings."""
    per_ki_token = float(settings.pop(_PER_KI_TOKEN, 0.25))
    return Patience(
        policy=str(server_args.hicache_storage_prefetch_policy),
        base=float(settings.pop(_BASE, 1.0)),
        per_page=per_ki_token * page_size / 1024,
        least_pages=max(1, int(settings.pop(_THRESHOLD, 256)) // page_size),
    )
