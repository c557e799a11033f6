"""What goes wrong below, or is broken off above, costs time and never a token, a block or a page that was saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from lmcache_sglang.testing import vllm
from tests.vllm.answers import LOADED, MISSED, cached, tokens

Tokens = Sequence[Sequence[int]]

FEW_BLOCKS = 33 * (
    64 << 10
)  # bytes: of 32 tokens each, one request of full length and vLLM's own block


@pytest.fixture(scope="module")
def full(model: Path, folder: Path, prompts: Tokens, plain: Tokens) -> Path:
    """A store that has all prompts."""
    store = folder / "full"
    (answers,) = vllm.run(
        vllm.Setup(model, store), vllm.generate(*prompts), log=folder / "full.log"
    )
    assert tokens(answers) == plain
    return store


def spoiled(model: Path, store: Path, **more: object) -> vllm.Setup:
    return vllm.Setup(model, store, connector="SpoiledConnector", more=more)


def test_a_slow_store_is_waited_for_and_others_are_served_meanwhile(
    model: Path, full: Path, folder: Path, prompts: Tokens, plain: Tokens
) -> None:
    other = list(range(3, 103))
    setup = spoiled(model, full, delay=0.5)
    answers, said = vllm.run(
        setup, vllm.generate(*prompts, other), vllm.step("metrics"), log=folder / "slow.log"
    )
    assert tokens(answers)[:3] == plain
    assert cached(answers) == [576, 192, 320, 0]
    assert said[LOADED] == 576 + 192 + 320


def test_what_is_lost_on_the_way_is_computed(
    model: Path, full: Path, folder: Path, prompts: Tokens, plain: Tokens
) -> None:
    """Each fourth page fails: what is before the first of a request is used all the same."""
    setup = spoiled(model, full, spoil=4)
    answers, said = vllm.run(
        setup, vllm.generate(*prompts), vllm.step("metrics"), log=folder / "lost.log"
    )
    assert tokens(answers) == plain
    assert said[LOADED] + said[MISSED] == 576 + 192 + 320
    assert 0 < said[LOADED] <= 3 * 4 * 32


def test_and_ends_its_request_where_the_user_wants_that(
    model: Path, full: Path, folder: Path, prompts: Tokens, plain: Tokens
) -> None:
    setup = replace(spoiled(model, full, spoil=4), policy="fail")
    answers, again = vllm.run(
        setup,
        vllm.generate(*prompts),
        vllm.generate(list(range(3, 63))),  # shorter than what is in the store
        log=folder / "fail.log",
    )
    assert [answer["finish"] for answer in answers] == ["error"] * 3
    assert [answer["finish"] for answer in again] == ["length"]
    said = (folder / "fail.log").read_text(errors="replace")
    assert '"kv_load_failure_policy": "recompute"' in said  # how to have it otherwise


def test_preempted_requests_come_back_from_the_store(
    model: Path, folder: Path, prompts: Tokens
) -> None:
    """Eight requests in the blocks of hardly two; and once more, when all of them are found."""
    many = [[*prompt[:150], number] for number in range(4) for prompt in prompts[:2]]
    asks = vllm.generate(*many, new_tokens=100)
    (expected,) = vllm.run(vllm.Setup(model, store=None), asks, log=folder / "roomy.log")
    setup = vllm.Setup(model, folder / "tight", kv_bytes=FEW_BLOCKS)
    for name in ("tight", "tight-warm"):
        answers, said = vllm.run(setup, asks, vllm.step("metrics"), log=folder / f"{name}.log")
        assert tokens(answers) == tokens(expected)
        assert said["vllm:num_preemptions"] > 0
        assert said["vllm:kv_cache_usage_perc"] == 0
        assert said[LOADED] > 0


def test_a_request_that_is_given_up_while_it_loads_leaves_no_block_behind(
    model: Path, full: Path, folder: Path, prompts: Tokens, plain: Tokens
) -> None:
    setup = replace(spoiled(model, full, delay=1.0), kv_bytes=FEW_BLOCKS)
    given_up, answers, said = vllm.run(
        setup,
        vllm.abort(*prompts, after=3),
        vllm.generate(*prompts),
        vllm.step("metrics"),
        log=folder / "aborted.log",
    )
    assert given_up == []
    assert tokens(answers) == plain
    assert said["vllm:kv_cache_usage_perc"] == 0


@pytest.mark.parametrize("processes", [False, True])
def test_an_engine_that_ends_saves_what_it_had_begun_to(
    processes: bool, model: Path, folder: Path, prompts: Tokens, plain: Tokens
) -> None:
    store = folder / f"ends-{processes}"
    slow = replace(spoiled(model, store, slow=1.0), processes=processes)
    (cold,) = vllm.run(slow, vllm.generate(*prompts), log=folder / f"ends-{processes}.log")
    (warm,) = vllm.run(
        vllm.Setup(model, store), vllm.generate(*prompts), log=folder / f"ended-{processes}.log"
    )
    assert tokens(cold) == tokens(warm) == plain
    assert cached(warm) == [576, 192, 320]


def test_a_cache_that_is_reset_while_pages_are_saved_is_empty_and_the_pages_are_right(
    model: Path, folder: Path, prompts: Tokens, plain: Tokens
) -> None:
    store = folder / "reset"
    setup = spoiled(model, store, slow=0.5)
    first, was_reset, again, cleared, cold = vllm.run(
        setup,
        vllm.generate(*prompts),
        vllm.step("reset"),
        vllm.generate(*prompts),
        vllm.step("reset", connector=True),
        vllm.generate(*prompts),
        log=folder / "reset.log",
    )
    assert was_reset
    assert cleared
    assert tokens(first) == tokens(again) == tokens(cold) == plain
    assert cached(cold) == [0, 0, 0]
    (warm,) = vllm.run(
        vllm.Setup(model, store), vllm.generate(*prompts), log=folder / "after-reset.log"
    )
    assert tokens(warm) == plain


@pytest.mark.parametrize("processes", [False, True])
def test_weights_that_are_replaced_find_nothing_of_the_old_ones(
    processes: bool, model: Path, folder: Path, prompts: Tokens, plain: Tokens
) -> None:
    from lmcache_sglang.testing.tiny_model import make_tiny_llama

    other = make_tiny_llama(folder / "other", seed=2, dtype="float32")
    (expected,) = vllm.run(
        vllm.Setup(other, store=None), vllm.generate(*prompts), log=folder / "other.log"
    )
    store = folder / f"replaced-{processes}"
    setup = vllm.Setup(model, store, processes=processes)
    before, _, was_reset, after, _, warm = vllm.run(
        setup,
        vllm.generate(*prompts),
        vllm.step("reload", path=str(other)),
        vllm.step("reset"),
        vllm.generate(*prompts),
        vllm.step("reset"),
        vllm.generate(*prompts),
        log=folder / f"replaced-{processes}.log",
    )
    assert was_reset
    assert tokens(before) == plain
    assert tokens(after) == tokens(warm) == tokens(expected) != plain
    (files,) = vllm.run(
        replace(setup, processes=False), vllm.generate(*prompts), log=folder / "files.log"
    )
    assert tokens(files) == plain
    assert cached(files) == [576, 192, 320]
