"""A restart restores from every layout of SGLang's host pool.

Elsewhere: page_first in test_restart.py, layer_first in test_attach.py, page_first_kv_split (MLA on NPU
only) in tests/hicache/test_backend.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from lmcache_sglang.testing.engine import Setup, ask, prompt, server, whole_pages

FIRST = prompt(1)
LAYOUTS = [("page_first_direct", "direct"), ("page_head", "kernel")]


@pytest.mark.parametrize(("layout", "io_backend"), LAYOUTS)
def test_a_restart_restores_the_same_tokens(
    model: Path, folder: Path, layout: str, io_backend: str
) -> None:
    """All layouts share one store: equal sizes in another order of bytes must not be taken for equal."""
    args = ["--hicache-mem-layout", layout, "--hicache-io-backend", io_backend]
    setup = Setup(folder / "store", args=[*args, "--max-total-tokens", "2048"])
    with server(model, setup, folder / f"{layout}-cold.log") as engine:
        cold = ask(engine, FIRST)
    assert cold.storage == 0
    setup.forget_memory()
    with server(model, setup, folder / f"{layout}-warm.log") as engine:
        assert engine.get("/server_info")["hicache_mem_layout"] == layout
        warm = ask(engine, FIRST)
    assert warm.storage >= 0.95 * whole_pages(FIRST)
    assert warm.tokens == cold.tokens
