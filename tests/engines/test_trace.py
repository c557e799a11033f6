"""Conversations that come back when device and host have long forgotten them."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

import pytest

from lmcache_sglang.testing.engine import PAGE_SIZE, Answer, Setup, ask_timed, metrics, server
from lmcache_sglang.testing.trace import (
    SHARED_TRACE,
    Blocks,
    make_trace,
    reachable,
    reachable_in,
    read_trace,
    tokens,
)

DEVICE = 1280  # tokens: a little more than the longest request
ARGS = ("--max-total-tokens", str(DEVICE), "--hicache-ratio", "2", "--enable-metrics")
IN_THE_ENGINE = DEVICE * 3 // PAGE_SIZE  # pages that fit into both pools together
SHORT = {"sampling_params": {"temperature": 0, "max_new_tokens": 2, "ignore_eos": True}}


@dataclass(frozen=True, slots=True)
class Replay:
    answers: list[Answer]
    seconds: list[float]  # to each first token
    dropped: int  # tokens that SGLang's host pool had no room for

    @property
    def restored(self) -> int:
        return sum(answer.storage for answer in self.answers)

    @property
    def cached(self) -> int:
        return self.restored + sum(answer.device + answer.host for answer in self.answers)


@pytest.fixture(scope="module", params=["mooncake" if SHARED_TRACE.exists() else "made"])
def asked(request: pytest.FixtureRequest) -> list[Blocks]:
    """Of a trace of real traffic where there is one, and else of our own making; the test's name says which."""
    if request.param == "mooncake":
        return read_trace(SHARED_TRACE, conversations=20, turns=3, longest=60)
    return make_trace(conversations=16, turns=5)


def replay(model: Path, setup: Setup, log: Path, asked: list[Blocks]) -> Replay:
    """One request after the other."""
    with server(model, setup, log) as engine:
        timed = [ask_timed(engine, tokens(blocks, PAGE_SIZE), **SHORT) for blocks in asked]
        dropped = int(metrics(engine)["sglang:hicache_dropped_tokens_total"])
    return Replay([answer for answer, _ in timed], [seconds for _, seconds in timed], dropped)


def test_a_store_gives_back_all_that_a_cache_without_limits_would(
    model: Path, folder: Path, asked: list[Blocks]
) -> None:
    without = Setup(folder / "none", flag=False, args=[*ARGS, "--enable-hierarchical-cache"])
    bare = replay(model, without, folder / "without.log", asked)
    stored = Setup(folder / "store", args=ARGS, sglang={"prefetch_threshold": PAGE_SIZE})
    full = replay(model, stored, folder / "with.log", asked)
    possible = sum(reachable(asked)) * PAGE_SIZE
    possible_within = sum(reachable_in(asked, IN_THE_ENGINE)) * PAGE_SIZE
    report(asked, possible, possible_within, {"without": bare, "with": full})
    assert [answer.tokens for answer in full.answers] == [answer.tokens for answer in bare.answers]
    assert bare.restored == 0
    assert possible_within < 0.7 * possible  # what was left to the store
    assert 0.97 * possible <= full.cached <= possible
    assert full.restored >= 0.97 * (possible - bare.cached)


def report(asked: list[Blocks], possible: int, within: int, runs: dict[str, Replay]) -> None:
    """For who reads along (pytest -s). Times on a shared machine prove nothing, so none is asserted."""
    total = sum(map(len, asked)) * PAGE_SIZE
    print(f"\n{len(asked)} requests, {total:,} prompt tokens; a cache could give back {possible:,}")
    print(f"an LRU cache of device and host: {within:,}")
    for name, run in runs.items():
        print(
            f"{name} storage: {run.cached:,} cached ({run.cached / possible:.3f} of what is possible), "
            f"{run.restored:,} of them restored, {run.dropped:,} not stored; "
            f"median TTFT {statistics.median(run.seconds):.3f} s, sum {sum(run.seconds):.1f} s"
        )
