"""The direct path: an engine without SGLang's host pool finds what the one before it computed.

SGLang counts what its external linker loads as `host` (there is no storage of its own that it came from). The
engines of this file have nothing but the disk after a restart, as after a reboot, but where it says otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lmcache_sglang.testing.engine import (
    PAGE_SIZE,
    Answer,
    Setup,
    ask,
    flush,
    pages_on_disk,
    prompt,
    server,
    until,
    whole_pages,
)
from lmcache_sglang.testing.server import ServerFailed, ServerRefused, SGLangServer
from lmcache_sglang.testing.spoiling import Spoiling

FIRST = prompt(1)
SALTED: dict[str, Any] = {"cache_salt": "tenant-a"}
SMALL = ("--max-total-tokens", "1024")


@pytest.fixture(scope="module")
def setup(folder: Path) -> Setup:
    return Setup(folder / "store", args=SMALL, entry="serve", direct=True)


@pytest.fixture(scope="module")
def cold(model: Path, folder: Path, setup: Setup) -> dict[str, Answer]:
    """The answers of an engine with an empty store, stopped afterwards as an operator stops it."""
    with server(model, setup, folder / "cold.log") as engine:
        answers = {"first": ask(engine, FIRST), "salted": ask(engine, FIRST, **SALTED)}
        said = engine.get("/server_info")
        assert said["enable_unified_cache_external_linker"] is True
        assert said["hicache_storage_backend"] is None
        assert not said["enable_hierarchical_cache"]
    setup.forget_memory()
    return answers


@pytest.fixture(scope="module")
def faults(folder: Path) -> Spoiling:
    return Spoiling(folder / "faults")


@pytest.fixture(scope="module")
def warm(
    model: Path, folder: Path, setup: Setup, cold: dict[str, Answer], faults: Spoiling
) -> Iterator[SGLangServer]:
    """A second engine on the same store, started by the other command."""
    again = replace(setup, entry="launch_server", env=faults.env)
    with server(model, again, folder / "warm.log") as engine:
        yield engine


def loaded(answer: Answer, asked: Sequence[int], page_size: int = PAGE_SIZE) -> bool:
    """Whether all of a prompt came from the store, as far as it can, and nothing from elsewhere."""
    return (answer.device, answer.host, answer.storage) == (0, whole_pages(asked, page_size), 0)


def computed(answer: Answer) -> bool:
    return answer.device == answer.host == answer.storage == 0


def test_a_cold_engine_restores_nothing(cold: dict[str, Answer]) -> None:
    assert all(computed(answer) for answer in cold.values())


def test_sglangs_own_flags_do_the_same(
    model: Path, folder: Path, setup: Setup, cold: dict[str, Answer]
) -> None:
    linker = {
        "linker": "LMCacheLinker",
        "linker_module_path": "lmcache_sglang.hicache.linker",
        "linker_extra_config": setup.settings,
    }
    flags = [
        "--enable-unified-cache-external-linker",
        *("--unified-cache-external-linker-backend", "dynamic"),
        *("--unified-cache-external-linker-config", json.dumps(linker)),
    ]
    own = replace(setup, flag=False, args=[*SMALL, *flags])
    setup.forget_memory()
    with server(model, own, folder / "own flags.log") as engine:
        answer = ask(engine, FIRST)
    assert loaded(answer, FIRST)
    assert answer.tokens == cold["first"].tokens


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--enable-hierarchical-cache", "direct: does not go with --enable-hierarchical-cache"),
        ("--disable-radix-cache", "direct: does not go with --disable-radix-cache"),
    ],
)
def test_what_it_does_not_go_with_stops_the_start(
    flag: str, says: str, model: Path, folder: Path, setup: Setup
) -> None:
    engine = server(model, replace(setup, args=[*SMALL, flag]), folder / "refused.log")
    with pytest.raises(ServerFailed):
        engine.start()
    assert says in engine.log


def test_a_restart_restores_the_prefix_and_gives_the_same_tokens(
    warm: SGLangServer, cold: dict[str, Answer]
) -> None:
    answer = ask(warm, FIRST)
    assert answer.tokens == cold["first"].tokens
    assert loaded(answer, FIRST)


def test_a_prefix_of_one_tenant_is_restored_to_no_other(
    warm: SGLangServer, cold: dict[str, Answer]
) -> None:
    assert computed(ask(warm, FIRST, cache_salt="tenant-b"))
    answer = ask(warm, FIRST, **SALTED)
    assert loaded(answer, FIRST)
    assert answer.tokens == cold["salted"].tokens


def test_what_was_loaded_is_then_on_the_device(warm: SGLangServer) -> None:
    flush(warm)
    assert loaded(ask(warm, FIRST), FIRST)
    again = ask(warm, FIRST)
    assert (again.device, again.host) == (whole_pages(FIRST), 0)


def test_a_prefix_evicted_from_the_device_is_restored(warm: SGLangServer) -> None:
    before = ask(warm, prompt(50))
    for seed in range(51, 57):  # 2,400 tokens through 1,024
        ask(warm, prompt(seed))
    after = ask(warm, prompt(50))
    assert loaded(after, prompt(50))
    assert after.tokens == before.tokens


def test_flush_cache_leaves_the_store_alone(warm: SGLangServer, setup: Setup) -> None:
    stored = pages_on_disk(setup)
    before = ask(warm, prompt(2))
    until(lambda: pages_on_disk(setup) >= stored + len(prompt(2)) // PAGE_SIZE)
    stored = pages_on_disk(setup)
    flush(warm)
    after = ask(warm, prompt(2))
    assert loaded(after, prompt(2))
    assert after.tokens == before.tokens
    assert pages_on_disk(setup) >= stored


def test_a_store_that_fails_costs_a_computation(
    warm: SGLangServer, cold: dict[str, Answer], faults: Spoiling
) -> None:
    flush(warm)
    with faults.no_reads():
        answer = ask(warm, FIRST)
    assert computed(answer)
    assert answer.tokens == cold["first"].tokens
    flush(warm)
    until(lambda: comes_back(warm))  # once the tiers are tried again


def comes_back(engine: SGLangServer) -> bool:
    flush(engine)
    return loaded(ask(engine, FIRST), FIRST)


def test_a_load_that_fails_after_it_was_promised_is_aborted_and_the_engine_goes_on(
    warm: SGLangServer, cold: dict[str, Answer], faults: Spoiling
) -> None:
    flush(warm)
    with faults.damage(), pytest.raises(ServerRefused) as refused:
        ask(warm, FIRST)
    assert refused.value.status == 503
    assert "External KV cache load failed" in refused.value.body
    answer = ask(warm, FIRST)
    assert loaded(answer, FIRST)
    assert answer.tokens == cold["first"].tokens
    assert warm.get("/health_generate") is not None


def test_a_restart_restores_within_sglangs_own_patience(
    model: Path, folder: Path, setup: Setup, cold: dict[str, Answer]
) -> None:
    """Its default policy with its default budget; and the CPU tier is still there."""
    policy = ("--hicache-storage-prefetch-policy", "timeout")
    impatient = replace(setup, args=[*SMALL, *policy])
    with server(model, impatient, folder / "impatient.log") as engine:
        answer = ask(engine, FIRST)
    assert loaded(answer, FIRST)
    assert answer.tokens == cold["first"].tokens
