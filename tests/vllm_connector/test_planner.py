"""The scheduler's side: which blocks are held, what is asked of the store, and what listeners are told."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash
from vllm.v1.request import Request

from lmcache_sglang.vllm_connector import lookups
from lmcache_sglang.vllm_connector.events import StoreEvents
from lmcache_sglang.vllm_connector.jobs import Done, Jobs, Replaced
from lmcache_sglang.vllm_connector.knowledge import Knowledge
from lmcache_sglang.vllm_connector.planner import HELD_PART, Planner
from tests.vllm_connector.conftest import BLOCK, BLOCKS, GROUP, PAGE


class Engine:
    """What a scheduler of vLLM does of it all: blocks, and steps."""

    def __init__(self, knowledge: Knowledge, *, ranks: int = 1, ahead: int = 0) -> None:
        self.pool = BlockPool(BLOCKS, enable_caching=True, hash_block_size=BLOCK)
        self.events = StoreEvents(wanted=True)
        self.planner = Planner([GROUP], PAGE, ranks, knowledge, self.events, ahead=ahead)
        self.planner.bind(self.pool)
        self.blocks: dict[str, list[Any]] = {}

    def request(self, name: str, tokens: int) -> Request:
        made = Request(name, list(range(tokens)), SamplingParams(max_tokens=8), None)
        self.planner.added(made)
        return made

    def allocate(self, request: Request, tokens: int) -> list[int]:
        self.blocks[request.request_id] = self.pool.get_new_blocks(-(-tokens // BLOCK))
        return [block.block_id for block in self.blocks[request.request_id]]

    def step(self, request: Request, tokens: int, *, others_load: bool = False) -> Jobs:
        """Compute so many tokens more of a request. Args: others_load: another connector does, in this step."""
        ids = [block.block_id for block in self.blocks[request.request_id]]
        state = SimpleNamespace(get_block_ids=lambda _: (ids,))
        output: Any = SimpleNamespace(
            kv_connector_block_state=state,
            num_scheduled_tokens={request.request_id: tokens},
            total_num_scheduled_tokens=tokens,
            has_sync_kv_loads=others_load,
        )
        jobs = self.planner.jobs(output)
        request.num_computed_tokens += tokens
        return jobs

    def finish(self, request: Request) -> None:
        held = self.blocks.pop(request.request_id)
        self.planner.finished(request, ([block.block_id for block in held],))
        self.pool.free_blocks(reversed(held))

    @property
    def used(self) -> int:
        all_blocks: int = self.pool.num_gpu_blocks
        free: int = self.pool.get_num_free_blocks()
        return all_blocks - free - 1


@pytest.fixture
def make(knowledge: Knowledge) -> Iterator[Callable[..., Engine]]:
    made: list[Engine] = []

    def engine(**more: Any) -> Engine:
        made.append(Engine(knowledge, **more))
        return made[-1]

    yield engine
    for each in made:
        each.planner.close()


def copied(number: int) -> Done:
    return Done(copied=Counter({number: 1}))


def ended(number: int, *, unsaved: bool = False) -> Done:
    return Done(saves=Counter({number: 1}), unsaved={number} if unsaved else set())


def test_blocks_of_a_save_outlive_their_request_until_all_workers_have_copied_them(
    make: Callable[..., Engine],
) -> None:
    engine = make(ranks=2)
    request = engine.request("r", 70)
    engine.allocate(request, 70)
    (job,) = engine.step(request, 70).saves
    assert job.tokens == (0, 64)
    assert job.is_first
    assert len(job.blocks[0]) == 4
    engine.finish(request)
    assert engine.used == 4
    assert engine.planner.is_busy
    engine.planner.told(copied(job.number))
    assert engine.used == 4
    engine.planner.told(copied(job.number))
    assert engine.used == 0
    assert engine.planner.is_busy
    engine.planner.told(ended(job.number))
    engine.planner.told(ended(job.number))
    assert not engine.planner.is_busy
    (event,) = engine.events.take()
    assert event.block_hashes == [maybe_convert_block_hash(each) for each in job.hashes]
    assert event.token_ids == list(range(64))
    assert event.parent_block_hash is None


def test_pages_are_saved_once_as_they_fill(make: Callable[..., Engine]) -> None:
    engine = make()
    request = engine.request("r", 100)
    engine.allocate(request, 112)
    found = [job.tokens for step in (40, 30, 20, 10) for job in engine.step(request, step).saves]
    assert found == [(0, 32), (32, 64), (64, 96)]


def test_a_reset_succeeds_while_blocks_are_held_and_nobody_else_gets_them(
    make: Callable[..., Engine],
) -> None:
    engine = make()
    request = engine.request("r", 64)
    held = engine.allocate(request, 64)
    (job,) = engine.step(request, 64).saves
    assert not engine.pool.reset_prefix_cache()  # of a request that runs
    engine.finish(request)
    assert engine.pool.reset_prefix_cache()
    assert engine.used == 4
    others = engine.pool.get_new_blocks(engine.pool.get_num_free_blocks())
    assert not {block.block_id for block in others} & set(held)
    engine.planner.told(copied(job.number))
    assert engine.pool.get_num_free_blocks() == 4


def test_a_store_that_lags_behind_does_not_get_all_blocks(make: Callable[..., Engine]) -> None:
    engine = make()
    for number in range(10):
        request = engine.request(f"r{number}", 64)
        engine.allocate(request, 64)
        engine.step(request, 64)
        engine.finish(request)
    assert 0 < engine.used <= BLOCKS // HELD_PART
    skipped = engine.planner.counted()["save_skipped_pages"]
    assert skipped == 2 * (10 - engine.used // 4)


def test_what_is_stored_is_asked_once(
    make: Callable[..., Engine], knowledge: Knowledge, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def prefix(hashes: list[bytes], seed: bytes, page_size: int) -> int:
        asked.append(len(hashes))
        return 2

    monkeypatch.setattr(knowledge, "prefix", prefix)
    engine = make()
    request = engine.request("r", 100)
    assert [engine.planner.matched(request, 0) for _ in range(3)] == [64, 64, 64]
    assert engine.planner.matched(request, 32) == 32
    assert asked == [3]
    blocks = engine.allocate(request, 100)
    engine.planner.allocated(request, [blocks], 32)
    engine.planner.allocated(request, [blocks], 0)
    request.num_computed_tokens = 64
    jobs = engine.step(request, 36)
    (load,) = jobs.loads
    assert (load.tokens, load.is_first, len(load.hashes)) == ((32, 64), False, 1)
    assert [job.tokens for job in jobs.saves] == [(64, 96)]
    assert engine.planner.matched(request, 0) == 0  # its load has failed, or it would not ask
    request.num_preemptions += 1
    assert engine.planner.matched(request, 0) == 64
    assert asked == [3, 3]


def test_what_a_load_did_not_bring_is_saved_when_it_is_computed(
    make: Callable[..., Engine], knowledge: Knowledge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knowledge, "prefix", lambda *args: 3)
    engine = make()
    request = engine.request("r", 100)
    assert engine.planner.matched(request, 0) == 96
    blocks = engine.allocate(request, 100)
    engine.planner.allocated(request, [blocks], 96)
    engine.planner.told(Done(short={"r": 32}))
    engine.planner.loaded("r")
    (event,) = engine.events.take()
    assert len(event.block_hashes) == 1
    request.num_computed_tokens = 32
    assert [job.tokens for job in engine.step(request, 68).saves] == [(32, 96)]


def test_a_page_that_vllm_has_the_first_part_of_is_saved_as_a_whole(
    make: Callable[..., Engine], knowledge: Knowledge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or what lay in memory before would be stored under its key."""
    monkeypatch.setattr(knowledge, "prefix", lambda *args: 3)
    engine = make()
    request = engine.request("r", 100)
    assert engine.planner.matched(request, BLOCK) == 96 - BLOCK
    blocks = engine.allocate(request, 100)
    engine.planner.allocated(request, [blocks], 96 - BLOCK)
    request.num_computed_tokens = 96
    engine.planner.told(Done(short={"r": BLOCK}))  # nothing of what was loaded came
    engine.planner.loaded("r")
    request.num_computed_tokens = BLOCK
    (job,) = engine.step(request, 100 - BLOCK).saves
    assert job.tokens == (0, 96)
    assert list(job.blocks[0]) == blocks[:6]


@pytest.mark.parametrize("forgets", [False, True])
@pytest.mark.parametrize("ours", [False, True])
def test_blocks_that_are_still_to_be_loaded_are_not_saved(
    make: Callable[..., Engine],
    knowledge: Knowledge,
    monkeypatch: pytest.MonkeyPatch,
    ours: bool,
    forgets: bool,
) -> None:
    """vLLM counts their tokens as computed from the start; the request is given up before they have come."""
    monkeypatch.setattr(knowledge, "prefix", lambda *args: 3)
    engine = make()
    request = engine.request("r", 100)
    engine.planner.matched(request, 0)
    blocks = engine.allocate(request, 100)
    engine.planner.allocated(request, [blocks], 96 if ours else 0)
    request.num_computed_tokens = 96
    if forgets:
        engine.planner.forget()
    engine.finish(request)
    assert not engine.planner.is_busy
    assert engine.used == 0


def test_what_others_load_in_a_step_is_saved_when_that_has_gone_well(
    make: Callable[..., Engine],
) -> None:
    engine = make()
    request = engine.request("r", 100)
    engine.allocate(request, 112)
    assert engine.step(request, 64, others_load=True).saves == []
    assert [job.tokens for job in engine.step(request, 36).saves] == [(0, 96)]


def test_steps_that_are_planned_before_a_load_is_known_to_have_gone_well_save_nothing(
    make: Callable[..., Engine],
) -> None:
    engine = make(ahead=1)
    request = engine.request("r", 130)
    engine.allocate(request, 144)
    found = [
        [job.tokens for job in engine.step(request, step, others_load=number == 0).saves]
        for number, step in enumerate((32, 32, 32))
    ]
    assert found == [[], [], [(0, 96)]]


@pytest.mark.parametrize("how", ["renamed", "dropped"])
def test_saves_that_no_worker_was_given_are_discarded(
    make: Callable[..., Engine], how: str
) -> None:
    """They would be stored under a name of other weights, or of memory that is gone by then."""
    engine = make()
    request = engine.request("r", 100)
    engine.allocate(request, 112)
    number = engine.step(request, 64, others_load=True).number
    engine.step(request, 20, others_load=True)
    engine.planner._known["r"].ran = 96
    request.num_computed_tokens = 96
    engine.finish(request)
    assert engine.used == 6, "the end of a request has saves to give"
    if how == "renamed":
        engine.planner.told(Done(replacements={0: Replaced(1, after=number)}))
    else:
        engine.planner.forget()
        engine.planner.drop_saves()
    assert engine.used == 0
    assert not engine.planner.is_busy
    other = engine.request("other", 16)
    engine.allocate(other, 16)
    jobs = engine.step(other, 16)
    assert (jobs.saves, jobs.forgets) == ([], how == "dropped")


def test_a_step_that_only_loads_counts_for_what_a_reset_left(
    make: Callable[..., Engine], knowledge: Knowledge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or what it loaded, of old weights, would pass for what new ones computed."""
    monkeypatch.setattr(knowledge, "prefix", lambda *args: 3)
    engine = make()
    assert engine.pool.reset_prefix_cache()
    request = engine.request("r", 100)
    assert engine.planner.matched(request, 0) == 96
    blocks = engine.allocate(request, 112)
    engine.planner.allocated(request, [blocks], 96)
    loads = engine.step(request, 0)
    assert len(loads.loads) == 1
    request.num_computed_tokens = 96
    engine.planner.told(Done(replacements={0: Replaced(1, after=loads.number)}))
    assert engine.step(request, 4).saves == []


def test_the_scheduler_waits_for_lookups_a_moment_a_step_and_not_a_request(
    make: Callable[..., Engine], knowledge: Knowledge, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on = Event()
    monkeypatch.setattr(lookups, "SHORT_SECONDS", 0.2)
    monkeypatch.setattr(knowledge, "prefix", lambda *args: goes_on.wait(30) * 3)
    engine = make()
    requests = [engine.request(f"r{number}", 100) for number in range(20)]
    begun = time.monotonic()
    assert {engine.planner.matched(each, 0) for each in requests} == {None}
    assert time.monotonic() - begun < 2, "or each waited"
    goes_on.set()
    for each in requests:  # those that waited behind a slow one are answered all the same
        while (found := engine.planner.matched(each, 0)) is None:
            pass
        assert found == 96
    assert engine.planner.counted()["lookups_late"] == 0


def test_a_lookup_that_takes_long_is_asked_for_later_and_given_up_in_the_end(
    make: Callable[..., Engine], knowledge: Knowledge, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on = Event()
    monkeypatch.setattr(knowledge, "prefix", lambda *args: goes_on.wait(30) * 3)
    monkeypatch.setattr(lookups, "MOST_SECONDS", 0.05)
    engine = make()
    slow, behind = engine.request("slow", 100), engine.request("behind", 100)
    assert engine.planner.matched(slow, 0) is None
    while engine.planner.matched(slow, 0) is None:
        pass
    assert engine.planner.matched(slow, 0) == 0
    assert engine.planner.matched(behind, 0) == 0  # nobody waits behind it
    assert engine.planner.counted()["lookups_late"] == 2
    goes_on.set()


def test_listeners_hear_what_is_gone(
    make: Callable[..., Engine], knowledge: Knowledge, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()
    request = engine.request("r", 64)
    engine.allocate(request, 64)
    (job,) = engine.step(request, 64).saves
    engine.planner.told(ended(job.number))
    engine.finish(request)
    (event,) = engine.events.take()
    again = engine.request("again", 64)
    monkeypatch.setattr(knowledge, "prefix", lambda *args: 1)
    assert engine.planner.matched(again, 0) == 32
    (gone,) = engine.events.take()
    assert gone.block_hashes == event.block_hashes[1:]
    engine.planner.forget()
    (gone,) = engine.events.take()
    assert gone.block_hashes == event.block_hashes[:1]


def test_what_was_not_stored_is_not_told_of(make: Callable[..., Engine]) -> None:
    engine = make()
    request = engine.request("r", 64)
    engine.allocate(request, 64)
    (job,) = engine.step(request, 64).saves
    engine.planner.told(ended(job.number, unsaved=True))
    assert engine.events.take() == []


def test_what_old_weights_computed_is_not_saved_under_the_name_of_new_ones(
    make: Callable[..., Engine], knowledge: Knowledge, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make()
    request = engine.request("r", 100)
    engine.allocate(request, 112)
    first = engine.step(request, 64)
    replaced = Done(replacements={0: Replaced(2, after=first.number)})
    engine.planner.told(replaced)
    engine.planner.told(replaced)  # said until it is answered
    assert not knowledge.lasting
    jobs = engine.step(request, 36)
    (renamed,) = jobs.renamed
    assert renamed.replacements == replaced.replacements
    assert jobs.saves == []
    assert "reset_prefix_cache" in caplog.text
    engine.finish(request)
    engine.planner.told(copied(1))
    assert engine.pool.reset_prefix_cache()
    other = engine.request("other", 64)
    engine.allocate(other, 64)
    jobs = engine.step(other, 64)
    assert jobs.renamed == []
    assert [job.tokens for job in jobs.saves] == [(0, 64)]


def test_weights_that_were_replaced_before_a_reset_are_known_for_it(
    make: Callable[..., Engine], knowledge: Knowledge
) -> None:
    """The workers tell of it with the next step only."""
    engine = make()
    request = engine.request("r", 64)
    engine.allocate(request, 64)
    last = engine.step(request, 64)
    engine.finish(request)
    assert engine.pool.reset_prefix_cache()
    other = engine.request("other", 100)
    engine.allocate(other, 112)
    engine.step(other, 64)
    engine.planner.told(Done(replacements={0: Replaced(1, after=last.number)}))
    jobs = engine.step(other, 36)
    assert len(jobs.renamed) == 1
    assert [job.tokens for job in jobs.saves] == [(0, 96)]


@pytest.mark.parametrize("what", ["image", "embedding", "stream"])
def test_what_token_ids_do_not_say_is_left_alone(make: Callable[..., Engine], what: str) -> None:
    engine = make()
    request: Any = Request("r", list(range(64)), SamplingParams(max_tokens=8), None)
    if what == "image":
        request.mm_features = ["an image"]
    elif what == "stream":
        request.resumable = True
    else:
        request.prompt_embeds = object()
    engine.planner.added(request)
    assert engine.planner.matched(request, 0) == 0
    engine.allocate(request, 64)
    assert engine.step(request, 64).saves == []
    engine.finish(request)
    assert engine.used == 0
