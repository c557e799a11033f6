"""The flag: ``--hicache-storage-backend lmcache`` on an unmodified SGLang.

SGLang calls `activate` in each of its processes before it parses arguments (entry-point group
``sglang.srt.plugins``). It registers hooks; without the flag each of them hands through.

    seam in SGLang                                  what is hooked on
    ServerArgs.add_cli_args                         the flag's choices
    ServerArgs.resolve_once                         settings are checked, HiCache is turned on; on how many
                                                    nodes the engine runs
    hicache_hook.resolve_storage_layout_…           layer_first becomes page_first, as for Mooncake
    StorageBackendFactory._create_builtin_backend   makes the backend, under its own name
    HiCacheController.__init__                      what lies where the weights were loaded from
    HiCacheController.attach_storage_backend        selects the zero-copy calls; which ranks attach
    HybridCacheController.attach_storage_backend    refuses pools whose pages cannot be reached, or kept
    HybridCacheController.should_backup             stores all ranks' parts of a draft model
    LoRARef.deterministic_id                        adapters are told apart by their weights too
    SchedulerWeightUpdaterManager.update_weights_…  new weights find none of the old ones' pages
    SchedulerWeightUpdaterManager.resume_memory_…   nor does memory that weights were in, and are not yet again
    HiCacheController.reset                         nor those that were still being stored
    HybridCacheController.parse_storage_backend_…   whether the user set what the next one turns on
    StorageAttachment.apply_runtime_config          batches come with the hashes of the pages before; reads
                                                    follow the prefetch policy
    HybridCacheController._page_transfer_with_…     and so does each call within a read
    HybridCacheController._page_transfer_sidecar    but for what follows the KV, which SGLang waits for
    PrefetchOperation.mark_terminate                ends the call that a read is in
    SchedulerMetricsReporter.report_prefill_stats   how fast this engine computes
    HybridCacheController._page_backup              what was stored is told to who listens to KV events,
    UnifiedRadixCache._handle_prefetch_result       and what was restored,
    UnifiedRadixCache.take_events                   together with SGLang's own

sglang_direct.py has those for `{"direct": true}`.

The name stays `lmcache` everywhere, in SGLang's logs and metrics too. (The other way, rewriting the flag
to `dynamic`, loses it, and does not reach the admin route that attaches a backend at run time.)

A hook asks for the name before it looks at anything else, and passes on what it does not know: on an
SGLang that has changed, it must not harm who uses another backend.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
import threading
import time
from argparse import ArgumentParser
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from importlib.metadata import version
from typing import Any

from . import sglang_direct
from .config import Config, parse_extra
from .errors import ConfigError, UnsupportedEngineError
from .hicache import opening
from .hicache.guard import harmless

logger = logging.getLogger(__name__)

NAME = sglang_direct.NAME
FLAG = "--hicache-storage-backend"
TESTED = ("0.5.23",)

_SERVER_ARGS = "sglang.srt.server_args.ServerArgs"
_ADD_CLI_ARGS = f"{_SERVER_ARGS}.add_cli_args"
_RESOLVE = f"{_SERVER_ARGS}.resolve_once"
_LAYOUT = "sglang.srt.arg_groups.hicache_hook.resolve_storage_layout_compatibility"
_FACTORY = "sglang.srt.mem_cache.storage.backend_factory.StorageBackendFactory"
_CREATE = f"{_FACTORY}._create_builtin_backend"
_CONTROLLER = "sglang.srt.managers.cache_controller.HiCacheController"
_MAKE_CONTROLLER = f"{_CONTROLLER}.__init__"
_ATTACH = f"{_CONTROLLER}.attach_storage_backend"
_HYBRID = "sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller.HybridCacheController"
_ATTACH_POOLS = f"{_HYBRID}.attach_storage_backend"
_SHOULD_BACK_UP = f"{_HYBRID}.should_backup"
_UPDATER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
_UPDATES = (
    f"{_UPDATER}.update_weights_from_disk",
    f"{_UPDATER}.update_weights_from_distributed",
    f"{_UPDATER}.update_weights_from_tensor",
    f"{_UPDATER}.update_weights_from_ipc",
    # Between these two, weights may come by RDMA without a call of those above.
    f"{_UPDATER}.begin_weight_update",
    f"{_UPDATER}.end_weight_update",
)
_RESUME = f"{_UPDATER}.resume_memory_occupation"
_RESET = f"{_CONTROLLER}.reset"
_PARSE = f"{_HYBRID}.parse_storage_backend_extra_config"
_ATTACHMENT = "sglang.srt.mem_cache.unified_cache.storage_attachment.StorageAttachment"
_APPLY = f"{_ATTACHMENT}.apply_runtime_config"
_TRANSFER = f"{_HYBRID}._page_transfer_with_stable_layout"
_SIDECARS = f"{_HYBRID}._page_transfer_sidecar"
_OPERATION = "sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller.PrefetchOperation"
_TERMINATE = f"{_OPERATION}.mark_terminate"
_REPORTER = "sglang.srt.managers.scheduler_components.metrics_reporter"
_PREFILLED = f"{_REPORTER}.SchedulerMetricsReporter.report_prefill_stats"
_PAGE_BACKUP = f"{_HYBRID}._page_backup"
_TREE = "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache"
_PREFETCHED = f"{_TREE}._handle_prefetch_result"
_TAKE_EVENTS = f"{_TREE}.take_events"
_PREFIX_KEYS = "hicache_storage_pass_prefix_keys"  # SGLang's own key of the extra config
_ADAPTER_ID = "sglang.srt.lora.lora_registry.LoRARef.deterministic_id"
_EVENTS = ("AllBlocksCleared", "BlockRemoved", "BlockStored", "StorageMedium")

# Flags that the hierarchical cache, on which a store stands, does not go with.
_EXCLUDES = {
    "disable_radix_cache": "since what it stores is the radix cache",
    "enable_lmcache": "which is another cache in its place",
    "enable_unified_cache_external_linker": "which goes around the host memory that it reads to and writes from",
}

# Everything that must be there for the flag to work: what is hooked, and what the hooks use.
SEAMS = (
    _ADD_CLI_ARGS,
    _RESOLVE,
    f"{_SERVER_ARGS}.hicache_storage_backend",
    f"{_SERVER_ARGS}.hicache_storage_backend_extra_config",
    f"{_SERVER_ARGS}.enable_hierarchical_cache",
    f"{_SERVER_ARGS}.disaggregation_mode",
    f"{_SERVER_ARGS}.nnodes",
    _LAYOUT,
    _CREATE,
    f"{_FACTORY}.register_backend",
    _CONTROLLER,
    _ATTACH,
    _HYBRID,
    _SHOULD_BACK_UP,
    _ADAPTER_ID,
    *_UPDATES,
    _RESUME,
    _RESET,
    _PARSE,
    _APPLY,
    _TRANSFER,
    _SIDECARS,
    _TERMINATE,
    f"{_OPERATION}.is_terminated",
    _PREFILLED,
    _TREE,
    _PREFETCHED,
    *sglang_direct.SEAMS,
    f"{_CONTROLLER}._page_get_zero_copy",
    f"{_CONTROLLER}._page_set_zero_copy",
    "sglang.srt.arg_groups.overrides.declare_resolution",
    *(f"sglang.srt.disaggregation.kv_events.{name}" for name in _EVENTS),
    "sglang.srt.mem_cache.hicache_storage.HiCacheStorage",
    "sglang.srt.mem_cache.utils.get_hash_str",
    "sglang.srt.runtime_context.get_exec",
    "sglang.srt.runtime_context.get_lora",
    "sglang.srt.runtime_context.get_memory",
    "sglang.srt.runtime_context.get_model",
    "sglang.srt.runtime_context.get_spec",
    "sglang.srt.runtime_context.process_model_config",
)


# Set once the arguments of an engine with the flag, on one node, were looked at; adapters get their ids after that.
_ADAPTERS_BY_WEIGHTS = threading.Event()
_BACKEND_MADE = threading.Event()  # in this process


def activate() -> None:
    """The entry point. Registers the hooks; changes nothing for who does not use the flag."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    missing = missing_seams()
    if missing:
        _refuse_the_flag(missing)
        return
    from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory

    StorageBackendFactory.register_backend(NAME, "lmcache_sglang.hicache.backend", "LMCacheBackend")
    HookRegistry.register(_ADD_CLI_ARGS, _add_choice, HookType.AFTER)
    HookRegistry.register(_RESOLVE, _prepare, HookType.BEFORE)
    HookRegistry.register(_LAYOUT, _prefer_page_first, HookType.AFTER)
    HookRegistry.register(_CREATE, _create, HookType.AROUND)
    HookRegistry.register(_MAKE_CONTROLLER, _note_what_was_loaded, HookType.BEFORE)
    HookRegistry.register(_ATTACH, _note_the_ranks, HookType.BEFORE)
    HookRegistry.register(_ATTACH, _select_zero_copy, HookType.AFTER)
    HookRegistry.register(_ATTACH_POOLS, _require_reachable_pools, HookType.BEFORE)
    HookRegistry.register(_ATTACH_POOLS, _attach_whole, HookType.AROUND)
    HookRegistry.register(_SHOULD_BACK_UP, _back_up_every_shard, HookType.AROUND)
    HookRegistry.register(_ADAPTER_ID, _identify_adapter, HookType.AROUND)
    for update in _UPDATES:
        HookRegistry.register(update, _replace_weights, HookType.AROUND)
    HookRegistry.register(_RESUME, _lose_weights, HookType.AFTER)
    HookRegistry.register(_RESET, _forget_replaced_weights, HookType.AFTER)
    HookRegistry.register(_PARSE, _look_for_a_choice, HookType.AFTER)
    HookRegistry.register(_APPLY, _pass_prefix_keys, HookType.BEFORE)
    HookRegistry.register(_APPLY, _watch_the_policy, HookType.AFTER)
    HookRegistry.register(_TRANSFER, _read_in_time, HookType.AROUND)
    HookRegistry.register(_SIDECARS, _wait_for_sidecars, HookType.BEFORE)
    HookRegistry.register(_TERMINATE, _give_up, HookType.AFTER)
    HookRegistry.register(_PREFILLED, _note_the_speed, HookType.BEFORE)
    HookRegistry.register(_PAGE_BACKUP, _tell_of_stored, HookType.AFTER)
    HookRegistry.register(_PREFETCHED, _tell_of_restored, HookType.AROUND)
    HookRegistry.register(_TAKE_EVENTS, _add_events, HookType.AFTER)
    opening.opens(open_direct)
    sglang_direct.register(HookRegistry, HookType)


def missing_seams() -> list[str]:
    """Those of `SEAMS` that the installed SGLang does not have, or whose module cannot be imported, and why."""
    return [f"{seam}{why}" for seam in SEAMS if (why := _absence(seam)) is not None]


def _absence(seam: str) -> str | None:
    """Why a seam cannot be had, as a remark behind its name; None: it can."""
    try:
        pkgutil.resolve_name(seam)
    except AttributeError:
        return _import_error(seam)
    except Exception as error:  # a module that fails to import, however it does, has no seam for us
        logger.debug("%s cannot be had", seam, exc_info=True)
        return f" ({type(error).__name__}: {error})"
    return None


def _import_error(seam: str) -> str:
    """What keeps one of its modules from being imported, as a remark; "" where all that there are can be."""
    parts = seam.split(".")
    for path in (".".join(parts[:end]) for end in range(1, len(parts))):
        try:
            importlib.import_module(path)
        except ImportError as error:
            return "" if error.name == path else f" ({type(error).__name__}: {error})"
    return ""


def _refuse_the_flag(missing: list[str]) -> None:
    """Leave the engine alone, unless the flag is used: then it must not start."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def refuse(server_args: Any, *_: Any, **__: Any) -> None:
        if _uses_the_flag(server_args):
            raise UnsupportedEngineError(unsupported(missing))

    for seam, hook, kind in (
        (_ADD_CLI_ARGS, _add_choice, HookType.AFTER),
        (_RESOLVE, refuse, HookType.BEFORE),
    ):
        if _absence(seam) is None:
            HookRegistry.register(seam, hook, kind)
        else:  # then nothing later can say it
            logger.error("%s", unsupported(missing))


def unsupported(missing: list[str]) -> str:
    """The message for an SGLang that the flag cannot work on."""
    return (
        f"{FLAG} {NAME} does not work on SGLang {version('sglang')} as it is installed here, without "
        f"{', '.join(missing)}. lmcache-sglang {version('lmcache-sglang')} is tested on SGLang "
        f"{', '.join(TESTED)}; install one of these with all that it needs, or a newer lmcache-sglang"
    )


def _uses_the_flag(settings: Any) -> bool:
    return getattr(settings, "hicache_storage_backend", None) == NAME


def _add_choice(_: None, parser: ArgumentParser, *__: Any, **___: Any) -> None:
    for action in parser._actions:
        if FLAG in action.option_strings and action.choices and NAME not in action.choices:
            action.choices = [*action.choices, NAME]


def _prepare(server_args: Any, *_: Any, **__: Any) -> None:
    """Check the settings before any process is started, and turn on what the flag needs."""
    if _resolved_before(server_args):
        return
    if _uses_the_flag(server_args):
        settings = parse_extra(server_args.hicache_storage_backend_extra_config)
    elif (own := sglang_direct.own_settings(server_args)) is not None:
        settings = own
    else:
        return
    config = Config.load(settings)
    if server_args.nnodes == 1:
        _ADAPTERS_BY_WEIGHTS.set()
    else:
        _ADAPTERS_BY_WEIGHTS.clear()
    running = version("sglang")
    if running not in TESTED:
        logger.warning(
            "lmcache-sglang is tested on SGLang %s; this is %s. Everything it builds on is there, so it "
            "goes on; compare its answers with those of a run without %s before you rely on it",
            ", ".join(TESTED),
            running,
            FLAG,
        )
    if not _uses_the_flag(server_args):
        sglang_direct.require_fit(server_args, by_own_flags=True)
        return
    if config.direct.enabled:
        sglang_direct.require_fit(server_args, by_own_flags=False)
        sglang_direct.turn_on(server_args, settings)
        return
    if server_args.disaggregation_mode == "decode":
        return
    _require_hierarchical_cache(server_args)
    if not server_args.enable_hierarchical_cache:
        logger.info("%s %s turns on --enable-hierarchical-cache", FLAG, NAME)
        server_args.enable_hierarchical_cache = True


def _require_hierarchical_cache(server_args: Any) -> None:
    """SGLang would complain of --enable-hierarchical-cache, which the user may never have given."""
    for name, why in _EXCLUDES.items():
        if getattr(server_args, name, False):
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{FLAG} {NAME}", f"does not go with {flag}, {why}. Leave one of them out"
            )


def _resolved_before(server_args: Any) -> bool:
    """Each child process asks again for what the parent resolved, and would warn again."""
    return bool(getattr(server_args, "_resolution_finished", False))


def _prefer_page_first(_: None, server_args: Any, *__: Any, **___: Any) -> None:
    """In a layer_first host pool a page lies in two runs a layer; page_first needs two in all."""
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

    cfg = resolving_view(server_args)
    if not _uses_the_flag(cfg) or cfg.hicache_mem_layout != "layer_first":
        return
    layout = {"direct": "page_first_direct", "kernel": "page_first"}.get(cfg.hicache_io_backend)
    if layout is not None:
        declare_resolution(server_args, "lmcache", hicache_mem_layout=layout)
        logger.warning("%s %s: host layout layer_first becomes %s", FLAG, NAME, layout)


def _create(
    original: Callable[..., Any],
    factory: type,
    backend_name: str,
    backend_class: type,
    storage_config: Any,
    *rest: Any,
    **named: Any,
) -> Any:
    if backend_name != NAME:
        return original(factory, backend_name, backend_class, storage_config, *rest, **named)
    return create_backend(storage_config)


def create_backend(storage_config: Any) -> Any:
    """The backend of one rank. Raises: ConfigError, and then SGLang does not start or attach."""
    from .hicache import weights

    weights.begin(_ranks)  # first: the other ranks wait for it
    from .hicache.backend import LMCacheBackend
    from .hicache.engine import draft_identity, keeps_pages, kv_heads, model_identity
    from .hicache.recompute import Recompute
    from .store import open_chain, require_room

    config = Config.load(storage_config.extra_config)
    if config.direct.enabled:
        raise ConfigError(
            "direct",
            "a store that is attached while SGLang serves goes through HiCache; take the key out",
        )
    _load_page_hash()
    model = model_identity(storage_config.model_name)
    draft = draft_identity(model)
    heads = kv_heads()
    recompute = Recompute() if config.restore == "when-faster" and keeps_pages() else None
    chain = open_chain(config)  # last: nobody would close it
    _BACKEND_MADE.set()
    return LMCacheBackend(
        storage_config,
        model,
        chain,
        require_room,
        metrics=storage_config.enable_storage_metrics,
        draft=draft,
        kv_heads=heads,
        recompute=recompute,
    )


def open_direct(settings: Mapping[str, Any]) -> opening.Opened:
    """The store of one rank's linker. Raises: ConfigError, and then SGLang does not start."""
    from .store import open_chain, require_room

    config = Config.load(settings)
    _load_page_hash()
    size = config.direct.bytes
    chain = open_chain(config)
    _BACKEND_MADE.set()
    cubins = config.direct.cubins or config.directory / "cubins"
    return opening.Opened(chain, require_room, size, config.restore == "always", cubins)


_ranks: Any = None  # those that attach together: a process group


def _note_the_ranks(controller: Any, storage_backend: Any = None, *_: Any, **__: Any) -> None:
    global _ranks
    if storage_backend == NAME:
        _ranks = getattr(controller, "tp_group", None)


@harmless
def _note_what_was_loaded(*_: Any, **__: Any) -> None:
    """In every engine with HiCache, as a store can be attached hours later, and the files be others then.

    SGLang has just loaded the weights, and what it had to download for that.
    """
    from .hicache import sources, weights

    weights.loaded(sources.seen)


def _load_page_hash() -> None:
    """SGLang would load or compile it in the first prefetch, which on a busy machine is late then."""
    from sglang.srt.mem_cache.utils import get_hash_str

    try:
        get_hash_str([0], None, 1)
    except RuntimeError:
        logger.warning("SGLang could not load its hash of pages", exc_info=True)


def _select_zero_copy(_: None, controller: Any, *__: Any, **___: Any) -> None:
    """SGLang names the backends that get its zero-copy calls; the flag's is not in that list.

    The storage threads, already started, read these attributes anew for each operation.
    """
    if getattr(controller, "storage_backend_type", None) == NAME:
        controller.page_get_func = controller._page_get_zero_copy
        controller.page_set_func = controller._page_set_zero_copy


def _require_reachable_pools(
    controller: Any, storage_backend: Any = None, *_: Any, host_pools: Any = None, **__: Any
) -> None:
    """Refuse before SGLang starts its storage threads: it does not stop them when a pool is refused."""
    if storage_backend != NAME:
        return
    from .hicache.stored_pool import is_logical, require_reachable

    for entry in host_pools or ():
        is_anchor = getattr(entry, "is_primary_index_anchor", False)
        if is_anchor and is_logical(entry.host_pool):
            continue  # it gives out indices, and has no pages of its own
        try:
            require_reachable(entry.host_pool, str(entry.name))
        except NotImplementedError as refusal:
            raise UnsupportedEngineError(f"{FLAG} {NAME}: {refusal}") from refusal


def _attach_whole(original: Callable[..., Any], controller: Any, *rest: Any, **named: Any) -> Any:
    """SGLang gives the backend its second pool when its threads run already, and stops none of them where that one
    is refused: the next attach would be told that there is a store."""
    was_attached = getattr(controller, "enable_storage", False)
    with ExitStack() as undo:
        if not was_attached:
            undo.callback(_detach, controller)
        done = original(controller, *rest, **named)
        undo.pop_all()
        return done


def _detach(controller: Any) -> None:
    """Undo an attach of ours that went wrong when it was half done."""
    ours = getattr(controller, "storage_backend_type", None) == NAME
    if ours and getattr(controller, "enable_storage", False):
        controller.detach_storage_backend()


def _back_up_every_shard(
    original: Callable[..., bool], controller: Any, transfer: Any, *rest: Any, **named: Any
) -> bool:
    """A draft model of plain heads beside a target that every rank holds whole (MLA): each rank has another
    part of it, and SGLang stores only the first rank's, but for one backend that it names."""
    if original(controller, transfer, *rest, **named):
        return True
    if getattr(controller, "storage_backend_type", None) != NAME:
        return False
    entry = controller.mem_pool_host.entry_map.get(transfer.name)
    is_draft = transfer.name in ("draft", "draft_swa")
    return is_draft and hasattr(getattr(entry, "host_pool", None), "head_num")


def _replace_weights(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Twice: pages of the old weights that are still being stored must not get the new ones' name."""
    from .hicache import weights

    weights.replaced()
    try:
        return original(*args, **kwargs)
    finally:
        weights.replaced()


def _lose_weights(_: Any, __: Any, request: Any, *___: Any, **____: Any) -> None:
    """Weights whose memory was released come back as whatever lies there, until they are updated; unless SGLang kept
    a copy. An SGLang that does not say so is taken to have kept none."""
    from sglang.srt.runtime_context import get_exec

    from .hicache import weights

    tags = getattr(request, "tags", None) or ["weights"]  # without tags it is all there is
    has_copy = getattr(get_exec().features, "enable_weights_cpu_backup", False)
    if "weights" in tags and not has_copy:
        weights.replaced()


def _forget_replaced_weights(*_: Any, **__: Any) -> None:
    """SGLang may refuse its flush while old pages are still being stored, and be asked again later.

    What the queues held until now was computed by the weights before; they are empty after a reset.
    """
    from .hicache import weights

    weights.emptied()


_user_chose = False  # of the extra config that SGLang parsed last, just before it applies it


def _look_for_a_choice(_: Any, extra_config: Any = None, *__: Any, **___: Any) -> None:
    """SGLang takes its key out and says no more than its value, and no is its default, too."""
    global _user_chose
    try:
        _user_chose = _PREFIX_KEYS in parse_extra(extra_config)
    except ConfigError:  # what SGLang could parse and we cannot is another backend's
        _user_chose = True


def _pass_prefix_keys(
    attachment: Any, *rest: Any, storage_backend: Any = None, **named: Any
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """A tier evicts the end of a chain before its start, for which it must know what comes before.

    SGLang says it by copying the names of all pages before each batch: 1.1 s for 250,000 pages of one token.
    """
    chosen = storage_backend != NAME or _user_chose or _PREFIX_KEYS not in named
    if chosen or attachment._cache.page_size < sglang_direct.LEAST_PAGE_FOR_PREFIXES:
        return None
    changed = named | {"storage_backend": storage_backend, _PREFIX_KEYS: True}
    return (attachment, *rest), changed


@harmless
def _watch_the_policy(
    _: None, attachment: Any, *__: Any, storage_backend: Any = None, **___: Any
) -> None:
    """The tree has the prefetch policy, and gets another when it is changed at run time."""
    if storage_backend == NAME:
        from .hicache import patience

        cache = attachment._cache
        patience.watch(cache.cache_controller, cache)


def _read_in_time(
    original: Callable[..., Any], controller: Any, operation: Any, *rest: Any, **named: Any
) -> Any:
    if getattr(controller, "storage_backend_type", None) != NAME:
        return original(controller, operation, *rest, **named)
    from .hicache import patience

    with patience.reading(controller, operation):
        return original(controller, operation, *rest, **named)


@harmless
def _wait_for_sidecars(controller: Any, *_: Any, **__: Any) -> None:
    """SGLang calls this when the KV has come, on the thread that reads; where it has not, nothing is read."""
    if getattr(controller, "storage_backend_type", None) == NAME:
        from .hicache import patience

        patience.kv_is_here()


@harmless
def _give_up(_: None, operation: Any, *__: Any, **___: Any) -> None:
    """On the scheduler's thread. Of another backend's operation there is nothing to end."""
    from .hicache import patience

    patience.give_up(operation)


@harmless
def _note_the_speed(
    _: Any, batch: Any = None, prefill_stats: Any = None, *__: Any, **___: Any
) -> None:
    """On the scheduler's thread, once a prefill batch."""
    launched = getattr(batch, "launch_ts", None)
    if not _BACKEND_MADE.is_set() or not launched:
        return
    from .hicache import recompute

    recompute.computed(prefill_stats.log_input_tokens, time.monotonic() - launched)


@harmless
def _tell_of_stored(_: None, controller: Any, operation: Any = None, *__: Any, **___: Any) -> None:
    """On the backup thread, which has just ended with this operation."""
    if getattr(controller, "storage_backend_type", None) != NAME or operation is None:
        return
    from .hicache import events

    page_size = controller.page_size
    stored = operation.hash_value[: operation.completed_tokens // page_size]
    before = operation.prefix_keys or ()
    events.of_this_process.backed_up(stored, operation.token_ids, page_size, before)


def _tell_of_restored(
    original: Callable[..., Any], cache: Any, operation: Any = None, *rest: Any, **named: Any
) -> Any:
    """The key of what was asked for is with the tree until this call, the operation's result after it."""
    key = _key_of(cache, operation)
    done = original(cache, operation, *rest, **named)
    _tell(cache, operation, key)
    return done


@harmless
def _key_of(cache: Any, operation: Any) -> Any:
    """What was asked for, where somebody is to be told of it."""
    from .hicache import events

    controller = getattr(cache, "cache_controller", None)
    ours = getattr(controller, "storage_backend_type", None) == NAME
    if not ours or operation is None or not events.of_this_process.wanted:
        return None
    asked = cache.ongoing_prefetch.get(operation.handle)
    return None if asked is None else asked.prefetch_key


@harmless
def _tell(cache: Any, operation: Any, key: Any) -> None:
    from .hicache import events

    if key is None or key.extra_key is not None or key.cache_salt is not None or key.is_bigram:
        return
    pages = operation.hash_value[: operation.completed_tokens // cache.page_size]
    trimmed = operation.prefetch_kv_page_offset  # pages at the head that the device had after all
    parent = operation.all_hash_values[trimmed - 1] if trimmed else operation.last_hash
    events.of_this_process.stored(pages, key.token_ids, cache.page_size, parent)


@harmless
def _add_events(taken: list[Any], *_: Any, **__: Any) -> list[Any]:
    """SGLang asks only where it publishes. Without the flag, or after a detach, little or nothing is added."""
    from .hicache import events

    return events.of_this_process.take(taken)


def _identify_adapter(original: Callable[[str, str], str], lora_name: str, lora_path: str) -> str:
    """SGLang's id lasts over restarts and knows name and path; pages in a store last longer than both.

    Each node asks for itself, and all need the same answer: of several, one may not see the files of another.
    Adapters loaded at run time get a random id from SGLang: they are never restored after a restart.
    """
    named = original(lora_name, lora_path)
    if not _ADAPTERS_BY_WEIGHTS.is_set():
        return named
    from .hicache.engine import adapter_id

    return adapter_id(named, lora_path)
