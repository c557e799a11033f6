"""vLLM's KV cache groups, and what the pages of each hold on each rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedEngineError
from ..hicache.identity import ModelIdentity, PageIdentity, namespace
from ..hicache.kind import Kind

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

LAYOUT = "page_first"


@dataclass(frozen=True, slots=True)
class Group:
    """Layers that share a block table.

    Attributes:
        number: vLLM's.
        pool: the name of its pages' pool; "kv" where it holds all of a model's layers, as SGLang calls that.
        layer_names: vLLM's, in the order of the model.
        layers: of the model, first and one past the last, or of the group where they do not follow one another.
        block_size: tokens.
        head_dims: of the rows: K's and V's, or the one latent row's.
        named_dims: what the namespace says: of K and of V, or of the latent and of the rope part.
        latent: K and V are one row, which every rank holds whole.
        dtype: of the numbers, as torch calls it.
        itemsize: of a number.
        window: tokens that a query sees back, itself included; 0: all.
    """

    number: int
    pool: str
    layer_names: tuple[str, ...]
    layers: tuple[int, int]
    block_size: int
    head_dims: tuple[int, ...]
    named_dims: tuple[int, int]
    latent: bool
    dtype: str
    itemsize: int
    window: int


@dataclass(frozen=True, slots=True)
class Topology:
    """How an engine is cut.

    Attributes:
        ranks: of tensor parallelism.
        kv_heads: of the whole model.
    """

    ranks: int
    kv_heads: int

    @classmethod
    def of(cls, config: VllmConfig) -> Topology:
        """Raises: UnsupportedEngineError: it is cut in a way that pages have no names for."""
        parallel = config.parallel_config
        for name in (
            "pipeline_parallel_size",
            "decode_context_parallel_size",
            "prefill_context_parallel_size",
        ):
            if (size := getattr(parallel, name, 1)) != 1:
                raise UnsupportedEngineError(
                    f"lmcache: {name} is {size}: the connector knows tensor parallelism only"
                )
        return cls(parallel.tensor_parallel_size, config.model_config.get_total_num_kv_heads())

    def heads(self, rank: int) -> tuple[int, int]:
        """Those that a rank holds. With fewer of them than ranks neighbours hold the same."""
        if self.kv_heads < self.ranks:
            first = rank // (self.ranks // self.kv_heads)
            return first, first + 1
        each = self.kv_heads // self.ranks
        return rank * each, (rank + 1) * each


def groups_of(config: KVCacheConfig, model: Any) -> tuple[Group, ...]:
    """Raises: UnsupportedEngineError: a group holds something else than attention's keys and values."""
    found = tuple(
        _group(number, config.kv_cache_groups[number], len(config.kv_cache_groups), model)
        for number in config.prefix_cacheable_group_ids
    )
    if not found or all(group.window for group in found):
        raise UnsupportedEngineError(
            "lmcache: no group of this model's layers attends to all that was before: pages of it are of no use"
        )
    return found


def _group(number: int, group: Any, groups: int, model: Any) -> Group:
    from vllm.model_executor.models.utils import extract_layer_index
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec

    spec = group.kv_cache_spec
    is_known = type(spec) in (FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec)
    if not is_known or spec.tokens_per_state != 1 or spec.page_size_padded is not None:
        raise UnsupportedEngineError(
            f"lmcache: KV cache group {number} ({type(spec).__name__}) is no plain attention; serve this model "
            "without --kv-transfer-config"
        )
    names = sorted(group.layer_names, key=extract_layer_index)
    numbers = [extract_layer_index(name) for name in names]
    whole = groups == 1 and numbers == list(range(len(numbers)))
    latent = isinstance(spec, MLAAttentionSpec)
    config = model.hf_text_config
    return Group(
        number=number,
        pool="kv" if whole else f"vllm:{','.join(map(str, numbers))}",
        layer_names=tuple(names),
        layers=(0, len(names)),
        block_size=spec.block_size,
        head_dims=(spec.head_size,) if latent else (spec.head_size, spec.head_size_v),
        named_dims=(config.kv_lora_rank, config.qk_rope_head_dim)
        if latent
        else (spec.head_size, spec.head_size_v),
        latent=latent,
        dtype=str(spec.dtype).removeprefix("torch."),
        itemsize=spec.dtype.itemsize,
        window=spec.sliding_window if isinstance(spec, SlidingWindowSpec) else 0,
    )


def page_of(group: Group, topology: Topology, rank: int, page_size: int) -> PageIdentity:
    """What a page of one rank holds."""
    heads = (0, 0) if group.latent else topology.heads(rank)
    rows = page_size * len(group.layer_names) * (heads[1] - heads[0] or 1)
    return PageIdentity(
        pool=group.pool,
        page_size=page_size,
        page_bytes=rows * sum(group.head_dims) * group.itemsize,
        dtype=group.dtype,
        layers=group.layers,
        stored_layers=len(group.layer_names),
        heads=heads,
        total_heads=0 if group.latent else topology.kv_heads,
        head_dims=group.named_dims,
        layout=LAYOUT,
        slices={},
    )


def kind_of(model: ModelIdentity, page: PageIdentity) -> Kind:
    return Kind(namespace(model, page), model, page)
