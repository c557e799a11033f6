"""vLLM's KV connector: ``--kv-transfer-config '{"kv_connector": "LMCacheSGLangConnector", "kv_role": "kv_both", ...}'``.

Settings are those of the store (docs/settings.md), in ``kv_connector_extra_config``, and `page_size`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)

from .config import Config
from .errors import ConfigError, CudaUnavailableError, TierError, UnsupportedEngineError
from .hicache.form import PageForm
from .shared_chain import SharedChain
from .store import require_room
from .vllm_connector import replacements
from .vllm_connector.backends import is_packed
from .vllm_connector.block_memory import (
    BlockMemory,
    ByIndex,
    OnCuda,
    by_strides,
    computed_on,
    in_rows,
)
from .vllm_connector.cpu_packing import Packing, packing_of, require_together
from .vllm_connector.events import StoreEvents
from .vllm_connector.groups import Group, Topology, groups_of, page_of
from .vllm_connector.identity import model_identity
from .vllm_connector.jobs import IDLE_SECONDS, Done, Jobs
from .vllm_connector.knowledge import Knowledge
from .vllm_connector.mover import Mover, Part
from .vllm_connector.planner import Planner
from .vllm_connector.statistics import PrometheusMetrics, Statistics

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
        KVConnectorPromMetrics,
        KVConnectorStats,
        PromMetric,
        PromMetricT,
    )
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from .hicache.identity import PageIdentity

logger = logging.getLogger(__name__)

PAGE_SIZE = 64  # tokens, where nothing is said


class LMCacheSGLangConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]  # vLLM's base is not typed here
    """One of each role in each process of an engine.

    Raises:
        ConfigError: names the setting that cannot be used.
        UnsupportedEngineError: pages of this model, or of an engine cut like this, have no names.
    """

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        _log_as_vllm_does()
        extra = dict(self._kv_transfer_config.kv_connector_extra_config or {})
        self._groups = groups_of(kv_cache_config, vllm_config.model_config)
        self._topology = Topology.of(vllm_config)
        self._page_size = _page_size(extra.pop("page_size", None), self._groups)
        self._config = Config.load(extra)
        self._shared = SharedChain(self._config)
        self._chain = self._shared.chain
        self._knowledge = Knowledge(
            model_identity(vllm_config), self._groups, self._topology, self._page_size, self._chain
        )
        self._several = len(kv_cache_config.kv_cache_groups) > 1
        self._planners: list[Planner] = []  # one on the scheduler's side
        self._movers: list[Mover] = []  # one on a worker's side, once there are blocks
        self._bad_blocks: set[int] = set()
        self._undo = ExitStack()
        if role is KVConnectorRole.SCHEDULER:
            self._plan(vllm_config)

    @property
    def requires_kv_delivery(self) -> bool:
        """A page that is not saved is computed again."""
        return False

    # The scheduler's side.

    def _plan(self, vllm_config: VllmConfig) -> None:
        if self._kv_transfer_config.kv_load_failure_policy != "recompute":
            logger.warning(
                "lmcache: kv_load_failure_policy is %r: a page that cannot be read ends its request with an error. "
                'Set "kv_load_failure_policy": "recompute" in --kv-transfer-config',
                self._kv_transfer_config.kv_load_failure_policy,
            )
        published = vllm_config.kv_events_config
        events = StoreEvents(wanted=published is not None and published.enable_kv_cache_events)
        self._events = events
        ranks = self._topology.ranks
        ahead = vllm_config.max_concurrent_batches - 1
        planner = Planner(
            self._groups, self._page_size, ranks, self._knowledge, events, ahead=ahead
        )
        self._planners.append(planner)
        self._undo.callback(planner.close)

    @property
    def _planner(self) -> Planner:
        (planner,) = self._planners
        return planner

    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        self._planner.bind(gpu_block_pool)

    def on_new_request(self, request: Request) -> None:
        self._planner.added(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        tokens = self._planner.matched(request, num_computed_tokens)
        return tokens, bool(tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        self._planner.allocated(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Jobs:
        return self._planner.jobs(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        done = connector_output.kv_connector_worker_meta
        if isinstance(done, Done):
            self._planner.told(done)
        for request in connector_output.finished_recving or ():
            self._planner.loaded(request)

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        self._planner.finished(request, block_ids)
        return False, None

    def has_pending_push_work(self) -> bool:
        return self._planner.is_busy

    def take_events(self) -> Iterable[KVCacheEvent]:
        return self._events.take()

    def reset_cache(self) -> bool:
        """Forget this engine's pages, in all tiers of this node; False when a tier still has some.

        A page that is being written meanwhile may be there afterwards.
        """
        self._planner.forget()
        self._planner.drop_saves()
        try:
            self._knowledge.clear()
        except TierError as error:
            logger.error("lmcache: some pages are still there: %s", error)
            return False
        return True

    # The workers' side.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        from vllm.distributed import get_tensor_model_parallel_rank

        rank = get_tensor_model_parallel_rank()
        parts = []
        for at, group in enumerate(self._groups):
            page = page_of(group, self._topology, rank, self._page_size)
            require_room(self._chain, page.page_bytes)
            layers = [kv_caches[name] for name in group.layer_names]
            _require_heads(group, page, layers)
            memory = self._memory(group, layers, PageForm.of(page))
            size = layers[0].shape[2]
            parts.append(Part(at, group, memory, size, saves=not group.latent or rank == 0))
        device = layers[0].device
        self._knowledge.announce(rank)
        mover = Mover(
            parts,
            rank,
            self._knowledge,
            self._chain,
            computed=lambda: computed_on(device),
            device=device,
        )
        replacements.watch(mover.replaced, mover.sleeps)
        self._movers.append(mover)
        self._undo.callback(mover.close)

    def _memory(self, group: Group, layers: list[torch.Tensor], form: PageForm) -> BlockMemory:
        device = layers[0].device
        packed = is_packed(group, self._vllm_config)
        if device.type == "cuda":
            return self._on_cuda(group, layers, form)
        if device.type != "cpu":
            raise UnsupportedEngineError(
                f"lmcache: blocks on {device.type} are not known; serve without --kv-transfer-config"
            )
        if not packed:
            return in_rows(layers, group.head_dims, form)
        require_together(layers)
        _require_equal_dims(group)
        dtype, size, dim = layers[0].dtype, layers[0].shape[2], group.head_dims[0]
        return by_strides(layers, packing_of(dtype, size, dim), form)

    def _on_cuda(self, group: Group, layers: list[torch.Tensor], form: PageForm) -> BlockMemory:
        from .kernels.cuda.copier import CudaCopier

        cubins = self._config.direct.cubins or self._config.directory / "cubins"
        try:
            copier = CudaCopier(layers[0].device, cubins=cubins)
        except CudaUnavailableError as error:
            logger.warning("lmcache: pages are copied by torch, by index: %s", error)
            _require_equal_dims(group)
            return ByIndex(layers, _in_rows(group, layers), form)
        self._undo.callback(copier.close)
        return OnCuda(layers, group.head_dims, form, copier)

    def unregister_kv_caches(self) -> None:
        """vLLM 0.33, before a sleep; in 0.32 the worker's own `sleep` is heard of (replacements.py)."""
        for mover in self._movers:
            mover.sleeps()

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        jobs = self._jobs()
        for mover in self._movers:
            mover.begin_step(jobs.number)
            if jobs.forgets:
                mover.drop_saves()
            for renamed in jobs.renamed:
                mover.renamed(renamed)
            mover.load(jobs.loads)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads end between steps."""

    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: torch.Tensor,
        attn_metadata: AttentionMetadata,
        **kwargs: Any,
    ) -> None:
        """Saves begin after the step."""

    def wait_for_save(self) -> None:
        for mover in self._movers:
            mover.save(self._jobs().saves)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        results = KVConnectorTransferResults()
        for mover in self._movers:
            loaded = mover.loaded(wait=0.0 if self._jobs().computes else IDLE_SECONDS)
            self._bad_blocks = set() if self._several else loaded.bad_blocks
            results.finished_recving = loaded.requests
            results.failed_recving = loaded.failed if self._several else set()
        return results

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._bad_blocks

    def build_connector_worker_meta(self) -> Done | None:
        for mover in self._movers:
            return mover.done() or None
        return None

    # Both.

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        counted = Statistics()
        for mover in self._movers:
            counted = mover.counted()
        for planner in self._planners:
            counted.add(**planner.counted())
        return None if counted.is_empty() else counted

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats:
        return Statistics(data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[type[PromMetric], type[PromMetricT]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics:
        return PrometheusMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        """Returns when what was to be saved is, or the store does not answer."""
        self._undo.close()
        self._shared.close()

    def _jobs(self) -> Jobs:
        jobs = self._get_connector_metadata()
        assert isinstance(jobs, Jobs)
        return jobs


def _require_heads(group: Group, page: PageIdentity, layers: list[torch.Tensor]) -> None:
    """Raises: UnsupportedEngineError: a group has other heads than the model says, as a draft model's may."""
    heads = page.heads[1] - page.heads[0] or 1
    if any(layer.shape[1] != heads for layer in layers):
        raise UnsupportedEngineError(
            f"lmcache: KV cache group {group.number} has {layers[0].shape[1]} heads a rank and the model {heads}; serve "
            "this model without --kv-transfer-config"
        )


def _require_equal_dims(group: Group) -> None:
    """Raises: UnsupportedEngineError."""
    if len(set(group.head_dims)) > 1:
        raise UnsupportedEngineError(
            f"lmcache: K and V of KV cache group {group.number} have {group.head_dims} numbers a head, and are copied "
            "only where they have as many; serve without --kv-transfer-config"
        )


def _log_as_vllm_does() -> None:
    """vLLM shows what its own loggers say; ours say it in the same way."""
    ours, its = logging.getLogger(__name__.partition(".")[0]), logging.getLogger("vllm")
    if its.handlers and not ours.handlers:
        ours.handlers, ours.propagate = list(its.handlers), False
        ours.setLevel(its.level)


def _page_size(given: object, groups: Iterable[Group]) -> int:
    """Raises: ConfigError."""
    sizes = sorted({group.block_size for group in groups})
    if given is None:
        return PAGE_SIZE if all(_fits(PAGE_SIZE, size) for size in sizes) else sizes[-1]
    if not isinstance(given, int) or isinstance(given, bool) or given < 1:
        raise ConfigError("page_size", f"{given!r} is no number of tokens")
    if not all(_fits(given, size) for size in sizes):
        raise ConfigError(
            "page_size", f"{given} and vLLM's block sizes {sizes} do not divide one another"
        )
    return given


def _fits(page_size: int, block_size: int) -> bool:
    return page_size % block_size == 0 or block_size % page_size == 0


def _in_rows(group: Group, layers: list[torch.Tensor]) -> list[Packing]:
    """The order that views with rows of K and V, or of the one latent, say themselves."""
    token = layers[0].stride(2)
    starts = range(0, sum(group.head_dims), group.head_dims[0])
    return [Packing(start, token, 1) for start in starts]
