"""Every family of models comes back after a restart, with the same tokens: one pool, or several.

    mha     as many KV heads as query heads     (GQA is the model of all other files)
    swa     a second pool for layers with a sliding window
    mla     one latent row a token
    mamba   attention beside a recurrent state, in every layer
    conv    attention in some layers, the state of a short convolution in the others

A recurrent state is of one place in a sequence, so a prefix comes back up to a place where SGLang kept
one: where a prompt or its answer ended. The requests here therefore go on from what was asked before.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from lmcache_sglang.storage.base import page_key
from lmcache_sglang.testing.engine import (
    Answer,
    Setup,
    ask,
    disk_tier,
    memory_tier,
    prompt,
    server,
    until,
)
from lmcache_sglang.testing.server import ServerRefused, SGLangServer
from lmcache_sglang.testing.tiny_families import WINDOW, make_tiny

# Every prefix is worth a look-up, and the first request after a start waits for its own.
EAGER = {"prefetch_threshold": 16}
ARGS = ("--max-total-tokens", "1024", "--hicache-ratio", "2")
WAIT = ("--hicache-storage-prefetch-policy", "wait_complete")
SIDECARS = {"swa": "swa", "mamba": "mamba", "conv": "mamba"}
# All that SGLang offers on CPU: no snapshots inside a prompt, hence pages of one token.
STATES_AT_ENDS = ("--mamba-radix-cache-strategy", "no_buffer", "--disable-overlap-schedule")

LONG = prompt(1)
ASKED = {
    "longer than a window": LONG,
    "shorter than a window": prompt(3, WINDOW - 30),
    "of the same stem": LONG[:208] + prompt(2)[208:300],
}
ONE_MORE = 7  # a token
PART = LONG[:250]  # ends where nothing ended before


@dataclass(frozen=True, slots=True)
class Family:
    """A family whose cold engine has answered and is gone; its store has only the disk.

    `expected` are answers that were computed without anything cached.
    """

    name: str
    model: Path
    setup: Setup
    answered: dict[str, Answer]
    expected: dict[str, Answer]
    log: str

    def whole_pages(self, tokens: int) -> int:
        return tokens // self.setup.page_size * self.setup.page_size


@pytest.fixture(scope="module", params=["mha", "swa", "mla", "mamba", "conv"])
def family(request: pytest.FixtureRequest, folder: Path) -> Family:
    name: str = request.param
    recurrent = SIDECARS.get(name) == "mamba"
    model = make_tiny(name, folder / name, seed=1)
    setup = Setup(
        folder / f"{name}-store",
        args=[*ARGS, *WAIT, *(STATES_AT_ENDS if recurrent else ())],
        page_size=1 if recurrent else 16,
        sglang=EAGER,
    )
    with server(model, setup, folder / f"{name}-cold.log") as engine:
        answered = {what: ask(engine, tokens) for what, tokens in ASKED.items()}
        later = {what: [*tokens, ONE_MORE] for what, tokens in ASKED.items()}
        later |= {"a part": PART, "a turn later": _a_turn_later(answered)}
        # A tenant for each, so that nothing is cached for any of them.
        expected = {what: ask(engine, tokens, cache_salt=what) for what, tokens in later.items()}
    setup.forget_memory()
    return Family(name, model, setup, answered, expected, engine.log)


@pytest.fixture(scope="module")
def warm(family: Family, folder: Path) -> Iterator[SGLangServer]:
    with server(family.model, family.setup, folder / f"{family.name}-warm.log") as engine:
        yield engine


def test_nothing_was_restored_into_an_empty_store(family: Family) -> None:
    answers = [*family.answered.values(), *family.expected.values()]
    assert all(answer.storage == 0 for answer in answers)
    assert all(answer.device == 0 for answer in family.expected.values())


@pytest.mark.parametrize("what", ASKED)
def test_a_prompt_comes_back_with_the_same_tokens(
    family: Family, warm: SGLangServer, what: str
) -> None:
    flush(warm)
    answer = ask(warm, [*ASKED[what], ONE_MORE])
    assert answer.tokens == family.expected[what].tokens
    assert answer.device == answer.host == 0
    assert answer.storage == family.whole_pages(len(ASKED[what]))


def test_the_next_turn_takes_up_the_one_before(family: Family, warm: SGLangServer) -> None:
    flush(warm)
    answer = ask(warm, _a_turn_later(family.answered))
    assert answer.tokens == family.expected["a turn later"].tokens
    assert answer.storage >= family.whole_pages(len(LONG))


def test_a_part_of_a_prompt_is_not_mistaken_for_the_whole(
    family: Family, warm: SGLangServer
) -> None:
    """It ends inside what was stored, where a window may be gone and a state was never kept."""
    flush(warm)
    answer = ask(warm, PART)
    assert answer.tokens == family.expected["a part"].tokens
    assert answer.storage < len(PART)


def test_what_left_device_and_host_comes_back(family: Family, warm: SGLangServer) -> None:
    flush(warm)
    ask(warm, [*LONG, ONE_MORE])
    for seed in range(50, 60):  # 4,000 tokens through 1,024 on the device and 2,048 on the host
        ask(warm, prompt(seed))
    answer = ask(warm, [*LONG, ONE_MORE])
    assert answer.tokens == family.expected["longer than a window"].tokens
    assert answer.device == answer.host == 0
    assert answer.storage == family.whole_pages(len(LONG))


@pytest.mark.usefixtures("sglang")
def test_a_prefix_whose_sidecar_is_gone_is_computed_again_and_stored_again(
    family: Family, warm: SGLangServer
) -> None:
    if family.name not in SIDECARS:
        pytest.skip("one pool: there is nothing beside the KV")
    whole = family.whole_pages(len(LONG))
    _remove(family, LONG[:whole])
    flush(warm)
    without = ask(warm, [*LONG, ONE_MORE])
    assert without.storage < whole
    assert without.tokens == family.expected["longer than a window"].tokens
    flush(warm)
    ask(warm, LONG)  # ends where the page ends
    until(lambda: _comes_back(family, warm, whole))


def flush(engine: SGLangServer) -> None:
    """Empty the radix tree. SGLang refuses while a request's pages are still on their way."""
    until(lambda: _flushed(engine))


def _flushed(engine: SGLangServer) -> bool:
    try:
        engine.post("/flush_cache")
    except ServerRefused:
        return False
    return True


def _a_turn_later(answered: dict[str, Answer]) -> list[int]:
    """The next turn of a chat: what was asked, what was answered, and something new."""
    return LONG + answered["longer than a window"].tokens + prompt(7)[:50]


def _remove(family: Family, prefix: list[int]) -> None:
    """The last page of a prefix, from the sidecar's pool, in both tiers; its KV stays."""
    from sglang.srt.mem_cache.utils import get_hash_str

    pool = SIDECARS[family.name]
    namespace = re.findall(rf"lmcache: pool {pool}: .*, namespace (\w+)", family.log)[-1]
    last = get_hash_str(prefix, page_size=family.setup.page_size)[-1]
    key = page_key(bytes.fromhex(namespace), bytes.fromhex(last))
    removed = 0
    for open_tier in (disk_tier, memory_tier):
        with closing(open_tier(family.setup)) as tier:
            removed += tier.remove([key])
    assert removed > 0


def _comes_back(family: Family, engine: SGLangServer, whole: int) -> bool:
    flush(engine)
    answer = ask(engine, [*LONG, ONE_MORE])
    assert answer.tokens == family.expected["longer than a window"].tokens
    return answer.storage == whole
