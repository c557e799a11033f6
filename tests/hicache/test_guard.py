"""No exception leaves the backend: it is a miss, counted, and in the log."""

from __future__ import annotations

from typing import Any

import pytest

from lmcache_sglang.hicache import guard
from lmcache_sglang.storage.seldom import Seldom
from tests.hicache.test_backend import USUAL, indices, page_hashes


class Broken(Exception):
    """What nobody foresaw."""


def broken(*_: Any, **__: Any) -> Any:
    raise Broken("by this test")


@pytest.fixture
def backend(make_pool: Any, backends: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(guard, "_seldom", Seldom())
    made = backends.open(make_pool(USUAL))
    for call in ("holders", "get", "store"):
        monkeypatch.setattr(made._chain, call, broken)
    return made


def calls(backend: Any) -> dict[str, Any]:
    """What each call answers."""
    from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer

    keys, where = page_hashes(2), indices(backend.mem_pool_host, [0, 1])
    transfer = PoolTransfer(PoolName.KV, host_indices=where, keys=keys)
    return {
        "batch_exists": backend.batch_exists(keys),
        "batch_exists_v2": backend.batch_exists_v2(keys, []),
        "batch_get_v1": backend.batch_get_v1(keys, where),
        "batch_set_v1": backend.batch_set_v1(keys, where),
        "batch_get_v2": backend.batch_get_v2([transfer]),
        "batch_set_v2": backend.batch_set_v2([transfer]),
    }


def test_what_fails_moves_nothing_and_is_counted(backend: Any) -> None:
    from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransferResult

    answers = calls(backend)
    assert answers == {
        "batch_exists": 0,
        "batch_exists_v2": PoolTransferResult(0, {}, []),
        "batch_get_v1": [False, False],
        "batch_set_v1": [False, False],
        "batch_get_v2": {PoolName.KV: [False, False]},
        "batch_set_v2": {PoolName.KV: [False, False]},
    }
    assert backend.reasons() == {
        "failed.batch_exists": 1,
        "failed.batch_exists_v2": 1,
        "failed.get": 2,
        "failed.set": 2,
    }


def test_what_fails_is_in_the_log_once_with_its_cause(
    backend: Any, caplog: pytest.LogCaptureFixture
) -> None:
    calls(backend)
    calls(backend)
    assert caplog.text.count("batch_exists failed") == 1
    assert "by this test" in caplog.text


def test_keys_that_are_no_hashes_are_misses(make_pool: Any, backends: Any) -> None:
    pool = make_pool(USUAL)
    backend = backends.open(pool)
    for odd in ("", "zz" * 32, "00" * 31):
        assert backend.batch_exists([odd]) == 0
        assert backend.batch_set_v1([odd], indices(pool, [0])) == [False]


def test_an_interrupt_is_not_held_up(
    make_pool: Any, backends: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = backends.open(make_pool(USUAL))

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(backend._chain, "holders", interrupted)
    with pytest.raises(KeyboardInterrupt):
        backend.batch_exists(page_hashes(1))
