"""`RankTree` for the direct path: SGLang's tree with its external linker, made as its scheduler makes it.

What the scheduler would do of it is done by hand: it asks when a request comes, holds the request up until its
pages have landed, loads, and looks afterwards whether that was whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch

from .. import sglang_direct
from ..errors import Reason, TierError
from ..hicache import weights
from .rank_content import scribble
from .rank_tree import RankTree, _admit, _key


class DirectTree(RankTree):
    """One rank; the arguments are those of `RankTree`, and the store's settings have `direct`."""

    def _tree(self, arguments: Any, group: torch.distributed.ProcessGroup | None) -> Any:
        from sglang.srt.mem_cache.unified_cache import linker_factory
        from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
        from sglang.srt.runtime_context import get_memory

        params = self._params(group)
        cache = UnifiedRadixCache(params)
        linker = linker_factory.create_unified_cache_linker(
            arguments,
            params,
            backend=get_memory().unified_cache_external_linker_backend,
            config=linker_factory.get_startup_linker_config(),
            components=set(cache.components),
        )
        self.written = 0  # pages that were not in the store
        linker._chain.store = self._counted(linker._chain.store)
        cache.init_cache_linker(linker)
        self.pools.kv.register_layer_transfer_counter(linker.layer_done_counter)
        return cache

    @property
    def linker(self) -> Any:
        return self.cache.linker.cache_linker

    def _counted(self, store: Callable[..., Any]) -> Callable[..., Any]:
        def counted(keys: Sequence[bytes], *rest: Any, **named: Any) -> Any:
            self.written += len(keys)
            self.parents.append(named["parent"].hex()[32:])
            self.positions.append(named["position"])
            return store(keys, *rest, **named)

        self.parents: list[str] = []
        self.positions: list[int] = []
        return counted

    def writes(self) -> dict[str, Any]:
        """Pages that went to the tiers, and after which page, at which place of its chain, each batch of them came."""
        return {"pages": self.written, "parents": self.parents, "positions": self.positions}

    def break_reads(self) -> None:
        """From now on no tier delivers a page, though each says that it has it."""
        for tier in self._chain.tiers:
            tier.get = functools.partial(_fail, tier.name)
            tier.get.__name__ = "get"

    def describe(self) -> dict[str, Any]:
        return {
            "tree": type(self.cache).__name__,
            "linker": type(self.linker).__name__,
            "pools": [name.value for name in self.linker.pools],
        }

    def forget(self) -> None:
        """Evict all from the device and the landing, and overwrite the memory of both."""
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams

        most = self.family.tokens
        self.cache.evict(EvictParams(num_tokens=most, swa_num_tokens=most, mamba_num=most))
        self.unland()
        scribble(self.pools, None)

    def unland(self) -> None:
        """Empty the landing, and overwrite its memory."""
        self.linker._promises.end_all()
        for landing in self.linker._landings.values():
            landing.empty()
            landing.records.fill_(0xA5)

    def prefetch(self, tokens: list[int]) -> int:
        """The tokens that a request is promised once it need not wait any longer."""
        request = self._request()
        self._match(tokens, request)
        self._pump(lambda: self._may_go(request))
        promised = int(self._match(tokens, request).host_hit_length)
        self.cache.linker.release_request(request.rid)
        return promised

    def _may_go(self, request: Any) -> bool:
        """As in a pass of the scheduler, in which this request is the only one that waits."""
        with self._a_pass(request):
            return bool(self.cache.check_prefetch_progress(request.cache_request_handle))

    @contextmanager
    def _a_pass(self, request: Any) -> Iterator[None]:
        self.linker.begin_pass(lambda: [request.rid], sglang_direct._agreeing(self.cache))
        yield
        self.linker.end_pass()

    def admit_together(self, tokens: list[int], requests: int) -> dict[str, int]:
        """Several requests with one prompt arrive; the first loads it, and the others then find it on the device. What
        is left of all of them."""
        others = [self._request() for _ in range(requests - 1)]
        for request in others:
            self._match(tokens, request)
        self.restore(tokens)
        for request in others:
            self._match(tokens, request)
        sglang_direct._admitted(self.cache, self.linker, others)
        return {
            "leases": self._leases(),
            "requests": len(self.linker._promises),
            "markers": len(self.cache.linker.hit_markers),
        }

    def lose_what_the_device_had(self, tokens: list[int]) -> list[Any]:
        """A request arrives, and before it is admitted the device evicts what it had of the prompt: what is promised
        at once, whether it is to wait again, and what is promised then."""
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams

        request = self._request()
        self._match(tokens, request)
        self._pump(lambda: self._may_go(request))
        most = self.family.tokens
        self.cache.evict(EvictParams(num_tokens=most, swa_num_tokens=most, mamba_num=most))
        with self._a_pass(request):
            at_once = int(self._match(tokens, request).host_hit_length)
            lost = self.linker.lost(request.rid)
        self._pump(lambda: self._may_go(request))
        with self._a_pass(request):
            then = int(self._match(tokens, request).host_hit_length)
            lost_again = self.linker.lost(request.rid)
        self.cache.linker.release_request(request.rid)
        return [at_once, lost, then, lost_again, self._leases()]

    def load_back(self, tokens: list[int], damage: bool = False) -> Any:
        """Load what has landed of a prompt: its tokens on the device, and whether each pool holds what was written;
        False where SGLang is told that the load failed.

        Args:
            damage: flip a bit of a landed page before.
        """
        from sglang.srt.mem_cache.base_prefix_cache import InitLoadBackParams, InsertParams

        request = self._request()
        match = self._match(tokens, request)
        _admit(request, match)
        device = self.cache.path_device_indices(match.last_device_node)
        load = InitLoadBackParams(match.best_match_node, match.host_hit_length, req=request)
        request.host_loaded_length, _ = self.cache.init_load_back(load)
        tail = self.cache.linker.private_load_indices.get(request.rid, device[:0])
        if damage:
            self._spoil()
        self.cache.ready_to_load_host_cache()
        if self.cache.finish_external_linker_loads([request]):
            self.pools.allocator.free(tail)
            return False
        slots = torch.cat([device, tail])
        state = request.kv.mamba_pool_idx
        same = self.content.compare(slots, state)
        value = state.unsqueeze(0) if state is not None else None
        self.cache.insert(
            InsertParams(key=_key(tokens[: len(slots)]), value=slots, mamba_value=value)
        )
        self._pump(self._is_backed_up)
        return len(slots), same

    def _spoil(self) -> None:
        """A bit of some page that has landed."""
        landing = self.linker._landings["kv"]
        landing.records[next(iter(landing._slots.values())), 5] ^= 1

    def load_from(self, tokens: list[int], cancel: bool) -> dict[str, int]:
        """Promise, queue and perhaps cancel a load; how many requests, and leases, are left."""
        from sglang.srt.mem_cache.base_prefix_cache import InitLoadBackParams

        request = self._request()
        match = self._match(tokens, request)
        _admit(request, match)
        promised = self._leases()
        load = InitLoadBackParams(match.best_match_node, match.host_hit_length, req=request)
        self.cache.init_load_back(load)
        queued = self._leases()
        if cancel:
            self.cache.linker.release_request(request.rid)
        else:
            self.linker._cancel_all()  # what a reset does first; it then empties the landing, which ends all leases
        return {"promised": promised, "queued": queued, "left": self._leases()}

    def reset(self) -> None:
        """As `/flush_cache` does."""
        self.cache.reset()

    def replace_weights(self) -> None:
        """As an update over the API does, with the flush after it."""
        weights.replaced()
        weights.replaced()
        self.cache.reset()

    def clear(self) -> bool:
        """As the admin route does."""
        return bool(self.linker.clear())

    def count_leases(self) -> int:
        return self._leases()

    def hashes(self, tokens: list[int]) -> list[str]:
        from sglang.srt.mem_cache.utils import get_hash_str

        found: list[str] = get_hash_str(tokens, page_size=self.family.page_size)
        return found

    def _leases(self) -> int:
        return sum(landing.leased for landing in self.linker._landings.values())

    def restore(self, tokens: list[int]) -> Any:
        """`prefetch`, then `load_back`."""
        return self.prefetch(tokens), *self.load_back(tokens)

    def faults(self) -> dict[str, int]:
        return dict(self.linker._chain.faults.counts())

    def close(self) -> None:
        self.cache.release_host_resources()

    @property
    def _chain(self) -> Any:
        return self.linker._chain

    def _namespace(self, pool: str) -> bytes:
        pools = self.linker._stored.values()
        return next(bytes(kept.namespace) for kept in pools if kept.name == pool)

    def _is_backed_up(self) -> bool:
        return not self.cache.linker.pending_offloads


def _fail(tier: str, *_: Any, **__: Any) -> NoReturn:
    raise TierError(tier, Reason.IO, "told to fail")
