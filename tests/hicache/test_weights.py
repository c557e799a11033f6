"""A replacement of weights changes the name of everything that is computed after it."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lmcache_sglang import sglang_plugin
from lmcache_sglang.errors import ConfigError, UnsupportedEngineError
from lmcache_sglang.hicache import weights
from lmcache_sglang.sglang_plugin import (
    NAME,
    _back_up_every_shard,
    _forget_replaced_weights,
    _require_reachable_pools,
    create_backend,
)
from tests.hicache.sidecar_pools import logical


@pytest.fixture(autouse=True)
def own_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_state", weights._State())


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


def test_a_name_is_never_given_twice_not_even_after_another_attach() -> None:
    given = []
    for _ in range(3):
        weights.begin()
        given.append(weights.temporary())
        for step in (weights.replaced, weights.emptied, weights.emptied, weights.replaced):
            step()
            given.append(weights.epoch())
    assert len(set(given)) == len(given) == 15


def test_a_name_lasts_until_the_next_replacement() -> None:
    assert weights.temporary() == weights.temporary()
    assert weights.epoch() == ""
    weights.replaced()
    assert weights.epoch() == weights.temporary() == weights.temporary()


def test_ranks_that_are_told_the_same_have_the_same_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a rank misses of the resets, which need not be collective, costs it hits until the next update."""
    rank, other = weights._State(engine="of both"), weights._State(engine="of both")
    names: list[list[str]] = [[], []]
    steps = (weights.replaced, weights.replaced, weights.emptied, weights.replaced)
    for told, state in zip(names, (rank, other), strict=True):
        monkeypatch.setattr(weights, "_state", state)
        for step in steps:
            if state is rank or step is not weights.emptied:
                step()
            told.append(weights.temporary())
    assert [one == two for one, two in zip(*names, strict=True)] == [True, True, False, True]


def test_a_backend_meets_the_other_ranks_before_it_can_be_refused(
    sglang: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake that only one rank makes must not leave the others waiting."""
    met: list[Any] = []
    monkeypatch.setattr(weights, "begin", met.append)
    monkeypatch.setattr(sglang_plugin, "_ranks", "all")
    with pytest.raises(ConfigError):
        create_backend(SimpleNamespace(extra_config={"cpu": {"sise": 1}}))
    assert met == ["all"]


def test_weights_that_were_replaced_stay_so_after_another_attach() -> None:
    weights.replaced()
    weights.begin()
    assert weights.epoch() != ""


def test_nothing_has_changed_where_nobody_looked_before() -> None:
    assert weights.changed(lambda: {"model": None}) == []


def test_what_lies_elsewhere_than_it_did_at_the_first_look_has_changed() -> None:
    one, other = ((1, 2, 3, 4),), ((1, 2, 3, 5),)
    weights.loaded(lambda: {"model": one, "draft": one, "missing": None})
    weights.loaded(lambda: {"model": other})  # of a controller that is made later
    assert weights.changed(lambda: {"model": one, "draft": other, "missing": None}) == ["draft"]
    assert weights.changed(lambda: {"missing": one, "adapter": None}) == ["missing", "adapter"]


def test_after_a_look_that_failed_nothing_is_known_to_be_the_same() -> None:
    def fails() -> weights.Seen:
        raise RuntimeError("no settings")

    with pytest.raises(RuntimeError):
        weights.loaded(fails)
    assert weights.changed(lambda: {"model": None}) == ["model"]


def test_who_is_gone_is_not_told() -> None:
    weights.on_replaced(Listener().hear)
    gc.collect()
    weights.replaced()
    assert weights._state.listeners == []


def entry(name: str, pool: Any, is_anchor: bool = False) -> Any:
    from sglang.srt.mem_cache.pool_host.group import PoolEntry

    return PoolEntry(name, pool, None, lambda layer: layer, is_anchor)


def mute() -> Any:
    """A pool that says neither where its pages lie nor what they hold."""
    return SimpleNamespace(page_size=1, dcp_size=1, kv_buffer=None)


def test_a_pool_that_cannot_be_reached_is_refused_before_anything_is_attached(
    make_pool: Callable[..., Any],
) -> None:
    pools = [entry("kv", make_pool("mha page_first"), is_anchor=True), entry("swa", mute())]
    with pytest.raises(UnsupportedEngineError, match="pool 'swa'"):
        _require_reachable_pools(None, NAME, host_pools=pools)
    with pytest.raises(UnsupportedEngineError, match="pool 'kv'"):
        _require_reachable_pools(None, NAME, host_pools=[entry("kv", mute(), is_anchor=True)])


def test_what_can_be_reached_and_other_backends_are_not_refused(
    make_pool: Callable[..., Any],
) -> None:
    kv = entry("kv", make_pool("mha page_first"), is_anchor=True)
    anchor = entry("kv", logical(64, 16, "page_first"), is_anchor=True)
    for backend, pools in (
        (NAME, [kv, entry("mamba", make_pool("sided page_first"))]),
        (NAME, [anchor, entry("deepseek_v4_c4", make_pool("paged page_first"))]),
        (NAME, None),
        ("file", [entry("swa", mute())]),
    ):
        _require_reachable_pools(None, backend, host_pools=pools)


@pytest.mark.parametrize(
    ("backend", "pool", "kind", "wanted"),
    [
        (NAME, "draft", "mha page_first", True),
        (NAME, "draft_swa", "mha page_first", True),
        (NAME, "draft", "mla page_first", False),
        (NAME, "swa", "mha page_first", False),
        (NAME, "mamba", "mamba page_first", True),
        ("file", "draft", "mha page_first", False),
    ],
)
def test_every_rank_stores_its_part_of_a_draft_model(
    backend: str, pool: str, kind: str, wanted: bool, make_pool: Callable[..., Any]
) -> None:
    """Beside a target whose KV only the first rank stores; through SGLang's own controller."""
    from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
    from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController

    controller = HybridCacheController.__new__(HybridCacheController)
    controller.storage_config = SimpleNamespace(is_storage_writer=False)
    controller.storage_backend_type = backend
    host = SimpleNamespace(host_pool=make_pool(kind))
    controller.mem_pool_host = SimpleNamespace(entry_map={PoolName(pool): host})
    original = inspect.unwrap(HybridCacheController.should_backup)
    asked = PoolTransfer(PoolName(pool))
    assert _back_up_every_shard(original, controller, asked) is wanted


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
