"""The store comes and goes at run time, by SGLang's admin route.

The server runs the one layout that the flag would have coerced, layer_first: two runs a layer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmcache_sglang.testing.engine import (
    Answer,
    Setup,
    ask,
    pages_on_disk,
    prompt,
    server,
    until,
    whole_pages,
)
from lmcache_sglang.testing.server import ServerRefused, SGLangServer

FIRST = prompt(1)
ROUTE = "/hicache/storage-backend"
ARGS = (
    "--enable-hierarchical-cache",
    "--hicache-mem-layout",
    "layer_first",
    "--max-total-tokens",
    "2048",
)


@pytest.fixture(scope="module")
def setup(folder: Path) -> Setup:
    return Setup(folder / "store", flag=False, args=ARGS)


@pytest.fixture(scope="module")
def engine(model: Path, folder: Path, setup: Setup) -> Iterator[SGLangServer]:
    """A server without a store."""
    with server(model, setup, folder / "first.log") as running:
        yield running


@pytest.fixture(scope="module")
def cold(engine: SGLangServer, setup: Setup) -> Answer:
    """Computed with the store attached, and stored."""
    attach(engine, setup)
    answer = ask(engine, FIRST)
    until(lambda: pages_on_disk(setup) >= len(FIRST) // setup.page_size)
    return answer


def attach(engine: SGLangServer, setup: Setup, **overrides: str) -> None:
    body = {
        "hicache_storage_backend": "lmcache",
        "hicache_storage_backend_extra_config_json": setup.extra_config,
    }
    engine.put(ROUTE, body | overrides)


def test_attach_makes_the_store_serve_under_its_name(engine: SGLangServer, cold: Answer) -> None:
    assert cold.storage == 0
    assert engine.get(ROUTE)["hicache_storage_backend"] == "lmcache"
    engine.post("/flush_cache")
    answer = ask(engine, FIRST)
    assert answer.storage == whole_pages(FIRST)
    assert answer.backend == "lmcache"
    assert answer.tokens == cold.tokens


def test_detach_lets_go_and_attach_finds_everything_again(
    engine: SGLangServer, setup: Setup, cold: Answer
) -> None:
    engine.delete(ROUTE)
    engine.post("/flush_cache")
    detached = ask(engine, FIRST)
    assert detached.storage == 0
    assert detached.tokens == cold.tokens
    engine.post("/flush_cache")
    attach(engine, setup)
    answer = ask(engine, FIRST)
    assert answer.storage == whole_pages(FIRST)
    assert answer.tokens == cold.tokens


def test_a_bad_setting_refuses_the_attach_and_leaves_the_engine_serving(
    engine: SGLangServer, setup: Setup, cold: Answer
) -> None:
    engine.delete(ROUTE)
    wrong = json.dumps({"path": str(setup.store), "cpu": {"sise": "1GiB"}})
    with pytest.raises(ServerRefused, match=r"cpu\.sise.*did you mean cpu\.size"):
        attach(engine, setup, hicache_storage_backend_extra_config_json=wrong)
    tiny = json.dumps({"path": str(setup.store), "cpu": {"size": 1000, "path": str(setup.memory)}})
    with pytest.raises(ServerRefused, match=r"cpu\.size"):
        attach(engine, setup, hicache_storage_backend_extra_config_json=tiny)
    assert ask(engine, FIRST).tokens == cold.tokens
    attach(engine, setup)  # the refused ones left nothing open
    engine.post("/flush_cache")
    assert ask(engine, FIRST).storage == whole_pages(FIRST)


def test_another_engine_restores_what_a_killed_one_had_attached(
    model: Path, folder: Path, setup: Setup, engine: SGLangServer, cold: Answer
) -> None:
    """The last test of this file: it kills the server. The other one has SGLang's other io backend."""
    engine.kill()
    direct = Setup(setup.store, flag=False, args=[*ARGS, "--hicache-io-backend", "direct"])
    with server(model, direct, folder / "second.log") as second:
        attach(second, direct)
        answer = ask(second, FIRST)
        new = ask(second, prompt(2))
        until(lambda: pages_on_disk(setup) >= 2 * len(FIRST) // setup.page_size)
        second.post("/flush_cache")
        again = ask(second, prompt(2))
    assert answer.storage == whole_pages(FIRST)
    assert answer.tokens == cold.tokens
    assert again.storage == whole_pages(prompt(2))
    assert again.tokens == new.tokens
