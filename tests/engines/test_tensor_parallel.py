"""Two ranks share one directory, each with its own half of the heads."""

from __future__ import annotations

from pathlib import Path

from lmcache_sglang.testing.engine import Setup, ask, prompt, server, whole_pages

FIRST = prompt(1)


def test_a_restart_restores_both_halves(model: Path, folder: Path) -> None:
    setup = Setup(folder / "store", args=["--tp-size", "2", "--max-total-tokens", "2048"])
    with server(model, setup, folder / "cold.log") as engine:
        cold = ask(engine, FIRST)
    assert cold.storage == 0
    with server(model, setup, folder / "warm.log") as engine:
        warm = ask(engine, FIRST)
    assert warm.storage >= 0.95 * whole_pages(FIRST)
    assert warm.tokens == cold.tokens
