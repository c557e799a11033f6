"""The hooks of the direct path one by one; tests/test_sglang_plugin.py has them registered, tests/engines at work."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lmcache_sglang import sglang_direct


class Linker:
    """Notes what it is told; which requests wait, and of which the device lost the prefix, is up to the test."""

    name = "lmcache"

    def __init__(self) -> None:
        self.said: list[tuple[str, Any]] = []
        self.waiting: list[str] = []
        self.of_no_use: set[str] = set()

    def begin_pass(self, waiting: Any, agree: Any) -> None:
        self.said.append(("begins", waiting()))
        agree(torch.ones(1))

    def end_pass(self) -> None:
        self.said.append(("ends", None))

    def may_go(self, rid: str) -> bool:
        return rid not in self.waiting

    def lost(self, rid: str) -> bool:
        return rid in self.of_no_use

    def release(self, rid: str) -> None:
        self.said.append(("released", rid))

    def follows(self, before: str, position: int) -> None:
        self.said.append(("follows", (before, position)))


class Cache:
    """SGLang's tree with a linker."""

    def __init__(self, linker: Any) -> None:
        self.linker = SimpleNamespace(cache_linker=linker, hit_markers={"a": 1, "b": 2}, cache=self)
        self.reduced: list[torch.Tensor] = []

    def _all_reduce_attn_groups(self, tensor: torch.Tensor, op: object) -> None:
        assert op == torch.distributed.ReduceOp.MIN
        self.reduced.append(tensor)


def request(rid: str, **more: Any) -> Any:
    return SimpleNamespace(rid=rid, **more)


@pytest.fixture
def linker() -> Linker:
    return Linker()


@pytest.fixture
def cache(linker: Linker) -> Cache:
    return Cache(linker)


def scheduler(cache: Cache) -> Any:
    return SimpleNamespace(
        tree_cache=cache, enable_lmcache=False, waiting_queue=[request("a"), request("b")]
    )


def test_who_was_admitted_holds_nothing_any_more(cache: Cache, linker: Linker) -> None:
    def admit(seen: Any) -> Any:
        assert seen.enable_lmcache
        return SimpleNamespace(reqs=[request("a")]), "running"

    seen = scheduler(cache)
    assert sglang_direct._hold_up(admit, seen)[1] == "running"
    assert linker.said == [("begins", ["a", "b"]), ("ends", None), ("released", "a")]
    assert cache.linker.hit_markers == {"b": 2}
    assert not seen.enable_lmcache
    assert len(cache.reduced) == 1


def test_a_pass_ends_where_the_scheduler_fails(cache: Cache, linker: Linker) -> None:
    def fail(_: Any) -> Any:
        raise RuntimeError("told to")

    seen = scheduler(cache)
    with pytest.raises(RuntimeError):
        sglang_direct._hold_up(fail, seen)
    assert linker.said[-1] == ("ends", None)
    assert not seen.enable_lmcache


def test_an_arrival_asks_and_leaves_no_marker(cache: Cache) -> None:
    asked = []
    req = request("a", init_next_round_input=lambda tree, *, cow_mamba: asked.append(cow_mamba))
    sglang_direct._ask_at_once(lambda *_: pytest.fail("not SGLang's"), scheduler(cache), req)
    assert asked == [False]
    assert "a" not in cache.linker.hit_markers


@pytest.mark.parametrize(("waits", "goes"), [([], True), (["a"], False)])
def test_a_request_waits_as_the_linker_says(
    waits: list[str], goes: bool, cache: Cache, linker: Linker
) -> None:
    linker.waiting = waits
    assert sglang_direct._has_landed(lambda *_: None, cache, request("a")) is goes


def stateful(rid: str, *, session: object = None) -> Any:
    kv = SimpleNamespace(
        holds_mamba=True,
        mamba_pool_idx=torch.tensor(7),
        mamba_cow_src_index=3,
        mamba_needs_clear=True,
    )
    return request(rid, kv=kv, session=session)


def adder(cache: Cache, freed: list[list[int]]) -> Any:
    allocator = SimpleNamespace(free=lambda slots: freed.append(slots.tolist()))
    cache.req_to_token_pool = SimpleNamespace(mamba_allocator=allocator)  # type: ignore[attr-defined]
    return SimpleNamespace(tree_cache=cache)


def test_a_request_whose_prefix_the_device_lost_is_not_admitted_and_keeps_no_state(
    sglang: None, cache: Cache, linker: Linker
) -> None:
    from sglang.srt.managers.schedule_policy import AddReqResult

    linker.of_no_use = {"a"}
    freed: list[list[int]] = []
    req = stateful("a")
    answer = sglang_direct._wait_again(
        lambda *_: pytest.fail("was admitted"), adder(cache, freed), req
    )
    assert answer is AddReqResult.CONTINUE
    assert freed == [[7]]
    assert (req.kv.mamba_pool_idx, req.kv.mamba_cow_src_index) == (None, None)
    assert not req.kv.mamba_needs_clear
    assert "a" not in cache.linker.hit_markers
    assert sglang_direct._wait_again(lambda *_: "added", adder(cache, freed), request("b")) == (
        "added"
    )


def test_the_state_of_a_session_stays_its_own(sglang: None, cache: Cache, linker: Linker) -> None:
    linker.of_no_use = {"a"}
    freed: list[list[int]] = []
    req = stateful("a", session=object())
    sglang_direct._wait_again(lambda *_: None, adder(cache, freed), req)
    assert freed == []
    assert int(req.kv.mamba_pool_idx) == 7


@pytest.mark.parametrize(
    ("page_size", "told"), [(16, [("h2", 3), ("", 0)]), (8, [])]
)  # small pages are many
def test_a_node_follows_the_pages_of_all_its_ancestors(
    page_size: int, told: list[tuple[str, int]], cache: Any, linker: Linker
) -> None:
    before: dict[int, list[str]] = {1: ["h0", "h1", "h2"], 2: []}
    cache.page_size = page_size
    cache.tree_core = SimpleNamespace(get_prefix_hash_values=before.__getitem__)
    for node in before:
        sglang_direct._tell_what_comes_before(cache.linker, node)
    assert linker.said == [("follows", each) for each in told]


def test_another_linker_is_left_alone(cache: Cache, linker: Linker) -> None:
    linker.name = "another"
    seen = scheduler(cache)
    assert sglang_direct._hold_up(lambda s: (s.enable_lmcache, None), seen)[0] is False
    assert sglang_direct._has_landed(lambda *_: "theirs", cache, request("a")) == "theirs"
    assert sglang_direct._clear(lambda *_: "theirs", seen) == "theirs"
    assert sglang_direct._ask_at_once(lambda *_: "theirs", seen, request("a")) == "theirs"
    assert (
        sglang_direct._wait_again(lambda *_: "theirs", adder(cache, []), request("a")) == "theirs"
    )
    sglang_direct._end_promise(None, cache.linker, "a")
    sglang_direct._tell_what_comes_before(cache.linker, 1)
    assert linker.said == []
