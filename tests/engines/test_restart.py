"""What the store is for: an engine that starts again finds what the one before it computed.

Here from the disk alone, as after a reboot; test_memory.py does it from memory alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lmcache_sglang.testing.engine import (
    Answer,
    Setup,
    ask,
    metrics,
    pages_on_disk,
    prompt,
    server,
    until,
    whole_pages,
)
from lmcache_sglang.testing.server import SGLangServer

FIRST = prompt(1)
SALTED: dict[str, Any] = {"cache_salt": "tenant-a"}
KEYED: dict[str, Any] = {"extra_key": "adapter-a"}  # where SGLang puts the id of a LoRA adapter
SMALL = ("--max-total-tokens", "1024", "--hicache-ratio", "2", "--enable-metrics")


@pytest.fixture(scope="module")
def setup(folder: Path) -> Setup:
    return Setup(folder / "store", args=SMALL, entry="serve")


@pytest.fixture(scope="module")
def cold(model: Path, folder: Path, setup: Setup) -> dict[str, Answer]:
    """The answers of an engine with an empty store, stopped afterwards as an operator stops it."""
    with server(model, setup, folder / "cold.log") as engine:
        answers = {
            "first": ask(engine, FIRST),
            "salted": ask(engine, FIRST, **SALTED),
            "keyed": ask(engine, FIRST, **KEYED),
        }
        assert engine.get("/server_info")["hicache_storage_backend"] == "lmcache"
    setup.forget_memory()
    return answers


@pytest.fixture(scope="module")
def warm(
    model: Path, folder: Path, setup: Setup, cold: dict[str, Answer]
) -> Iterator[SGLangServer]:
    """A second engine on the same store, started by the other command."""
    again = Setup(setup.store, args=SMALL, entry="launch_server")
    with server(model, again, folder / "warm.log") as engine:
        yield engine


def test_a_cold_engine_restores_nothing(cold: dict[str, Answer]) -> None:
    assert cold["first"].storage == 0
    for name in ("salted", "keyed"):
        assert cold[name].device == cold[name].host == cold[name].storage == 0


def test_a_restart_restores_within_sglangs_own_patience(
    model: Path, folder: Path, setup: Setup, cold: dict[str, Answer]
) -> None:
    """Its default policy with its default budget, as users have it who give the flag and no more."""
    impatient = Setup(setup.store, args=[*SMALL, "--hicache-storage-prefetch-policy", "timeout"])
    with server(model, impatient, folder / "impatient.log") as engine:
        answer = ask(engine, FIRST)
    setup.forget_memory()
    assert answer.storage == whole_pages(FIRST)
    assert answer.tokens == cold["first"].tokens


def test_a_restart_restores_the_prefix_and_gives_the_same_tokens(
    warm: SGLangServer, cold: dict[str, Answer]
) -> None:
    answer = ask(warm, FIRST)
    assert answer.tokens == cold["first"].tokens
    assert answer.storage == whole_pages(FIRST)
    assert answer.backend == "lmcache"


@pytest.mark.parametrize(
    ("name", "own", "other"),
    [
        ("salted", SALTED, {"cache_salt": "tenant-b"}),
        ("keyed", KEYED, {"extra_key": "adapter-b"}),
    ],
)
def test_a_prefix_of_one_tenant_or_adapter_is_restored_to_no_other(
    warm: SGLangServer,
    cold: dict[str, Answer],
    name: str,
    own: dict[str, Any],
    other: dict[str, Any],
) -> None:
    """LoRA itself does not run on CPU (SGLang pins memory for it); its id goes the way of extra_key."""
    assert ask(warm, FIRST, **other).storage == 0
    answer = ask(warm, FIRST, **own)
    assert answer.storage == whole_pages(FIRST)
    assert answer.tokens == cold[name].tokens


def test_a_prefix_evicted_from_device_and_host_is_restored(warm: SGLangServer) -> None:
    before = ask(warm, prompt(50))
    for seed in range(51, 61):  # 4,000 tokens through 1,024 on the device and 2,048 on the host
        ask(warm, prompt(seed))
    after = ask(warm, prompt(50))
    assert after.storage == whole_pages(prompt(50))
    assert after.device == after.host == 0
    assert after.tokens == before.tokens


def test_flush_cache_leaves_the_store_alone(warm: SGLangServer, setup: Setup) -> None:
    stored = pages_on_disk(setup)
    before = ask(warm, prompt(2))
    until(lambda: pages_on_disk(setup) >= stored + len(prompt(2)) // setup.page_size)
    stored = pages_on_disk(setup)
    warm.post("/flush_cache")
    after = ask(warm, prompt(2))
    assert after.device == after.host == 0
    assert after.storage == whole_pages(prompt(2))
    assert after.tokens == before.tokens
    assert pages_on_disk(setup) >= stored


def test_the_metrics_know_what_was_restored(warm: SGLangServer) -> None:
    values = metrics(warm)
    assert values["sglang:prefetched_tokens_total"] >= whole_pages(FIRST)
    assert values["sglang:backuped_tokens_total"] >= whole_pages(FIRST)
    assert values["sglang:prefetch_bandwidth_count"] >= 1
    assert values["sglang:backup_bandwidth_count"] >= 1


def test_clear_forgets_the_store(warm: SGLangServer, setup: Setup) -> None:
    """The last test of this file: it empties the store."""
    before = ask(warm, FIRST)
    until(lambda: pages_on_disk(setup) > 0)
    warm.post("/hicache/storage-backend/clear")
    assert pages_on_disk(setup) == 0
    warm.post("/flush_cache")
    after = ask(warm, FIRST)
    assert after.storage == after.device == after.host == 0
    assert after.tokens == before.tokens
