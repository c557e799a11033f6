"""What SGLang computed is a hit in vLLM, and the other way round: the same keys, the same bytes, the same tokens."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lmcache_sglang.config import Config
from lmcache_sglang.storage.peers.tier import LOOK_SECONDS
from lmcache_sglang.storage.slab.opening import Place
from lmcache_sglang.storage.slab.tier import SlabTier
from lmcache_sglang.testing import compare_pages, engine, vllm
from lmcache_sglang.testing.server import SGLangServer, free_port
from lmcache_sglang.testing.tiny_families import make_tiny
from lmcache_sglang.testing.two_nodes import known, make_node, tags_of
from tests.vllm.answers import HITS, cached, tokens
from tests.vllm.test_topologies import complete

PAGE = 32
WHOLE = 600 // PAGE * PAGE
POOL = ("--max-total-tokens", "8192", "--sleep-on-idle")

Tokens = Sequence[Sequence[int]]


def sglang(store: Path) -> engine.Setup:
    return engine.Setup(store, page_size=PAGE, args=POOL)


@pytest.fixture(scope="module", params=["llama", "wide-mla"])
def family(request: pytest.FixtureRequest, model: Path, folder: Path) -> Path:
    """A checkpoint."""
    if request.param == "llama":
        return model
    return make_tiny(request.param, folder / request.param, seed=3)


@pytest.fixture(scope="module")
def long() -> list[int]:
    rng = random.Random(11)
    return [rng.randrange(3, 500) for _ in range(600)]


def test_there_and_back(family: Path, folder: Path, long: list[int]) -> None:
    """SGLang computes and exits, vLLM's first request hits; and the other way round."""
    there, back = folder / f"{family.name}-there", folder / f"{family.name}-back"
    setup = vllm.Setup(family, back, page_size=PAGE, kv_bytes=32 << 20)
    asks = vllm.generate(long)
    with engine.server(family, sglang(there), folder / f"{family.name}-sglang.log") as server:
        computed = engine.ask(server, long)
    (own,) = vllm.run(setup, asks, log=folder / f"{family.name}-own.log")
    assert cached(own) == [0]
    hit, said = vllm.run(
        replace(setup, store=there),
        asks,
        vllm.step("metrics"),
        log=folder / f"{family.name}-hit.log",
    )
    assert cached(hit) == [WHOLE]
    assert said[HITS] >= 0.95 * len(long)
    assert tokens(hit) == tokens(own) == [computed.tokens]
    with engine.server(family, sglang(back), folder / f"{family.name}-hit-2.log") as server:
        answer = engine.ask(server, long)
    assert answer.storage == engine.whole_pages(long, PAGE) >= 0.95 * len(long)
    assert answer.tokens == computed.tokens


def test_numbers_differ_by_rounding_only(model: Path, folder: Path, long: list[int]) -> None:
    """Both stores of the last test hold what their own engine computed."""
    settings = [
        replace(sglang(folder / f"{model.name}-{way}"), disk="256MiB").settings
        for way in ("there", "back")
    ]
    (one,), (other,) = (compare_pages.kinds(each) for each in settings)
    assert one == other
    pages = [compare_pages.pages(each, one, long[:WHOLE]) for each in settings]
    found = compare_pages.differences(*pages)
    for each in found:
        print(f"layer {each.layer} {each.what}: {each.most:.1e} of {each.scale:.3g}")
    assert len(found) == 2 * one.page.stored_layers
    assert all(0 <= each.most < 1e-5 * each.scale for each in found)


def test_salts_mean_the_same_to_both(model: Path, folder: Path, long: list[int]) -> None:
    store = folder / "salted"
    with engine.server(model, sglang(store), folder / "salted.log") as server:
        engine.ask(server, long, cache_salt="one")
    other, none, same = vllm.run(
        vllm.Setup(model, store, page_size=PAGE),
        vllm.generate(long, cache_salt="two"),
        vllm.generate(long),
        vllm.generate(long, cache_salt="one"),
        log=folder / "salted-vllm.log",
    )
    assert [cached(each) for each in (other, none, same)] == [[0], [0], [WHOLE]]


def test_engines_that_disagree_find_nothing_of_each_other(
    model: Path, folder: Path, long: list[int]
) -> None:
    """Other weights of the same shapes, and another dtype; on the same store, under the same name."""
    from lmcache_sglang.testing.tiny_model import make_tiny_llama

    store, other = folder / "disagree", make_tiny_llama(folder / "seed-2", seed=2, dtype="float32")
    (own,) = vllm.run(vllm.Setup(other, None), vllm.generate(long), log=folder / "disagree-own.log")
    with engine.server(model, sglang(store), folder / "disagree.log") as server:
        engine.ask(server, long)
    (answers,) = vllm.run(
        vllm.Setup(other, store), vllm.generate(long), log=folder / "disagree-weights.log"
    )
    assert cached(answers) == [0]
    assert tokens(answers) == tokens(own)
    setup = vllm.Setup(model, store, llm={"dtype": "bfloat16"})
    (answers,) = vllm.run(setup, vllm.generate(long), log=folder / "disagree-dtype.log")
    assert cached(answers) == [0]


def test_between_two_nodes(model: Path, folder: Path, prompts: Tokens, plain: Tokens) -> None:
    """SGLang's node and vLLM's, with a store each; encrypted."""
    a = make_node(folder / "a", "node-a", f"tcp://127.0.0.1:{free_port()}")
    b = make_node(folder / "b", "node-b", f"tcp://127.0.0.1:{free_port()}")
    a.write([b])
    b.write([a])
    ours = replace(sglang(a.folder / "store"), disk=0, peers=a.file)
    theirs = vllm.Setup(model, b.folder / "store", page_size=PAGE, disk="0")
    theirs = replace(theirs, more={"peers": str(b.file)})
    first, second = (
        engine.server(model, ours, folder / "a.log"),
        vllm.server(theirs, folder / "b.log"),
    )
    try:
        with ThreadPoolExecutor() as both:
            list(both.map(SGLangServer.start, (first, second)))
        assert engine.ask(first, prompts[0]).tokens == plain[0]
        hear(ours.settings, theirs.settings, pages=18)
        assert complete(second, prompts[0]) == (plain[0], WHOLE)
        assert complete(second, prompts[2]) == (plain[2], 0)
        hear(theirs.settings, ours.settings, pages=18 + 10)
        answer = engine.ask(first, prompts[2])
        assert answer.tokens == plain[2]
        assert answer.storage == 320
    finally:
        for server in (first, second):
            server.stop()


def hear(of: dict[str, Any], at: dict[str, Any], *, pages: int) -> None:
    """Wait until a node has so many pages, and another one knows of them all, and its engine must."""
    memory, size = Path(of["cpu"]["path"]), Config.of(of).cpu.bytes(Path(of["cpu"]["path"]))

    def tags() -> list[bytes]:
        with closing(SlabTier(Place(memory, memory=True), size, name="cpu")) as tier:
            return tags_of([tier])

    engine.until(lambda: len(tags()) >= pages)
    engine.until(lambda: known(Config.of(at), tags()) == len(tags()))
    time.sleep(LOOK_SECONDS)  # an engine looks for new peers no more often, and tells nobody
