"""Two ranks share one directory and one memory, each with its own half of the heads."""

from __future__ import annotations

from pathlib import Path

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

FIRST = prompt(1)


def test_a_restart_restores_both_halves_from_memory_and_from_the_disk(
    model: Path, folder: Path
) -> None:
    setup = Setup(folder / "store", args=["--tp-size", "2", "--max-total-tokens", "2048"])
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
        assert warm.storage >= 0.95 * whole_pages(FIRST)
        assert warm.tokens == cold.tokens
