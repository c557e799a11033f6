"""The direct path, on engines of their own: kinds of models, ranks, many requests at once, a clear, a disk that hangs.

Apart from test_direct.py, whose engine lives as long as its tests: SGLang's scheduler spins on a core while it is idle.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lmcache_sglang.testing.engine import (
    PAGE_SIZE,
    Answer,
    Setup,
    ask,
    flush,
    pages_on_disk,
    prompt,
    server,
    until,
    whole_pages,
)
from lmcache_sglang.testing.families_workload import (
    ASKED,
    EAGER,
    LONG,
    ONE_MORE,
    PART,
    RECURRENT,
    STATES_AT_ENDS,
    a_turn_later,
)
from lmcache_sglang.testing.server import SGLangServer
from lmcache_sglang.testing.stalling import Stall
from lmcache_sglang.testing.tiny_families import make_tiny
from lmcache_sglang.testing.trace import make_trace, reachable, tokens
from tests.engines.test_direct import FIRST, SMALL, comes_back, computed, loaded

CLIENTS = 6
DEADLINE_SECONDS = (
    20.0  # of a request, and of a flush, while a disk hangs; a flush waits 5 for what is stored
)
NARROW = "1MiB"  # landing for 32 pages; a prompt has 10 to 22
LAYOUT = (
    *("--max-total-tokens", "1024", "--hicache-ratio", "2"),
    *("--hicache-mem-layout", "page_first", "--hicache-io-backend", "kernel"),
)


def test_clear_forgets_the_store(model: Path, folder: Path) -> None:
    setup = Setup(folder / "cleared", args=SMALL, direct=True)
    with server(model, setup, folder / "cleared.log") as engine:
        before = ask(engine, FIRST)
        flush(engine)
        assert loaded(ask(engine, FIRST), FIRST)
        engine.post("/hicache/storage-backend/clear")
        assert pages_on_disk(setup) == 0
        flush(engine)
        after = ask(engine, FIRST)
    assert computed(after)
    assert after.tokens == before.tokens


def test_hicache_and_the_direct_path_restore_each_others_pages(model: Path, folder: Path) -> None:
    host = Setup(folder / "shared", args=LAYOUT)
    direct = replace(host, args=SMALL, direct=True)
    with server(model, host, folder / "hicache cold.log") as engine:
        first = ask(engine, FIRST)
    host.forget_memory()
    with server(model, direct, folder / "direct between.log") as engine:
        answer = ask(engine, FIRST)
        second = ask(engine, prompt(2))
    assert loaded(answer, FIRST)
    assert answer.tokens == first.tokens
    host.forget_memory()
    with server(model, host, folder / "hicache warm.log") as engine:
        after = ask(engine, prompt(2))
    assert after.storage == whole_pages(prompt(2))
    assert after.tokens == second.tokens


def test_two_ranks_restore_each_its_own_part(model: Path, folder: Path) -> None:
    pair = Setup(folder / "pair", args=[*SMALL, "--tp-size", "2"], direct=True)
    with server(model, pair, folder / "pair cold.log") as engine:
        before = ask(engine, FIRST)
    pair.forget_memory()
    with server(model, pair, folder / "pair warm.log") as engine:
        after = ask(engine, FIRST)
    assert loaded(after, FIRST)
    assert after.tokens == before.tokens


def test_conversations_at_once_get_the_tokens_of_an_engine_without_a_store(
    model: Path, folder: Path
) -> None:
    """More than the device holds, in chunks, each again and again; then after a restart."""
    chats = [blocks[1:] for blocks in make_trace(conversations=12, turns=4, first=10, grows=4)]
    prompts = [tokens(blocks, PAGE_SIZE) for blocks in chats]
    possible = sum(reachable(chats)) * PAGE_SIZE
    chunks = ("--max-total-tokens", "2048", "--chunked-prefill-size", "128")
    setup = Setup(
        folder / "chats", args=chunks, sglang={"prefetch_threshold": PAGE_SIZE}, direct=True
    )
    none = Setup(folder / "none", flag=False, args=("--max-total-tokens", "16384"))
    with server(model, none, folder / "without.log") as engine:
        right = [answer.tokens for answer in at_once(engine, prompts)]
    with server(model, setup, folder / "chats cold.log") as engine:
        cold = at_once(engine, prompts)
        log = engine.log
    setup.forget_memory()
    with server(model, setup, folder / "chats warm.log") as engine:
        warm = at_once(engine, prompts)
        log += engine.log
    narrow = replace(setup, more={"direct": {"landing": NARROW}})
    with server(model, narrow, folder / "chats narrow.log") as engine:
        waiting = at_once(engine, prompts)
        assert "is full of what waiting requests were promised" in engine.log
        log += engine.log
    assert [answer.tokens for answer in cold] == right
    assert [answer.tokens for answer in warm] == right
    assert [answer.tokens for answer in waiting] == right
    assert sum(answer.host for answer in waiting) > 0
    assert sum(answer.host for answer in cold) > 0
    assert sum(answer.device + answer.host for answer in warm) > possible
    assert "Traceback" not in log


def at_once(engine: SGLangServer, prompts: list[list[int]]) -> list[Answer]:
    short: dict[str, Any] = {
        "sampling_params": {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
    }
    with ThreadPoolExecutor(CLIENTS) as clients:
        asked = [clients.submit(ask, engine, each, **short) for each in prompts]
        return [each.result() for each in asked]


def test_a_disk_that_hangs_holds_up_neither_requests_nor_a_flush(model: Path, folder: Path) -> None:
    """In a read that a request waits for, and in a write that nobody waits for."""
    stall = Stall(folder / "hangs")
    setup = Setup(
        folder / "hanging",
        cpu=0,
        args=[*SMALL, "--hicache-storage-prefetch-policy", "timeout"],
        env=stall.env,
        more={"disk": {"queue_depth": 1}},
        direct=True,
    )
    with server(model, setup, folder / "hanging.log") as engine:
        before = ask(engine, FIRST)
        until(lambda: pages_on_disk(setup) >= len(FIRST) // PAGE_SIZE)
        flush(engine)
        with stall.held():
            answers = [within(DEADLINE_SECONDS, engine, each) for each in (FIRST, prompt(2))]
            assert stall.waits > 0
            begun = time.monotonic()
            flush(engine)
            assert time.monotonic() < begun + DEADLINE_SECONDS
            answers.append(within(DEADLINE_SECONDS, engine, FIRST))
        flush(engine)
        until(lambda: comes_back(engine))
        after = ask(engine, prompt(2))
    assert all(computed(answer) for answer in answers)
    assert answers[0].tokens == answers[2].tokens == before.tokens
    assert answers[1].tokens == after.tokens


def within(seconds: float, engine: SGLangServer, asked: list[int]) -> Answer:
    begun = time.monotonic()
    answer = ask(engine, asked)
    assert time.monotonic() < begun + seconds
    return answer


@pytest.mark.parametrize("name", ["mha", "swa", "mla", "mamba", "conv"])
def test_every_family_of_models_comes_back_with_the_same_tokens(name: str, folder: Path) -> None:
    model = make_tiny(name, folder / name, seed=1)
    page_size = 1 if name in RECURRENT else PAGE_SIZE
    args = [*SMALL, *(STATES_AT_ENDS if name in RECURRENT else ())]
    setup = Setup(
        folder / f"{name}-store", args=args, page_size=page_size, sglang=EAGER, direct=True
    )
    with server(model, setup, folder / f"{name}-cold.log") as engine:
        asked = {what: ask(engine, tokens) for what, tokens in ASKED.items()}
        again = {what: [*tokens, ONE_MORE] for what, tokens in ASKED.items()}
        again["a turn later"] = a_turn_later(asked)
        again["a part"] = PART
        right = {what: ask(engine, tokens, cache_salt=what) for what, tokens in again.items()}
        assert all(computed(answer) for answer in right.values())
        flush(engine)
    setup.forget_memory()
    with server(model, setup, folder / f"{name}-warm.log") as engine:
        for what, tokens in again.items():
            flush(engine)
            answer = ask(engine, tokens)
            assert answer.tokens == right[what].tokens, what
            assert answer.device == answer.storage == 0
            if what in ASKED:
                assert answer.host == len(ASKED[what]) // page_size * page_size, what
            elif what == "a turn later":
                assert answer.host >= len(LONG) // page_size * page_size
