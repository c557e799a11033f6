"""A replacement of weights changes the name of everything that is computed after it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lmcache_sglang.errors import UnsupportedEngineError
from lmcache_sglang.hicache import weights
from lmcache_sglang.sglang_plugin import NAME, _forget_replaced_weights, _require_proven_pools


@pytest.fixture(autouse=True)
def own_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_epoch", "")
    monkeypatch.setattr(weights, "_listeners", [])


class Listener:
    def __init__(self) -> None:
        self.heard: list[str] = []

    def hear(self) -> None:
        self.heard.append(weights.epoch())


def test_each_replacement_is_told_under_a_name_of_its_own() -> None:
    listener = Listener()
    weights.on_replaced(listener.hear)
    assert weights.epoch() == ""
    weights.replaced()
    weights.replaced()
    assert len(set(listener.heard)) == 2
    assert listener.heard[-1] == weights.epoch() != ""


def test_who_is_gone_is_not_told() -> None:
    weights.on_replaced(Listener().hear)
    gc.collect()
    weights.replaced()
    assert weights._listeners == []


class Entry:
    def __init__(self, name: str) -> None:
        self.name = name


def test_a_model_with_a_pool_nobody_saw_come_back_is_refused_before_anything_is_attached() -> None:
    pools = [Entry(name) for name in ("kv", "mamba", "draft", "indexer")]
    with pytest.raises(UnsupportedEngineError, match="state in draft, indexer, and"):
        _require_proven_pools(None, NAME, host_pools=pools)


@pytest.mark.parametrize(
    ("backend", "pools"),
    [
        (NAME, [Entry("kv")]),
        (NAME, [Entry("kv"), Entry("swa"), Entry("mamba")]),
        (NAME, None),
        ("file", [Entry("draft")]),
    ],
)
def test_other_models_and_other_backends_are_not_refused(backend: str, pools: Any) -> None:
    _require_proven_pools(None, backend, host_pools=pools)


def test_a_backend_finds_and_leaves_nothing_under_the_old_name(
    make_pool: Callable[..., Any], backends: Any
) -> None:
    pool = make_pool("mha page_first", pages=2)
    backend = backends.open(pool)
    page, hashes = torch.arange(pool.page_size), ["ab" * 32]
    assert backend.batch_set_v1(hashes, page) == [True]
    weights.replaced()
    assert backend.batch_exists(hashes) == 0
    assert backend.batch_get_v1(hashes, page) == [False]
    assert backend.batch_set_v1(hashes, page) == [True]
    weights.replaced()
    assert backend.batch_exists(hashes) == 0


def test_what_was_still_being_stored_at_the_update_is_not_found_after_the_reset(
    make_pool: Callable[..., Any], backends: Any
) -> None:
    """SGLang may refuse its flush at the update; old pages are then stored until it is asked again."""
    pool = make_pool("mha page_first", pages=2)
    backend = backends.open(pool)
    page, hashes = torch.arange(pool.page_size), ["cd" * 32]
    weights.replaced()
    assert backend.batch_set_v1(hashes, page) == [True]  # of the old weights, late
    _forget_replaced_weights()
    assert backend.batch_exists(hashes) == 0


def test_a_reset_without_an_update_keeps_the_name() -> None:
    _forget_replaced_weights()
    assert weights.epoch() == ""
