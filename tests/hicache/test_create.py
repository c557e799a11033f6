"""Making a backend as SGLang's factory makes it: settings and model come from the running engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from lmcache_sglang.config import ENVIRONMENT
from lmcache_sglang.errors import ConfigError
from lmcache_sglang.sglang_plugin import create_backend

MIB = 1 << 20

Create = Callable[..., Any]


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
}


@pytest.fixture
def create(
    storage_config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Create]:
    """Makes a backend in an engine that serves `model` with the given `ServerArgs` fields."""
    from sglang.srt.runtime_context import get_context

    monkeypatch.delenv(ENVIRONMENT, raising=False)
    settings = {"path": str(tmp_path / "store"), "cpu": {"size": "8MiB"}, "disk": {"size": "16MiB"}}

    def make(
        weights: bytes = b"weights",
        extra: dict[str, Any] | None = None,
        metrics: bool = False,
        **fields: Any,
    ) -> Any:
        model = tmp_path / "model"
        model.mkdir(exist_ok=True)
        (model / "config.json").write_text(json.dumps(CONFIG))
        (model / "model.bin").write_bytes(weights)
        config = storage_config(
            extra_config=settings | (extra or {}), enable_storage_metrics=metrics
        )
        with get_context().override_server_args(model_path=str(model), **fields):
            backend = create_backend(config)
        opened.callback(backend.close)
        return backend

    with ExitStack() as opened:
        yield make


def test_the_settings_of_the_engine_open_the_store(create: Create, tmp_path: Path) -> None:
    backend = create(extra={"prefetch_threshold": 64})
    assert type(backend).__name__ == "lmcache"
    assert [tier.name for tier in backend._chain.tiers] == ["cpu", "disk"]
    assert (tmp_path / "store").is_dir()


@pytest.mark.parametrize("ranks", [{}, {"tp_size": 2}, {"tp_size": 2, "dp_size": 2}], ids=str)
def test_the_memory_is_one_for_all_ranks_of_the_node(create: Create, ranks: dict[str, int]) -> None:
    backend = create(extra={"disk": {"size": 0}}, **ranks)
    (cpu,) = backend._chain.tiers
    assert cpu.capacity == 8 * MIB


@pytest.mark.parametrize("metrics", [False, True])
def test_statistics_are_kept_where_sglang_collects_them(metrics: bool, create: Create) -> None:
    assert (create(metrics=metrics).get_stats() is not None) == metrics


@pytest.mark.parametrize(
    ("extra", "fields", "declines"),
    [
        ({}, {}, True),
        ({"restore": "when-faster"}, {"hicache_host_memory_mode": "cache"}, True),
        ({"restore": "always"}, {}, False),
        ({}, {"hicache_host_memory_mode": "buffer_only"}, False),
        ({"restore": "when-faster"}, {"hicache_host_memory_mode": "buffer_only"}, False),
    ],
    ids=str,
)
def test_what_is_computed_sooner_is_declined_unless_the_user_or_the_host_pool_forbids_it(
    extra: dict[str, Any], fields: dict[str, str], declines: bool, create: Create
) -> None:
    """In `buffer_only` SGLang would take a page that is declined for one that is not stored."""
    assert (create(extra=extra, **fields)._recompute is not None) == declines


def test_a_mistake_names_its_key_also_when_attached_at_run_time(create: Create) -> None:
    with pytest.raises(ConfigError, match=r"did you mean cpu.size\?"):
        create(extra={"cpu": {"sise": 1}})


def test_other_weights_under_the_same_path_miss(
    create: Create, make_pool: Callable[..., Any]
) -> None:
    import torch

    pool, hashes = make_pool("mha page_first"), ["ab" * 32]
    one_page = torch.arange(pool.page_size)
    before = create(weights=b"of yesterday")
    before.register_mem_pool_host(pool)
    assert before.batch_set_v1(hashes, one_page) == [True]
    before.close()
    for weights, hits in ((b"of today", 0), (b"of yesterday", 1)):
        backend = create(weights=weights)
        backend.register_mem_pool_host(pool)
        assert backend.batch_exists(hashes) == hits
        backend.close()


@pytest.mark.parametrize("asked", ["model_identity", "draft_identity", "kv_heads", "keeps_pages"])
def test_a_start_that_fails_leaves_the_store_free(
    asked: str, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LMDB opens a file once in a process, so the next attempt to attach would fail, too."""

    def unknown(*_: object) -> None:
        raise RuntimeError("no model")

    with monkeypatch.context() as patch:
        patch.setattr(f"lmcache_sglang.hicache.engine.{asked}", unknown)
        with pytest.raises(RuntimeError, match="no model"):
            create()
    create()
