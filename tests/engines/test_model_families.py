"""Every family of models comes back after a restart, with the same tokens: one pool, or several.

    mha     as many KV heads as query heads     (GQA is the model of all other files)
    swa     a second pool for layers with a sliding window
    mla     one latent row a token
    mamba   attention beside a recurrent state, in every layer
    conv    attention in some layers, the state of a short convolution in the others

The requests, and what there is to say of recurrent states: lmcache_sglang/testing/families_workload.py.
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
    PAGE_SIZE,
    Setup,
    ask,
    disk_tier,
    flush,
    memory_tier,
    server,
    until,
)
from lmcache_sglang.testing.families_workload import (
    ASKED,
    LONG,
    ONE_MORE,
    PART,
    RECURRENT,
    Cold,
    Service,
    a_turn_later,
    ask_cold,
    ask_evicted,
)
from lmcache_sglang.testing.server import SGLangServer
from lmcache_sglang.testing.tiny_families import make_tiny

# Tokens of PART: its whole pages; up to where the stem ends, as a window is whole there; no place in it has a state.
OF_A_PART = {"mha": 240, "mla": 240, "swa": 208, "mamba": 0, "conv": 0}
SIDECARS = {"swa": "swa", "mamba": "mamba", "conv": "mamba"}


@dataclass(frozen=True, slots=True)
class Family:
    """A family whose cold engine has answered and is gone; its store has only the disk."""

    name: str
    model: Path
    setup: Setup
    cold: Cold

    def expected(self, what: str) -> list[int]:
        """The tokens that an engine gave which had nothing cached."""
        return self.cold.expected[what].tokens

    def whole_pages(self, tokens: int) -> int:
        return tokens // self.setup.page_size * self.setup.page_size


@pytest.fixture(scope="module", params=["mha", "swa", "mla", "mamba", "conv"])
def family(request: pytest.FixtureRequest, folder: Path) -> Family:
    name: str = request.param
    model = make_tiny(name, folder / name, seed=1)
    service = Service(name, page_size=1 if name in RECURRENT else PAGE_SIZE)
    setup = service.setup(Setup(folder / f"{name}-store"))
    return Family(name, model, setup, ask_cold(model, setup, folder / f"{name}-cold.log"))


@pytest.fixture(scope="module")
def warm(family: Family, folder: Path) -> Iterator[SGLangServer]:
    with server(family.model, family.setup, folder / f"{family.name}-warm.log") as engine:
        yield engine


def test_nothing_was_restored_into_an_empty_store(family: Family) -> None:
    expected = family.cold.expected.values()
    assert all(answer.storage == 0 for answer in [*family.cold.answered.values(), *expected])
    assert all(answer.device == 0 for answer in expected)


@pytest.mark.parametrize("what", ASKED)
def test_a_prompt_comes_back_with_the_same_tokens(
    family: Family, warm: SGLangServer, what: str
) -> None:
    flush(warm)
    answer = ask(warm, [*ASKED[what], ONE_MORE])
    assert answer.tokens == family.expected(what)
    assert answer.device == answer.host == 0
    assert answer.storage == family.whole_pages(len(ASKED[what]))


def test_the_next_turn_takes_up_the_one_before(family: Family, warm: SGLangServer) -> None:
    flush(warm)
    answer = ask(warm, a_turn_later(family.cold.answered))
    assert answer.tokens == family.expected("a turn later")
    assert answer.storage >= family.whole_pages(len(LONG))


def test_a_part_of_a_prompt_is_not_mistaken_for_the_whole(
    family: Family, warm: SGLangServer
) -> None:
    """It ends inside what was stored, where a window may be gone and a state was never kept."""
    flush(warm)
    answer = ask(warm, PART)
    assert answer.tokens == family.expected("a part")
    assert answer.storage == OF_A_PART[family.name]


def test_what_left_device_and_host_comes_back(family: Family, warm: SGLangServer) -> None:
    answer = ask_evicted(warm)
    assert answer.tokens == family.expected("longer than a window")
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
    assert without.tokens == family.expected("longer than a window")
    flush(warm)
    ask(warm, LONG)  # ends where the page ends
    until(lambda: _comes_back(family, warm, whole))


def _remove(family: Family, prefix: list[int]) -> None:
    """The last page of a prefix, from the sidecar's pool, in both tiers; its KV stays."""
    from sglang.srt.mem_cache.utils import get_hash_str

    pool = SIDECARS[family.name]
    namespace = re.findall(rf"lmcache: pool {pool}: .*, namespace (\w+)", family.cold.log)[-1]
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
    assert answer.tokens == family.expected("longer than a window")
    return answer.storage == whole
