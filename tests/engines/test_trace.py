"""Conversations that come back when device and host have long forgotten them."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from lmcache_sglang.testing.engine import PAGE_SIZE, Answer, Setup, ask_timed, server
from lmcache_sglang.testing.trace import (
    SHARED_TRACE,
    Blocks,
    make_trace,
    reachable,
    reachable_in,
    read_trace,
    tokens,
)

DEVICE = 2048  # tokens: two of the longest requests
ARGS = ("--max-total-tokens", str(DEVICE), "--hicache-ratio", "1.2")
IN_THE_ENGINE = DEVICE * 22 // 10 // PAGE_SIZE  # pages that fit into both pools together
SHORT = {"sampling_params": {"temperature": 0, "max_new_tokens": 2, "ignore_eos": True}}


@dataclass(frozen=True, slots=True)
class Replay:
    answers: list[Answer]
    seconds: list[float]  # to each first token

    @property
    def restored(self) -> int:
        return sum(answer.storage for answer in self.answers)

    @property
    def cached(self) -> int:
        return self.restored + sum(answer.device + answer.host for answer in self.answers)


@pytest.fixture(scope="module")
def asked() -> list[Blocks]:
    """Of a trace of real traffic where there is one, and else of our own making."""
    if SHARED_TRACE.exists():
        return read_trace(SHARED_TRACE, conversations=12, turns=5, longest=100)
    return make_trace(conversations=16, turns=5)


def replay(model: Path, setup: Setup, log: Path, asked: list[Blocks]) -> Replay:
    """One request after the other."""
    with server(model, setup, log) as engine:
        timed = [ask_timed(engine, tokens(blocks, PAGE_SIZE), **SHORT) for blocks in asked]
    return Replay([answer for answer, _ in timed], [seconds for _, seconds in timed])


def test_a_store_gives_back_all_that_a_cache_without_limits_would(
    model: Path, folder: Path, asked: list[Blocks], record_property: Callable[[str, object], None]
) -> None:
    without = Setup(folder / "none", flag=False, args=[*ARGS, "--enable-hierarchical-cache"])
    bare = replay(model, without, folder / "without.log", asked)
    stored = Setup(folder / "store", args=ARGS, sglang={"prefetch_threshold": PAGE_SIZE})
    full = replay(model, stored, folder / "with.log", asked)
    possible = sum(reachable(asked)) * PAGE_SIZE
    possible_within = sum(reachable_in(asked, IN_THE_ENGINE)) * PAGE_SIZE
    record_property("prompt tokens", sum(map(len, asked)) * PAGE_SIZE)
    record_property("possible, without limits", possible)
    record_property("possible, within device and host", possible_within)
    record_property("cached without storage", bare.cached)
    record_property("cached with storage", full.cached)
    record_property("restored", full.restored)
    for name, run in (("without", bare), ("with", full)):
        record_property(f"median TTFT {name} storage, s", statistics.median(run.seconds))
    assert [answer.tokens for answer in full.answers] == [answer.tokens for answer in bare.answers]
    assert bare.restored == 0
    assert possible_within < 0.7 * possible  # what was left to the store
    assert 0.97 * possible <= full.cached <= possible
    assert full.restored >= 0.97 * (possible - bare.cached)
