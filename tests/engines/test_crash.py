"""A server that is killed in the middle of writing leaves a sound store, in memory and on disk."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPException
from pathlib import Path

import pytest

from lmcache_sglang.testing.engine import (
    Answer,
    Setup,
    ask,
    disk_tier,
    memory_tier,
    pages_on_disk,
    prompt,
    server,
    until,
)

ROUNDS = 2
PROMPTS = 6
POOL = ("--max-total-tokens", "4096")


@pytest.fixture(scope="module")
def reference(model: Path, folder: Path) -> dict[int, list[int]]:
    """The tokens of an engine whose store nobody disturbed."""
    with server(
        model, Setup(folder / "undisturbed", args=POOL), folder / "reference.log"
    ) as engine:
        return {seed: ask(engine, prompt(seed)).tokens for seed in range(ROUNDS * PROMPTS)}


@pytest.mark.parametrize("memory_is_lost", [False, True], ids=["process", "machine"])
def test_kill_in_the_middle_of_writes_then_restart(
    model: Path, folder: Path, reference: dict[int, list[int]], memory_is_lost: bool
) -> None:
    """A machine that goes takes the memory tier with it; the disk has what was flushed."""
    name = "machine" if memory_is_lost else "process"
    setup = Setup(folder / name, args=POOL)
    for killed in range(ROUNDS):
        _serve_and_kill(model, setup, folder / f"{name}-killed-{killed}.log", killed)
        if memory_is_lost:
            setup.forget_memory()
        _require_sound(setup, in_memory=not memory_is_lost)
    with server(model, setup, folder / f"{name}-after.log") as engine:
        answers = {seed: ask(engine, prompt(seed)) for seed in reference}
    assert {seed: answer.tokens for seed, answer in answers.items()} == reference
    assert sum(answer.storage for answer in answers.values()) > 0


def _serve_and_kill(model: Path, setup: Setup, log: Path, killed: int) -> None:
    """Kill with prompts in flight, as soon as the store has grown by some pages."""
    engine = server(model, setup, log)
    engine.start()
    enough = pages_on_disk(setup) + 20
    with ThreadPoolExecutor(4) as clients:
        seeds = range(killed * PROMPTS, (killed + 1) * PROMPTS)
        asked = [clients.submit(ask, engine, prompt(seed)) for seed in seeds]
        until(lambda: pages_on_disk(setup) >= enough)
        engine.kill()
    for future in asked:
        _require_answered_or_cut_off(future)


def _require_answered_or_cut_off(future: Future[Answer]) -> None:
    assert isinstance(future.exception(), OSError | HTTPException | None)


def _require_sound(setup: Setup, *, in_memory: bool) -> None:
    for open_tier in (disk_tier, memory_tier) if in_memory else (disk_tier,):
        with closing(open_tier(setup)) as tier:
            report = tier.check()
        assert report.ok, report
        assert report.pages > 0
