"""The workers' side: what was saved comes back, and nobody waits for a store that hangs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import count
from threading import Event, Timer
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from lmcache_sglang.hicache.form import PageForm
from lmcache_sglang.hicache.page_hashes import page_hashes
from lmcache_sglang.storage.base import NO_LIMITS
from lmcache_sglang.storage.chain import Chain
from lmcache_sglang.vllm_connector import mover as movers
from lmcache_sglang.vllm_connector import stage
from lmcache_sglang.vllm_connector.block_memory import in_rows
from lmcache_sglang.vllm_connector.groups import Topology, page_of
from lmcache_sglang.vllm_connector.jobs import Job, Renamed, Replaced
from lmcache_sglang.vllm_connector.knowledge import Knowledge
from lmcache_sglang.vllm_connector.mover import Mover, Part
from tests.vllm_connector.conftest import BLOCK, DIM, GROUP, HEADS, MODEL, PAGE

TOKENS = list(range(4 * PAGE))


def job(number: int, blocks: range, *, pages: range = range(4), request: str = "r") -> Job:
    """Args: blocks: that hold these pages of TOKENS."""
    hashes = page_hashes(TOKENS, PAGE)
    return Job(
        number,
        request,
        (pages.start * PAGE, pages.stop * PAGE),
        PAGE,
        tuple(hashes[pages.start : pages.stop]),
        hashes[pages.start - 1] if pages.start else b"",
        pages.start == 0,
        (tuple(blocks),),
    )


def until(what: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 30
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.001)  # vLLM looks once a step; it is told nothing in between
    return found


def make(knowledge: Knowledge, chain: Chain, layers: list[torch.Tensor]) -> Mover:
    form = PageForm.of(page_of(GROUP, Topology(1, HEADS), 0, PAGE))
    part = Part(0, GROUP, in_rows(layers, [DIM, DIM], form), BLOCK, saves=True)
    return Mover([part], 0, knowledge, chain, computed=lambda: lambda: None)


@pytest.fixture
def mover(knowledge: Knowledge, chain: Chain, layers: list[torch.Tensor]) -> Iterator[Mover]:
    made = make(knowledge, chain, layers)
    yield made
    made.close()


def saved(mover: Mover, number: int, blocks: range, **more: Any) -> Any:
    mover.save([job(number, blocks, **more)])
    done = mover.done()
    while not done.saves:
        done = done.aggregate(mover.done())
    return done


def test_what_was_saved_comes_back_to_other_blocks(
    mover: Mover, layers: list[torch.Tensor]
) -> None:
    done = saved(mover, 1, range(1, 9))
    assert (done.copied, done.saves, done.unsaved) == ({1: 1}, {1: 1}, set())
    mover.load([job(0, range(20, 28))])
    loaded = until(lambda: _any(mover))
    assert (loaded.requests, loaded.failed, loaded.bad_blocks) == ({"r"}, set(), set())
    assert all(torch.equal(layer[1:9], layer[20:28]) for layer in layers)
    counted = mover.counted()
    assert counted.data["load_tokens"] == len(TOKENS)
    assert counted.data["save_pages"] == 4
    assert mover.counted().is_empty()


def _any(mover: Mover) -> movers.Loaded | None:
    loaded = mover.loaded()
    return loaded if loaded.requests else None


def test_pages_are_read_while_those_before_them_are_copied(
    knowledge: Knowledge,
    chain: Chain,
    layers: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stage, "SPAN_BYTES", 1)  # a page at once: four spans
    made = make(knowledge, chain, layers)
    saved(made, 1, range(1, 9))
    (part,) = made._parts
    numbers, second, get, scatter = count(1), Event(), chain.get, part.memory.scatter

    def read(*args: Any, **kwargs: Any) -> list[bool]:
        if next(numbers) == 2:
            second.set()
        return get(*args, **kwargs)

    def copy(*args: Any) -> None:
        assert second.wait(30), "the first pages are copied before the next ones are asked for"
        scatter(*args)

    monkeypatch.setattr(chain, "get", read)
    monkeypatch.setattr(part.memory, "scatter", copy)
    made.load([job(0, range(20, 28))])
    assert until(lambda: _any(made)).failed == set()
    assert all(torch.equal(layer[1:9], layer[20:28]) for layer in layers)
    made.close()


def test_who_has_nothing_to_do_is_woken_by_the_end_of_a_load(
    mover: Mover, chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(mover, 1, range(1, 9))
    goes_on, get = Event(), chain.get
    monkeypatch.setattr(chain, "get", lambda *a, **k: goes_on.wait(30) and get(*a, **k))
    mover.load([job(0, range(20, 28))])
    assert not mover.loaded(wait=0.01).requests
    Timer(0.01, goes_on.set).start()
    assert mover.loaded(wait=30).requests == {"r"}
    begun = time.monotonic()
    assert not mover.loaded(wait=30).requests
    assert time.monotonic() - begun < 10, "there is nothing to wait for"


def test_what_is_not_there_is_told_from_the_first_page_that_is_missing(mover: Mover) -> None:
    saved(mover, 1, range(1, 5), pages=range(2))
    mover.load([job(0, range(20, 28))])
    loaded = until(lambda: _any(mover))
    assert loaded.failed == {"r"}
    assert loaded.bad_blocks == set(range(24, 28))
    assert mover.done().short == {"r": 2 * PAGE}


def test_a_read_that_hangs_is_left_behind_and_touches_no_block_when_it_comes_back(
    mover: Mover, chain: Chain, layers: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(mover, 1, range(1, 9))
    monkeypatch.setattr(movers, "LOAD_SECONDS", 0.1)
    monkeypatch.setattr(movers, "HANG_SECONDS", 0.1)
    comes_back, came_back, get = Event(), Event(), chain.get

    def hangs(*args: Any, **kwargs: Any) -> list[bool]:
        comes_back.wait(30)
        monkeypatch.setattr(chain, "get", get)
        held = get(*args, **{**kwargs, "limits": NO_LIMITS})
        came_back.set()
        return held

    monkeypatch.setattr(chain, "get", hangs)
    before = [layer.clone() for layer in layers]
    mover.load([job(0, range(20, 28), request="hangs")])
    loaded = until(lambda: _any(mover))
    assert loaded.failed == {"hangs"}
    assert loaded.bad_blocks == set(range(20, 28))
    monkeypatch.setattr(chain, "get", get)
    mover.load([job(0, range(40, 48), request="next")])
    assert until(lambda: _any(mover)).failed == set()
    comes_back.set()
    assert came_back.wait(30)
    mover.load([job(0, range(50, 58), request="last")])  # behind it in time
    assert until(lambda: _any(mover)).requests == {"last"}
    assert all(torch.equal(a[:40], b[:40]) for a, b in zip(before, layers, strict=True))


def test_a_write_that_hangs_gives_its_blocks_back(
    mover: Mover, chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(movers, "SAVE_SECONDS", 0.1)
    monkeypatch.setattr(movers, "HANG_SECONDS", 0.1)
    comes_back, put = Event(), chain.put
    monkeypatch.setattr(chain, "put", lambda *args, **kwargs: [comes_back.wait(30)] * 4)
    mover.save([job(1, range(1, 9)), job(2, range(1, 9))])
    done = mover.done()
    while done.saves[1] == 0:
        mover.loaded()  # as vLLM does each step
        done = done.aggregate(mover.done())
    assert done.copied[1] == 1
    assert 1 in done.unsaved
    monkeypatch.setattr(chain, "put", put)
    comes_back.set()
    while done.saves[2] == 0:
        mover.loaded()
        done = done.aggregate(mover.done())
    assert done.copied == done.saves == {1: 1, 2: 1}


def test_blocks_are_free_when_they_were_copied_and_not_only_when_they_are_stored(
    mover: Mover, chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on, put = Event(), chain.put

    def slow(*args: Any, **kwargs: Any) -> list[bool]:
        goes_on.wait(30)
        return put(*args, **kwargs)

    monkeypatch.setattr(chain, "put", slow)
    mover.save([job(1, range(1, 9))])
    done = mover.done()
    while not done.copied:
        done = done.aggregate(mover.done())
    assert not done.saves
    goes_on.set()
    while not done.saves:
        done = done.aggregate(mover.done())
    assert done.copied == {1: 1}


def test_saves_that_wait_can_be_dropped(
    mover: Mover, chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on, put = Event(), chain.put
    monkeypatch.setattr(chain, "put", lambda *a, **k: [goes_on.wait(30)] and put(*a, **k))
    mover.save([job(1, range(1, 5), pages=range(2)), job(2, range(1, 9))])
    done = mover.done()
    while not done.copied:  # the first one is being written
        done = done.aggregate(mover.done())
    mover.drop_saves()
    goes_on.set()
    done = done.aggregate(mover.done())
    assert done.copied == done.saves == {1: 1, 2: 1}
    assert done.unsaved == {1, 2}
    monkeypatch.setattr(chain, "put", put)
    assert saved(mover, 3, range(1, 5), pages=range(2)).unsaved == set()
    mover.load([job(0, range(20, 28))])
    assert mover_load_short(mover) == 2 * PAGE, "the second one was never written"


def test_a_thread_that_hangs_is_left_behind_also_when_its_save_was_dropped(
    mover: Mover, chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(movers, "SAVE_SECONDS", 0.5)
    monkeypatch.setattr(movers, "HANG_SECONDS", 0.5)
    comes_back, put = Event(), chain.put
    monkeypatch.setattr(chain, "put", lambda *args, **kwargs: [comes_back.wait(30)] * 4)
    mover.save([job(1, range(1, 9))])
    done = mover.done()
    while not done.copied:
        done = done.aggregate(mover.done())
    mover.drop_saves()
    monkeypatch.setattr(chain, "put", put)
    mover.save([job(2, range(1, 9))])
    deadline = time.monotonic() + 20
    while done.saves[2] == 0:
        assert time.monotonic() < deadline, "nobody saves any more"
        mover.loaded()  # as vLLM does each step
        done = done.aggregate(mover.done())
    assert done.unsaved == {1}
    comes_back.set()


def mover_load_short(mover: Mover) -> int:
    """The first token that a load did not bring."""
    assert until(lambda: _any(mover)).failed == {"r"}
    return mover.done().short["r"]


def test_nothing_moves_between_a_replacement_and_its_name(
    mover: Mover, knowledge: Knowledge, chain: Chain
) -> None:
    saved(mover, 1, range(1, 9))
    mover.begin_step(7)
    mover.replaced()
    mover.load([job(0, range(20, 28))])
    assert until(lambda: _any(mover)).failed == {"r"}
    done = saved(mover, 2, range(1, 9))
    assert done.unsaved == {2}
    assert done.replacements == {0: Replaced(1, after=7)}
    assert mover.done().replacements == {0: Replaced(1, after=7)}  # until there is an answer
    mover.renamed(Renamed("new", {0: Replaced(1, after=7)}))
    assert mover.done().replacements == {}
    mover.load([job(0, range(20, 28))])
    assert until(lambda: _any(mover)).failed == {"r"}  # the old ones are of other weights
    assert not knowledge.lasting
    assert saved(mover, 3, range(1, 9)).unsaved == set()
    mover.load([job(0, range(20, 28))])
    assert until(lambda: _any(mover)).failed == set()
    mover.replaced()
    mover.renamed(Renamed("late", {0: Replaced(1, after=7)}))  # of the one before
    assert mover.done().replacements == {0: Replaced(2, after=7)}


def test_weights_that_no_file_holds_ask_for_a_name_at_once(chain: Chain) -> None:
    from lmcache_sglang.hicache.identity import ModelIdentity

    settings = {**MODEL.settings, "weights": "random"}
    model = ModelIdentity(name="m", fingerprint="f", kv_dtype="float32", settings=settings)
    own = Knowledge(model, [GROUP], Topology(1, HEADS), PAGE, chain)
    made = Mover([], 3, own, chain, computed=lambda: lambda: None)
    assert made.done().replacements == {3: Replaced(1, after=0)}
    made.close()


def test_a_sleep_waits_for_what_copies_and_ends_what_loads(
    mover: Mover, chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(movers, "SLEEP_SECONDS", 0.05)
    comes_back = Event()
    monkeypatch.setattr(chain, "get", lambda *args, **kwargs: [not comes_back.wait(30)] * 4)
    mover.save([job(1, range(1, 9))])
    mover.load([job(0, range(20, 28))])
    mover.sleeps()
    assert mover.done().copied == {1: 1}
    assert mover.loaded().failed == {"r"}
    comes_back.set()
