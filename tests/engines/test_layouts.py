"""Every layout of SGLang's host pool restores what it stored, and what an engine of another layout stored.

Elsewhere: page_first in test_restart.py, layer_first in test_attach.py, page_first_kv_split (MLA on NPU
only) in tests/hicache/test_backend.py; all pairs of layouts in tests/hicache/test_topologies.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lmcache_sglang.testing.engine import Setup, ask, prompt, server, whole_pages
from lmcache_sglang.testing.server import SGLangServer

FIRST, SECOND = prompt(1), prompt(2)
LAYOUTS = [("page_first_direct", "direct"), ("page_head", "kernel")]


@contextmanager
def serving(
    model: Path, folder: Path, layout: str, io_backend: str, log: str
) -> Iterator[SGLangServer]:
    """An engine over the one store of this file, from the disk alone."""
    args = ["--hicache-mem-layout", layout, "--hicache-io-backend", io_backend]
    setup = Setup(folder / "store", args=[*args, "--max-total-tokens", "2048"])
    setup.forget_memory()
    with server(model, setup, folder / log) as engine:
        assert engine.get("/server_info")["hicache_mem_layout"] == layout
        yield engine


def test_engines_of_two_layouts_restore_their_own_and_each_others_pages(
    model: Path, folder: Path
) -> None:
    """Equal sizes in another order of bytes: taken for equal, they would give other tokens."""
    (direct, by_direct), (head, by_kernel) = LAYOUTS
    with serving(model, folder, direct, by_direct, "one.log") as engine:
        first = ask(engine, FIRST)
    assert first.storage == 0
    with serving(model, folder, head, by_kernel, "two.log") as engine:
        others = ask(engine, FIRST)
        second = ask(engine, SECOND)
    assert second.storage == 0
    with serving(model, folder, direct, by_direct, "three.log") as engine:
        own = ask(engine, FIRST)
        theirs = ask(engine, SECOND)
    for answer in (others, own):
        assert answer.storage == whole_pages(FIRST)
        assert answer.tokens == first.tokens
    assert theirs.storage == whole_pages(SECOND)
    assert theirs.tokens == second.tokens
