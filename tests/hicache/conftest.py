"""SGLang's own host pools, small, on CPU, in this process; and backends over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import torch

from lmcache_sglang.config import Config
from lmcache_sglang.hicache.identity import ModelIdentity
from lmcache_sglang.store import open_chain, require_room
from lmcache_sglang.testing.rank_processes import Nursery
from tests.hicache import sidecar_pools

if TYPE_CHECKING:
    from lmcache_sglang.hicache.backend import LMCacheBackend

CPU = torch.device("cpu")
LAYERS = 3
END = 0  # of a pool, after one past its last layer; SGLang itself is not of one mind
HOST_BUDGET = 1 << 30  # SGLang wants ten gigabytes free beside a pool, unless it is told a budget


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """Starts ranks of SGLang's tree and controller, without a model, in processes of their own."""
    if find_spec("sglang") is None:
        pytest.skip("SGLang is not installed here")
    with Nursery(tmp_path_factory.mktemp("nursery")) as warm:
        yield warm


@pytest.fixture
def store(tmp_path: Path, shared_memory: Path) -> dict[str, Any]:
    """Settings of a small store for such ranks."""
    return {
        "path": str(tmp_path / "store"),
        "cpu": {"size": "16MiB", "path": str(shared_memory / "cpu")},
        "disk": {"size": "32MiB"},
    }


@pytest.fixture
def make_pool(sglang: None) -> Callable[..., Any]:
    return _make_pool


def _make_pool(
    kind: str,
    *,
    pages: int = 8,
    page_size: int = 4,
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 8,
    heads: int = 2,
    layers: tuple[int, int] = (0, LAYERS),
    order: str = "nhd",
) -> Any:
    """A host pool.

    Args:
        kind: "<device pool> <layout>", as in test_backend.KINDS and test_every_pool.POOLS.
        heads: of an MHA pool.
        layers: of an MHA or MLA pool: the first, and one past the last.
        order: of the bytes of an MHA pool's pages on the device, SGLang's `KVBufferLayout`.
    """
    from sglang.srt.mem_cache.pool_host.base import host_memory_budget_scope

    device_pool, layout = kind.split()
    size: dict[str, Any] = {
        "dtype": dtype,
        "layout": layout,
        "page_size": page_size,
        "tokens": page_size * pages,
    }
    with host_memory_budget_scope(HOST_BUDGET):
        match device_pool:
            case "mha":
                return _mha(head_dim, head_dim, heads, layers, order, **size)
            case "wide":
                return _mha(head_dim, head_dim // 2, heads, layers, order, **size)
            case "mla":
                return _mla(indexed=False, layers=layers, **size)
            case "dsa":
                return _mla(indexed=True, layers=layers, **size)
            case "mamba" | "conv" | "sided":
                return _mamba(pages, layout, device_pool)
            case kind if kind in sidecar_pools.MAKERS:
                return sidecar_pools.MAKERS[kind](pages, page_size, layout)
    raise ValueError(kind)


def _mha(
    k_width: int,
    v_width: int,
    heads: int,
    layers: tuple[int, int],
    order: str,
    dtype: torch.dtype,
    layout: str,
    page_size: int,
    tokens: int,
) -> Any:
    from sglang.srt.mem_cache.device_pool_info import KVBufferLayout, KVBuffers, MHABufferInfo
    from sglang.srt.mem_cache.pool_host.mha import get_mha_host_pool_cls

    k, v = (
        tuple(torch.empty(page_size, heads, width, dtype=dtype) for _ in range(*layers))
        for width in (k_width, v_width)
    )
    buffers = KVBuffers(
        k=k,
        v=v,
        k_data_ptrs=_addresses(k),
        v_data_ptrs=_addresses(v),
        layout=KVBufferLayout(order),
    )
    info = MHABufferInfo(
        buffers=buffers,
        page_size=page_size,
        head_num=heads,
        head_dim=k_width,
        v_head_dim=v_width,
        dtype=dtype,
        device=CPU,
    )
    return get_mha_host_pool_cls(info)(
        info,
        host_to_device_ratio=1.0,
        host_size=0,
        page_size=page_size,
        layout=layout,
        pin_memory=False,
        device_capacity_tokens=page_size,
        start_layer=layers[0],
        end_layer=layers[1] + END,
        host_token_capacity=tokens,
    )


def _mla(
    indexed: bool,
    layers: tuple[int, int],
    dtype: torch.dtype,
    layout: str,
    page_size: int,
    tokens: int,
) -> Any:
    from sglang.srt.mem_cache.device_pool_info import MLABufferInfo, MLASplitBuffers
    from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost

    rank, rope, index = 16, 8, 4
    count = layers[1] - layers[0]
    rows = tuple(torch.empty(page_size, 1, rank + rope, dtype=dtype) for _ in range(count))
    split = MLASplitBuffers(
        k=torch.empty(count, 1, page_size, 1, rank, dtype=dtype),
        v=torch.empty(count, 1, page_size, 1, rope, dtype=dtype),
        index_k=torch.empty(count - 1, 1, page_size, 1, index, dtype=dtype) if indexed else None,
        index_scales=torch.empty(count - 1, 1, page_size, 1, 1) if indexed else None,
        index_layer_indices=tuple(range(count - 1)) if indexed else (),
        k_width=rank,
        v_width=rope,
        index_width=index,
    )
    is_split = layout == "page_first_kv_split"
    info = MLABufferInfo(
        buffers=split if is_split else rows,
        data_ptrs=None if is_split else _addresses(rows),
        layer_indices=tuple(range(count)),
        device_layer_num=count,
        page_size=page_size,
        kv_lora_rank=rank,
        qk_rope_head_dim=rope,
        kv_cache_dim=rank + rope,
        dtype=dtype,
        device=CPU,
    )
    return MLATokenToKVPoolHost(
        info,
        host_to_device_ratio=1.0,
        host_size=0,
        page_size=page_size,
        layout=layout,
        pin_memory=False,
        device_capacity_tokens=page_size,
        start_layer=layers[0],
        end_layer=layers[1] + END,
        target_layer_num=count,
        host_token_capacity=tokens,
    )


def _mamba(pages: int, layout: str, kind: str) -> Any:
    """Recurrent state: a page is a state, with two convolutions of another type beside it.

    Args:
        kind: "conv" has these only; "sided" has a buffer of another shape as well.
    """
    from sglang.srt.mem_cache.device_pool_info import MambaStateBufferInfo
    from sglang.srt.mem_cache.pool_host.mamba import MambaPoolHost

    state = (0,) if kind == "conv" else (3, 5)
    info = MambaStateBufferInfo(
        temporal=torch.empty(LAYERS, 2, *state, dtype=torch.float32),
        conv=tuple(torch.empty(LAYERS, 2, width, dtype=torch.bfloat16) for width in (7, 4)),
        extra_checkpoint_buffers=(torch.empty(2, 6),) if kind == "sided" else (),
    )
    return MambaPoolHost(
        info, float(pages) / 2, 0, device_capacity=2, pin_memory=False, layout=layout
    )


def _addresses(tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.uint64)


class Backends:
    """Makes backends over one store directory, each for a pool."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.draft: str | None = "draft"  # fingerprint of the draft model; None without one
        self._made: list[LMCacheBackend] = []

    def open(
        self,
        pool: Any,
        *,
        model: str = "model",
        metrics: bool = False,
        cpu: object = "8MiB",
        disk: object = "32MiB",
        beside: LMCacheBackend | None = None,
        **sharding: Any,
    ) -> LMCacheBackend:
        """A backend as SGLang has it once it serves.

        Args:
            beside: share the open store of this one; LMDB opens a file once in a process.
        """
        backend = self.make(
            model=model, metrics=metrics, cpu=cpu, disk=disk, beside=beside, **sharding
        )
        backend.register_mem_pool_host(pool)
        backend.on_host_pools_registered()
        return backend

    def make(
        self,
        *,
        model: str = "model",
        metrics: bool = False,
        cpu: object = "8MiB",
        disk: object = "32MiB",
        beside: LMCacheBackend | None = None,
        kv_heads: int = 0,
        **sharding: Any,
    ) -> LMCacheBackend:
        """A backend that has no pool yet."""
        from lmcache_sglang.hicache.backend import LMCacheBackend

        own = {"path": self.path, "cpu": {"size": cpu}, "disk": {"size": disk}}
        chain = beside._chain if beside else open_chain(Config.of(own))
        identity = ModelIdentity(name=model, fingerprint="f", kv_dtype="auto", settings={})
        settings = {"draft_fingerprint": str(self.draft)}
        draft = msgspec.structs.replace(identity, settings=settings) if self.draft else None
        backend = LMCacheBackend(
            _storage_config(**sharding),
            identity,
            chain,
            require_room,
            metrics,
            draft=draft,
            kv_heads=kv_heads,
        )
        self._made.append(backend)
        return backend

    def close(self) -> None:
        for backend in self._made:
            backend.close()


@pytest.fixture
def storage_config(sglang: None) -> Callable[..., Any]:
    return _storage_config


def _storage_config(**changed: Any) -> Any:
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig

    alone: dict[str, Any] = {
        "tp_rank": 0,
        "tp_size": 1,
        "pp_rank": 0,
        "pp_size": 1,
        "attn_cp_rank": 0,
        "attn_cp_size": 1,
        "is_mla_model": False,
        "enable_storage_metrics": False,
        "is_page_first_layout": True,
        "model_name": "model",
    }
    return HiCacheStorageConfig(**alone | changed)


@pytest.fixture
def backends(sglang: None, tmp_path: Path) -> Iterator[Backends]:
    made = Backends(tmp_path / "store")
    yield made
    made.close()
