"""One rank of an engine without its model: SGLang's tree, controller, threads and pools, and this backend.

The tree is made as SGLang's scheduler makes it (mem_cache/registry.py): `UnifiedRadixCache`, `init_hicache`
with the resolved arguments of an engine, hence the host pools of the assembler, the `HybridCacheController`
with its storage threads, and the backend by the factory and the plug-in's hooks. What the scheduler
and the model would do is done by hand here: KV is written into the device pool, and requests call
what the scheduler calls. So it belongs in a process of its own, where the plug-ins are loaded.

All ranks must make the same calls in the same order, as schedulers do: SGLang reduces counts among them.
"""

from __future__ import annotations

import json
import time
from array import array
from collections.abc import Callable, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import torch

from ..hicache import patience
from .rank_content import Content, scribble
from .rank_pools import Family, components, device_pools

SECONDS = 30.0  # after which a step of the tree counts as hung
FLUSH_SECONDS = 60.0  # for the disk tier to be written


class RankTree:
    """A tree with its store.

    Args:
        model: a folder with a config.json.
        store: the settings of the store; shared by the ranks.
        rank: of tensor parallelism; `group` is its process group, None for one rank.
        settings: of the command line, beside those that make the tree.
    """

    def __init__(
        self,
        family: Family,
        model: Path,
        store: dict[str, Any],
        rank: int = 0,
        group: torch.distributed.ProcessGroup | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.family = family
        self._arguments = _publish(family, model, store, rank, settings or {})
        self.pools = device_pools(family)
        self.content = Content(family, self.pools, rank)
        self.cache = self._tree(self._arguments, group)
        self._requests = 0

    def _tree(self, arguments: Any, group: torch.distributed.ProcessGroup | None) -> Any:
        from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

        params = self._params(group)
        cache = UnifiedRadixCache(params)
        cache.init_hicache(arguments, params)
        return cache

    def _params(self, group: torch.distributed.ProcessGroup | None) -> Any:
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams

        return CacheInitParams(
            disable=False,
            req_to_token_pool=self.pools.requests,
            token_to_kv_pool_allocator=self.pools.allocator,
            page_size=self.family.page_size,
            tp_cache_group=group,
            attn_tp_cache_group=group,
            sliding_window_size=self.family.window,
            tree_components=components(self.family),
            enable_mamba_extra_buffer=self.family.tracks_states,
        )

    def describe(self) -> dict[str, Any]:
        """Which of SGLang's classes these are."""
        controller = self.cache.cache_controller
        threads = ("prefetch_thread", "prefetch_io_aux_thread", "prefetch_sync_thread")
        return {
            "tree": type(self.cache).__name__,
            "controller": type(controller).__name__,
            "backend": type(controller.storage_backend).__name__,
            "policy": controller.write_policy,
            "pools": [str(entry.name.value) for entry in controller.mem_pool_host.entries],
            "running": [
                getattr(controller, name).is_alive() for name in (*threads, "backup_thread")
            ],
        }

    def write(self, tokens: list[int]) -> int:
        """Compute, insert and back up a prompt of whole pages; how many tokens the tree had already."""
        from sglang.srt.mem_cache.base_prefix_cache import InsertParams

        slots = self.pools.take(self.family, len(tokens))
        state = self.pools.take_state(self.family)
        self.content.write(slots, state)
        params = InsertParams(key=_key(tokens), value=slots, mamba_value=state)
        known = self.cache.insert(params).prefix_len
        self._pump(self._is_backed_up)
        return int(known)

    def forget(self) -> None:
        """Evict all from the device and the host, and overwrite the memory of both."""
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams

        most = self.family.tokens
        self.cache.evict(EvictParams(num_tokens=most, swa_num_tokens=most, mamba_num=most))
        self._pump(self._is_backed_up)  # write_back stores what is evicted
        for component in components(self.family):
            self.cache.evict_host(most * 2, component)
        scribble(self.pools, self.cache.host_pool_group)

    def matched(self, tokens: list[int]) -> tuple[int, int]:
        """The tokens of this prompt that lie on the device, and further ones on the host."""
        match = self._match(tokens)
        return int(match.device_prefix_len), int(match.host_hit_length)

    def prefetch(self, tokens: list[int]) -> int:
        """Bring to the host what the store has of a prompt, as Scheduler._prefetch_kvcache does; its tokens."""
        request = self._ask_for(tokens)
        self._pump(lambda: self.cache.check_prefetch_progress(request))
        return int(self.cache.pop_prefetch_loaded_tokens(request))

    def budget(self, tokens: list[int]) -> dict[str, Any]:
        """What a prefetch of a prompt may take, in seconds: by SGLang's own clock, and by `patience`.

        Returns:
            reading: what a read of this controller gets, to a tenth, until SGLang has first looked whether it is done.
            sglang: what SGLang gives it then; None where its policy has no budget.
            equal: whether `patience` says what is left of that, while SGLang's clock runs.
        """
        cache = self.cache
        request = self._ask_for(tokens)
        operation = cache.ongoing_prefetch[request].operation
        with patience.reading(cache.cache_controller, copy(operation)):  # the thread reads for it
            until = patience.current().until
            reading = until and round(until - time.monotonic(), 1)
        assert not cache.check_prefetch_progress(request)
        wait = cache._storage_prefetch_wait.get(request)
        most = wait and wait.timeout_s - wait.timer.elapsed()
        left = patience.left(cache, operation)
        least = wait and wait.timeout_s - wait.timer.elapsed()
        self._pump(lambda: cache.check_prefetch_progress(request))
        return {
            "reading": reading,
            "sglang": wait and wait.timeout_s,
            "equal": left is None if wait is None else least <= left <= most < wait.timeout_s,
        }

    def load_back(self, tokens: list[int]) -> tuple[int, dict[str, bool]]:
        """Bring to the device what the host has of a prompt: its tokens there, and whether each pool of
        theirs holds what was written."""
        from sglang.srt.mem_cache.base_prefix_cache import InitLoadBackParams

        request = self._request()
        match = self._match(tokens, request)
        _admit(request, match)
        load = InitLoadBackParams(match.best_match_node, match.host_hit_length, req=request)
        self.cache.init_load_back(load)
        self.cache.ready_to_load_host_cache()
        self._pump(lambda: not self.cache.ongoing_load_back)
        after = self._match(tokens)
        slots = self.cache.path_device_indices(after.last_device_node)
        assert len(slots) == after.device_prefix_len
        return len(slots), self.content.compare(slots, request.kv.mamba_pool_idx)

    def restore(self, tokens: list[int]) -> tuple[int, int, dict[str, bool]]:
        """`prefetch`, then `load_back`."""
        return self.prefetch(tokens), *self.load_back(tokens)

    def stored(self, pool: str, tokens: list[int]) -> list[bool]:
        """Which pages of a prompt this rank finds in the store, whole and under its own name."""
        found: list[bool] = self._chain.exists(self._keys(pool, tokens))
        return found

    def remove(self, pool: str, tokens: list[int], pages: Sequence[int]) -> None:
        """Take pages of a prompt, which are there, out of this rank's store."""
        chain, keys = self._chain, self._keys(pool, tokens)
        keys = [keys[page] for page in pages]
        assert chain.flush(FLUSH_SECONDS)
        assert all(chain.exists(keys))
        for tier in chain.tiers:
            tier.remove(keys)
        assert not any(chain.exists(keys))

    def remove_when_found(self, pool: str, tokens: list[int], pages: Sequence[int]) -> None:
        """`remove`, between the next lookup and its read."""
        lookup = "batch_exists_v2" if len(self._backend.pools) > 1 else "batch_exists"
        original = getattr(self._backend, lookup)

        def find(*args: Any) -> Any:
            answer = original(*args)
            delattr(self._backend, lookup)  # this function: the class has the original
            self.remove(pool, tokens, pages)
            return answer

        setattr(self._backend, lookup, find)

    def free(self) -> dict[str, int]:
        """Slots of each host pool that nobody holds."""
        host = self.cache.host_pool_group.entries
        return {str(entry.name.value): int(entry.host_pool.available_size()) for entry in host}

    def clear(self) -> bool:
        """Forget what the store has of this rank, as the admin route does; whether SGLang says that it is gone."""
        return bool(self.cache.clear_storage_backend())

    def detach(self) -> None:
        """Stop the storage threads and close the store. Raises: AssertionError, with SGLang's reason."""
        done, why = self.cache.detach_storage_backend()
        assert done, why
        assert not self.cache.enable_storage
        assert self._backend is None

    def attach(self) -> None:
        """Open the store anew in the running engine, as the admin route does. Raises: as `detach`."""
        done, why = self.cache.attach_storage_backend(
            self._arguments.hicache_storage_backend,
            self._arguments.hicache_storage_backend_extra_config,
            self._arguments.served_model_name,
        )
        assert done, why
        assert self.cache.enable_storage

    def close(self) -> None:
        """Leave the store as an engine does that ends."""
        self.detach()

    @property
    def _backend(self) -> Any:
        return self.cache.cache_controller.storage_backend

    def _keys(self, pool: str, tokens: list[int]) -> list[bytes]:
        """Of the pages of a prompt, in the tiers."""
        from sglang.srt.mem_cache.utils import get_hash_str

        hashes = get_hash_str(tokens, page_size=self.family.page_size)
        named = self._namespace(pool)
        return [named + bytes.fromhex(each) for each in hashes]

    @property
    def _chain(self) -> Any:
        return self._backend._chain

    def _namespace(self, pool: str) -> bytes:
        """That this rank's pages of a pool have."""
        pools = self._backend.pools.items()
        return next(bytes(kept.namespace) for name, kept in pools if name.value == pool)

    def namespaces(self, pools: list[str]) -> list[str]:
        """As hexadecimal digits."""
        return [self._namespace(pool).hex() for pool in pools]

    def _ask_for(self, tokens: list[int]) -> Any:
        """Begin a prefetch of what neither device nor host has of a prompt: SGLang's handle of it."""
        from sglang.srt.mem_cache.base_prefix_cache import CacheRequestHandle

        match = self._match(tokens)
        there = match.device_prefix_len + match.host_hit_length
        anchor = match.last_host_node
        self._requests += 1
        request = CacheRequestHandle(f"request {self._requests}", 0)
        keys = self.cache.hicache_storage_pass_prefix_keys
        self.cache.prefetch_from_storage(
            request,
            anchor,
            array("q", tokens[there:]),
            self.cache.get_last_hash_value(anchor),
            self.cache.get_prefix_hash_values(anchor) if keys else None,
            matched_prefix_tokens=array("q", tokens[:there]),
        )
        assert self.cache.has_ongoing_prefetch(request), "SGLang did not ask the store"
        return request

    def _match(self, tokens: list[int], request: Any = None) -> Any:
        from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams

        return self.cache.match_prefix(MatchPrefixParams(key=_key(tokens), req=request))

    def _request(self) -> Any:
        from sglang.srt.managers.schedule_batch import Req
        from sglang.srt.sampling.sampling_params import SamplingParams

        self._requests += 1
        sampling = SamplingParams(max_new_tokens=1)
        return Req(f"request {self._requests}", "", array("q"), sampling)

    def _is_backed_up(self) -> bool:
        return not self.cache.ongoing_write_through and not self.cache.ongoing_backup

    def _pump(self, done: Callable[[], bool]) -> None:
        """Run SGLang's event loop until something has happened on all ranks."""
        deadline = time.monotonic() + SECONDS
        while True:
            self.cache.check_hicache_events()
            if done():
                return
            assert time.monotonic() < deadline, "SGLang's threads do not answer"
            time.sleep(0.001)  # they are other threads, and have no event for this


def _key(tokens: list[int]) -> Any:
    from sglang.srt.mem_cache.radix_cache import RadixKey

    return RadixKey(array("q", tokens))


def _admit(request: Any, match: Any) -> None:
    """As Req.init_next_round_input does."""
    request.prefix_len = match.device_prefix_len
    request.last_node = match.last_device_node
    request.last_host_node = match.last_host_node
    request.best_match_node = match.best_match_node
    request.host_hit_length = match.host_hit_length
    request.swa_host_hit_length = match.swa_host_hit_length
    request.mamba_host_hit_length = match.mamba_host_hit_length


def _publish(
    family: Family, model: Path, store: dict[str, Any], rank: int, settings: dict[str, Any]
) -> Any:
    """Resolve the arguments of an engine and make them those of this process."""
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import ServerArgs

    usual = {
        "device": "cpu",
        "attention_backend": "torch_native",
        "page_size": family.page_size,
        "tp_size": family.ranks,
        "random_seed": 1,
        "max_total_tokens": family.tokens,
        "hicache_ratio": 2.0,
        "hicache_write_policy": "write_through",
        "hicache_storage_prefetch_policy": "wait_complete",
        "hicache_storage_backend": "lmcache",
        "hicache_storage_backend_extra_config": json.dumps(store | {"prefetch_threshold": 1}),
    }
    arguments = ServerArgs(model_path=str(model), **usual | settings)
    publish(arguments, role="scheduler", ranks=SpawnRanks(world_rank=rank))
    return arguments
