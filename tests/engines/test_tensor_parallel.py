"""Ranks share one directory and one memory, each with its part of the heads; engines of two sizes do, too."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmcache_sglang.testing.engine import (
    Setup,
    ask,
    pages_in_memory,
    pages_on_disk,
    prompt,
    server,
    until,
    whole_pages,
)

FIRST, SECOND = prompt(1), prompt(2)
POOL = ("--max-total-tokens", "2048")


def test_a_restart_restores_both_halves_from_memory_and_from_the_disk(
    model: Path, folder: Path
) -> None:
    setup = Setup(folder / "store", args=["--tp-size", "2", *POOL])
    both_halves = 2 * len(FIRST) // setup.page_size
    with server(model, setup, folder / "cold.log") as engine:
        cold = ask(engine, FIRST)
        until(lambda: pages_in_memory(setup) >= both_halves)
        until(lambda: pages_on_disk(setup) >= both_halves)
        assert len(list(setup.memory.parent.glob("*/region"))) == 1  # one memory, not one a rank
    assert cold.storage == 0
    with server(model, setup, folder / "memory.log") as engine:
        from_memory = ask(engine, FIRST)
    setup.forget_memory()
    with server(model, setup, folder / "disk.log") as engine:
        from_disk = ask(engine, FIRST)
    for warm in (from_memory, from_disk):
        assert warm.storage == whole_pages(FIRST)
        assert warm.tokens == cold.tokens


@pytest.mark.parametrize("parallel", ["tp", "pp"])
def test_engines_of_one_rank_and_of_two_read_each_others_pages(
    model: Path, folder: Path, parallel: str
) -> None:
    """Both at once, on one store: two ranks have half of the heads each, or half of the layers."""
    store = folder / f"shared {parallel}"
    one = Setup(store, args=POOL)
    two = Setup(store, args=[f"--{parallel}-size", "2", *POOL])
    with server(model, one, folder / f"{parallel} one.log") as of_one:
        first = ask(of_one, FIRST)
        with server(model, two, folder / f"{parallel} two.log") as of_two:
            from_whole = ask(of_two, FIRST)
            second = ask(of_two, SECOND)
            until(lambda: pages_in_memory(two) >= (len(FIRST) + 2 * len(SECOND)) // two.page_size)
            from_halves = ask(of_one, SECOND)
    assert first.storage == second.storage == 0
    for before, after, tokens in (
        (first, from_whole, FIRST),
        (second, from_halves, SECOND),
    ):
        assert after.storage == whole_pages(tokens)
        assert after.tokens == before.tokens
