"""The direct path on an unmodified SGLang: ``{"direct": true}``, or SGLang's own flags for an external linker.

    seam in SGLang                                  what is hooked on
    Scheduler._prefetch_kvcache                     the store is asked when a request arrives,
    Scheduler._get_new_batch_prefill_raw            and a request waits for its pages where SGLang's own
    UnifiedRadixCache.check_prefetch_progress       prefetches make it wait; who was admitted waits no more
    PrefillAdder.add_one_req                        a request whose prefix the device has lost meanwhile waits again
    UnifiedCacheLinkerWrapper.release_request       what was promised to a request that ends is free again
    UnifiedCacheLinkerWrapper._offload_node         which pages come before those that are stored
    Scheduler.clear_hicache_storage_wrapped         the admin route that clears the store

hicache/linker.py is what SGLang makes and calls; these hooks bring it what SGLang's interface does not. As in
sglang_plugin.py, each asks first whether the linker is ours, and else hands through.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable
from typing import Any

from .errors import ConfigError, UnsupportedEngineError
from .hicache.guard import harmless

logger = logging.getLogger(__name__)

NAME = "lmcache"  # of the backend, and of the linker
MODULE, CLASS = "lmcache_sglang.hicache.linker", "LMCacheLinker"

_SERVER_ARGS = "sglang.srt.server_args.ServerArgs"
_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_ARRIVED = f"{_SCHEDULER}._prefetch_kvcache"
_ADMIT = f"{_SCHEDULER}._get_new_batch_prefill_raw"
_CLEAR = f"{_SCHEDULER}.clear_hicache_storage_wrapped"
_ADD = "sglang.srt.managers.schedule_policy.PrefillAdder.add_one_req"
_TREE = "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache"
_PROGRESS = f"{_TREE}.check_prefetch_progress"
_WRAPPER = "sglang.srt.mem_cache.unified_cache.unified_cache_linker"
_RELEASE = f"{_WRAPPER}.UnifiedCacheLinkerWrapper.release_request"
_OFFLOAD = f"{_WRAPPER}.UnifiedCacheLinkerWrapper._offload_node"
_ASSEMBLER = "sglang.srt.mem_cache.hybrid_cache"
LEAST_PAGE_FOR_PREFIXES = 16  # tokens
_GATE = "enable_lmcache"  # of the scheduler: makes it ask `check_prefetch_progress`, and nothing else in that call

# Everything that must be there: what is hooked, and what the hooks and the linker use.
SEAMS = (
    _ARRIVED,
    _ADMIT,
    _CLEAR,
    _ADD,
    _PROGRESS,
    _RELEASE,
    _OFFLOAD,
    f"{_SERVER_ARGS}.enable_unified_cache_external_linker",
    f"{_SERVER_ARGS}.unified_cache_external_linker_backend",
    f"{_SERVER_ARGS}.unified_cache_external_linker_config",
    f"{_TREE}._all_reduce_attn_groups",
    f"{_WRAPPER}.LayerWiseLoadCounter",
    f"{_WRAPPER}.UnifiedCacheLinker",
    f"{_ASSEMBLER}.linker_pool_assembler.DevicePoolEntry",
    f"{_ASSEMBLER}.linker_pool_assembler._mha_device_pool_entry",
    f"{_ASSEMBLER}.linker_pool_assembler._mamba_device_pool_entry",
    f"{_ASSEMBLER}.linker_pool_assembler.resolve_hybrid_device_pool_group",
    f"{_ASSEMBLER}.hybrid_pool_assembler._swa_layer_mappings",
    "sglang.srt.managers.schedule_batch.Req.init_next_round_input",
    "sglang.srt.managers.schedule_policy.AddReqResult",
    "sglang.srt.managers.io_struct.ClearHiCacheReqOutput",
)

# What the direct path does not go with, by the values that it does go with.
_EXCLUDES: dict[str, tuple[tuple[Any, ...], str]] = {
    "enable_unified_cache_external_linker": ((False,), "which it turns on by itself"),
    "enable_hierarchical_cache": ((False,), "whose host memory it goes around"),
    "disable_radix_cache": ((False,), "since what it stores is the radix cache"),
    "radix_cache_backend": ((None,), "which is another cache in its place"),
    "enable_lmcache": ((False,), "which is another cache in its place"),
    "disaggregation_mode": (
        ("null", None),
        "of whose requests it was never seen to hold up the right ones",
    ),
    "dllm_algorithm": ((None,), "whose scheduler does not ask whether pages have come"),
    "pp_size": ((1, None), "as the stages would not agree on what is restored"),
    "dcp_size": ((1, None), "as a rank holds a stripe of each page"),
}
_OWN_FLAG = "enable_unified_cache_external_linker"


def register(registry: Any, kind: Any) -> None:
    """Args: registry, kind: SGLang's `HookRegistry` and `HookType`."""
    registry.register(_ARRIVED, _ask_at_once, kind.AROUND)
    registry.register(_ADMIT, _hold_up, kind.AROUND)
    registry.register(_ADD, _wait_again, kind.AROUND)
    registry.register(_CLEAR, _clear, kind.AROUND)
    registry.register(_PROGRESS, _has_landed, kind.AROUND)
    registry.register(_RELEASE, _end_promise, kind.AFTER)
    registry.register(_OFFLOAD, _tell_what_comes_before, kind.BEFORE)


# Before any process is started.


def own_settings(server_args: Any) -> dict[str, Any] | None:
    """Those that SGLang's own flags give our linker; None where they give none of ours anything."""
    given = getattr(server_args, "unified_cache_external_linker_config", None)
    if not getattr(server_args, _OWN_FLAG, False) or not isinstance(given, dict):
        return None
    if given.get("linker_module_path") != MODULE:
        return None
    return dict(given.get("linker_extra_config") or {})


def require_fit(server_args: Any, *, by_own_flags: bool) -> None:
    """Raises: ConfigError: another flag does not go with the direct path. UnsupportedEngineError."""
    for name, (fits, why) in _EXCLUDES.items():
        if by_own_flags and name == _OWN_FLAG:
            continue
        if getattr(server_args, name, fits[0]) not in fits:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError("direct", f"does not go with {flag}, {why}. Leave one of them out")
    _require_gate()


def _require_gate() -> None:
    """Without it no request would ever wait, and everything be computed."""
    from sglang.srt.managers.scheduler import Scheduler

    admit = inspect.unwrap(Scheduler._get_new_batch_prefill_raw)
    if _GATE not in admit.__code__.co_names:
        raise UnsupportedEngineError(
            f"lmcache: this SGLang's scheduler does not ask for {_GATE} where the direct path holds requests up; "
            "take direct out"
        )


def turn_on(server_args: Any, settings: dict[str, Any]) -> None:
    """SGLang's flags for an external linker, which go with no storage backend."""
    server_args.hicache_storage_backend = None
    server_args.hicache_storage_backend_extra_config = None
    server_args.enable_unified_cache_external_linker = True
    server_args.unified_cache_external_linker_backend = "dynamic"
    server_args.unified_cache_external_linker_config = {
        "linker": CLASS,
        "linker_module_path": MODULE,
        "linker_extra_config": settings,
    }
    logger.info("lmcache, direct: SGLang's external linker, and no HiCache")


# On SGLang's scheduler's thread.


def _linker_of(cache: Any) -> Any:
    """Ours, of SGLang's tree; None where it has none, or another's."""
    linker = getattr(getattr(cache, "linker", None), "cache_linker", None)
    return linker if getattr(linker, "name", None) == NAME else None


def _ask_at_once(
    original: Callable[..., Any], scheduler: Any, req: Any, *rest: Any, **named: Any
) -> Any:
    """A match looks up, and a lookup fetches what has not landed. SGLang does so for its own prefetches."""
    cache = scheduler.tree_cache
    if _linker_of(cache) is None:
        return original(scheduler, req, *rest, **named)
    req.init_next_round_input(cache, cow_mamba=False)
    cache.linker.hit_markers.pop(req.rid, None)  # it is matched again before it is admitted
    return None


def _hold_up(original: Callable[..., Any], scheduler: Any, *rest: Any, **named: Any) -> Any:
    """SGLang asks whether a prefetch is done where it has HiCache with a storage, or this; and nothing else of
    this in that call."""
    cache = scheduler.tree_cache
    linker = _linker_of(cache)
    if linker is None:
        return original(scheduler, *rest, **named)
    before, scheduler.enable_lmcache = scheduler.enable_lmcache, True
    linker.begin_pass(lambda: [req.rid for req in scheduler.waiting_queue], _agreeing(cache))
    try:
        plan = original(scheduler, *rest, **named)
    finally:
        scheduler.enable_lmcache = before
        linker.end_pass()
    batch = plan[0]
    if batch is not None:
        _admitted(cache, linker, batch.reqs)
    elif scheduler.waiting_queue:
        time.sleep(0)  # SGLang asks again at once, and the fetching thread needs the GIL
    return plan


def _agreeing(cache: Any) -> Callable[[Any], None]:
    def agree(answers: Any) -> None:
        from torch.distributed import ReduceOp

        cache._all_reduce_attn_groups(answers, ReduceOp.MIN)

    return agree


@harmless
def _admitted(cache: Any, linker: Any, requests: list[Any]) -> None:
    """What a load needs it holds by itself; nobody else tells of a request that was admitted without one."""
    for req in requests:
        linker.release(req.rid)
        cache.linker.hit_markers.pop(req.rid, None)


def _has_landed(
    original: Callable[..., Any], cache: Any, request: Any, *rest: Any, **named: Any
) -> Any:
    linker = _linker_of(cache)
    if linker is None:
        return original(cache, request, *rest, **named)
    return linker.may_go(request.rid)


def _wait_again(
    original: Callable[..., Any], adder: Any, req: Any, *rest: Any, **named: Any
) -> Any:
    """The device has evicted a prefix that it had when the request arrived: it is being fetched now. As SGLang's own
    `_prefetch_after_device_hit_loss`, which it asks with HiCache only."""
    linker = _linker_of(adder.tree_cache)
    if linker is None or not linker.lost(req.rid):
        return original(adder, req, *rest, **named)
    from sglang.srt.managers.schedule_policy import AddReqResult

    adder.tree_cache.linker.hit_markers.pop(req.rid, None)
    _give_back_state(adder.tree_cache, req)
    return AddReqResult.CONTINUE


def _give_back_state(cache: Any, req: Any) -> None:
    """The recurrent state that a match took for it, as the scheduler does for a request that it does not admit."""
    if req.kv is None:
        return
    req.kv.mamba_cow_src_index = None
    req.kv.mamba_needs_clear = False
    if req.kv.holds_mamba and not getattr(req, "session", None):
        cache.req_to_token_pool.mamba_allocator.free(req.kv.mamba_pool_idx.unsqueeze(-1))
        req.kv.mamba_pool_idx = None


def _clear(original: Callable[..., Any], scheduler: Any, *rest: Any, **named: Any) -> Any:
    linker = _linker_of(scheduler.tree_cache)
    if linker is None:
        return original(scheduler, *rest, **named)
    from sglang.srt.managers.io_struct import ClearHiCacheReqOutput

    return ClearHiCacheReqOutput(success=linker.clear())


@harmless
def _end_promise(_: Any, wrapper: Any, rid: str, *__: Any, **___: Any) -> None:
    if (linker := _linker_of(wrapper.cache)) is not None:
        linker.release(rid)


@harmless
def _tell_what_comes_before(wrapper: Any, node_id: Any, *_: Any, **__: Any) -> None:
    """Once a node. At small pages the list of all pages before would cost more than it is worth, as with HiCache."""
    linker = _linker_of(wrapper.cache)
    if linker is not None and wrapper.cache.page_size >= LEAST_PAGE_FOR_PREFIXES:
        ancestors = wrapper.cache.tree_core.get_prefix_hash_values(node_id)
        linker.follows(ancestors[-1] if ancestors else "", len(ancestors))
