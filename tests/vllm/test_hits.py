"""What one vLLM computed is a hit in another one, and its answers are those of no store at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from lmcache_sglang.testing import vllm
from tests.vllm.answers import HITS, LOADED, SAVED, cached, tokens

Tokens = Sequence[Sequence[int]]


@pytest.mark.parametrize(
    ("page_size", "block_size", "processes"),
    [(32, 32, False), (64, 32, True), (64, 128, False)],
)
def test_a_new_process_finds_what_the_last_one_left(
    page_size: int,
    block_size: int,
    processes: bool,
    model: Path,
    folder: Path,
    prompts: Tokens,
    plain: Tokens,
) -> None:
    name = f"{page_size}-{block_size}"
    setup = vllm.Setup(
        model, folder / name, page_size=page_size, block_size=block_size, processes=processes
    )
    cold, none = vllm.run(
        setup, vllm.generate(*prompts), vllm.step("metrics"), log=folder / f"{name}-cold.log"
    )
    warm, some = vllm.run(
        setup, vllm.generate(*prompts), vllm.step("metrics"), log=folder / f"{name}-warm.log"
    )
    unit = max(page_size, block_size)
    expected = [len(prompt) // unit * unit for prompt in prompts]
    assert tokens(cold) == tokens(warm) == plain
    assert cached(cold) == [0, 0, 0]
    assert cached(warm) == expected
    assert (none[HITS], some[HITS]) == (0, sum(expected))
    assert some[LOADED] == sum(expected)
    assert some["vllm:lmcache_load_bytes"] > 0
    assert none[SAVED] >= sum(len(prompt) // page_size for prompt in prompts)


def test_answers_are_found_as_prompts_are(
    model: Path, folder: Path, prompts: Tokens, plain: Tokens
) -> None:
    """The next turn of a conversation begins with the last answer; nothing of it is lost when the engine ends."""
    setup = vllm.Setup(model, folder / "turns")
    first = prompts[1]
    ((answer,),) = vllm.run(setup, vllm.generate(first, new_tokens=60), log=folder / "turn-1.log")
    turn = [*first, *answer["tokens"], 7, 8, 9]
    ((again,),) = vllm.run(setup, vllm.generate(turn), log=folder / "turn-2.log")
    assert again["cached"] == (len(first) + 59) // 32 * 32  # the last token's KV was never computed
    ((without,),) = vllm.run(
        replace(setup, store=None), vllm.generate(turn), log=folder / "turn-3.log"
    )
    assert again["tokens"] == without["tokens"]


def test_salts_are_kept_apart(model: Path, folder: Path, prompts: Tokens, plain: Tokens) -> None:
    setup = vllm.Setup(model, folder / "salts")
    steps = [
        vllm.generate(prompts[1], cache_salt="one"),
        vllm.generate(prompts[1], cache_salt="two"),
        vllm.generate(prompts[1]),
        vllm.step("reset"),
        vllm.generate(prompts[1], cache_salt="two"),
    ]
    *cold, was_reset, warm = vllm.run(setup, *steps, log=folder / "salts.log")
    assert was_reset
    assert [cached(each) for each in cold] == [[0], [0], [0]]
    assert cached(warm) == [192]
    assert tokens(warm) == [plain[1]]
