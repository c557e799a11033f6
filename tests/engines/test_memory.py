"""The tier in shared memory outlives its engine, killed or not, and a disk is not needed for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmcache_sglang.testing.engine import (
    Answer,
    Setup,
    ask,
    pages_in_memory,
    pages_on_disk,
    prompt,
    roots_in_memory,
    server,
    until,
    whole_pages,
)

FIRST = prompt(1)
LONGER = FIRST + prompt(2)
POOL = ("--max-total-tokens", "4096")


@pytest.fixture(scope="module")
def setup(folder: Path) -> Setup:
    return Setup(folder / "store", disk=0, args=POOL)


@pytest.fixture(scope="module")
def roots() -> list[int]:
    """Pages without one before them, after each request of `cold`."""
    return []


@pytest.fixture(scope="module")
def cold(model: Path, folder: Path, setup: Setup, roots: list[int]) -> list[Answer]:
    """Two requests, the second going on where the first ended; then the engine is killed."""
    engine = server(model, setup, folder / "cold.log")
    engine.start()
    answers: list[Answer] = []
    try:
        for request in (FIRST, LONGER):
            answers.append(ask(engine, request))
            until(lambda request=request: stored(setup, request))  # type: ignore[misc]
            roots.append(roots_in_memory(setup))
    finally:
        engine.kill()
    return answers


def stored(setup: Setup, request: list[int]) -> bool:
    """Beside SGLang's own first request, of one page."""
    return pages_in_memory(setup) >= 1 + len(request) // setup.page_size


def test_a_restart_restores_the_prefix_from_memory_alone(
    model: Path, folder: Path, setup: Setup, cold: list[Answer]
) -> None:
    assert [answer.storage for answer in cold] == [0, 0]
    assert not setup.store.exists()  # there is no disk tier
    with server(model, setup, folder / "warm.log") as engine:
        ask(
            engine, prompt(99)
        )  # SGLang compiles its hash in the first prefetch, if a kill broke that off
        answer = ask(engine, LONGER)
    assert answer.storage == whole_pages(LONGER)
    assert answer.backend == "lmcache"
    assert answer.tokens == cold[1].tokens


def test_each_page_is_told_what_comes_before_it(cold: list[Answer], roots: list[int]) -> None:
    """The second request is stored as a batch of its own, which begins in the middle of a chain."""
    before, after = roots
    assert before == after > 0


def test_without_memory_there_is_nothing(
    model: Path, folder: Path, setup: Setup, cold: list[Answer]
) -> None:
    """The control, and what a user does who wants the room back."""
    setup.forget_memory()
    with server(model, setup, folder / "forgotten.log") as engine:
        answer = ask(engine, LONGER)
    assert answer.storage == 0
    assert answer.tokens == cold[1].tokens


def test_a_disk_that_is_given_later_gets_what_comes_from_then_on(
    model: Path, folder: Path, setup: Setup, cold: list[Answer]
) -> None:
    """The last test of this file: the same memory, now over a disk."""
    both = Setup(setup.store, args=POOL)
    with server(model, both, folder / "with-disk.log") as engine:
        before = ask(engine, LONGER)
        new = ask(engine, prompt(7))
        until(lambda: pages_on_disk(both) >= len(prompt(7)) // both.page_size)
    assert before.storage == whole_pages(LONGER)
    both.forget_memory()
    with server(model, both, folder / "disk-alone.log") as engine:
        again = ask(engine, prompt(7))
    assert again.storage == whole_pages(prompt(7))
    assert again.tokens == new.tokens
