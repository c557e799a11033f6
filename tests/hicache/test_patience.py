"""A read ends when SGLang gives it up, and when SGLang's budget for it is spent."""

from __future__ import annotations

import gc
import threading
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from lmcache_sglang.hicache import patience
from lmcache_sglang.storage.base import NO_LIMITS
from tests.hicache.test_backend import USUAL, indices, page_hashes


@dataclass
class Operation:
    """As SGLang's `PrefetchOperation`."""

    pages: int = 8
    terminated: bool = False
    hash_value: list[str] = field(default_factory=list)
    stats_requested_tokens: int = 0
    handle: str = "request"

    def __post_init__(self) -> None:
        self.hash_value = page_hashes(self.pages)

    def is_terminated(self) -> bool:
        return self.terminated


@dataclass
class Cache:
    """The attributes of SGLang's tree that hold its policy."""

    prefetch_stop_policy: str = "timeout"
    prefetch_timeout_base: float = 1.0
    prefetch_timeout_per_page: float = 0.25
    page_size: int = 16
    _storage_prefetch_wait: dict[str, Any] = field(default_factory=dict)


class Controller:
    """Anything that can be a weak key."""


def test_outside_of_a_read_there_are_no_limits() -> None:
    assert patience.current() is NO_LIMITS
    with patience.reading(Controller(), Operation()):
        assert patience.current() is not NO_LIMITS
    assert patience.current() is NO_LIMITS


def test_the_limits_are_of_one_thread() -> None:
    seen = []
    with patience.reading(Controller(), Operation()):
        other = threading.Thread(target=lambda: seen.append(patience.current()))
        other.start()
        other.join()
    assert seen == [NO_LIMITS]


@pytest.mark.parametrize(
    ("policy", "seconds"), [("timeout", 3.0), ("best_effort", None), ("wait_complete", None)]
)
def test_the_budget_is_that_of_the_policy(policy: str, seconds: float | None) -> None:
    controller, cache = Controller(), Cache(policy)
    patience.watch(controller, cache)
    with patience.reading(controller, Operation(8)):
        left = patience.left(cache, Operation(8))
        until = patience.current().until
    assert left == seconds
    assert (until is None) == (seconds is None)


def test_the_budget_is_by_all_that_was_asked_for() -> None:
    """SGLang waits so long, also where the store has less."""
    controller, cache = Controller(), Cache()
    patience.watch(controller, cache)
    with patience.reading(controller, Operation(8, stats_requested_tokens=40 * 16)):
        left = patience.current().left(own=60.0)
    assert left == pytest.approx(11.0, abs=1.0)


@pytest.mark.usefixtures("sglang")
def test_the_budget_is_spent_by_sglangs_clock_for_all_batches_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which starts when the request is first held up."""
    from sglang.srt.mem_cache.unified_radix_cache import _StoragePrefetchWait
    from sglang.srt.utils import poll_timer

    now = [1000.0]
    monkeypatch.setattr(poll_timer, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    controller, cache = Controller(), Cache()
    patience.watch(controller, cache)
    left = []
    operation = Operation(8)
    with patience.reading(controller, operation):
        for held_up in (False, True, True, True):
            now[0] += 2.0
            if held_up and not cache._storage_prefetch_wait:
                wait = _StoragePrefetchWait(timeout_s=3.0)
                wait.timer.observe(ready=False)
                cache._storage_prefetch_wait["request"] = wait
            left.append(patience.left(cache, operation))
    assert left == [3.0, 3.0, 1.0, 0.0]


def test_what_follows_the_kv_has_no_budget_but_can_be_given_up() -> None:
    """SGLang waits for it: KV without the state that goes with it is of no use."""
    controller, cache = (
        Controller(),
        Cache(prefetch_timeout_base=0.0, prefetch_timeout_per_page=0.0),
    )
    patience.watch(controller, cache)
    operation = Operation()
    with patience.reading(controller, operation):
        assert patience.current().left(own=60.0) == 0.0
        patience.kv_is_here()
        assert patience.current().left(own=60.0) == 60.0
        patience.give_up(operation)
        cancel = patience.current().cancel
        assert cancel is not None
        assert cancel.is_set()
    with patience.reading(controller, Operation()):
        assert patience.current().left(own=60.0) == 0.0
    patience.kv_is_here()  # outside of a read there is nothing to do
    assert patience.current() is NO_LIMITS


def test_a_tree_of_another_sglang_is_named_and_not_watched() -> None:
    controller, cache = Controller(), Cache()
    del cache._storage_prefetch_wait
    with pytest.raises(AttributeError, match=r"Cache has no _storage_prefetch_wait"):
        patience.watch(controller, cache)
    with patience.reading(controller, Operation()):
        assert patience.current().until is None


def test_a_tree_that_is_gone_has_no_policy() -> None:
    controller = Controller()
    patience.watch(controller, Cache())
    gc.collect()
    with patience.reading(controller, Operation()):
        assert patience.current().until is None


def test_a_policy_that_changes_while_serving_is_followed() -> None:
    controller, cache = Controller(), Cache()
    patience.watch(controller, cache)
    cache.prefetch_stop_policy = "wait_complete"
    with patience.reading(controller, Operation()):
        assert patience.current().until is None


def test_a_controller_that_nobody_watches_has_no_budget() -> None:
    with patience.reading(Controller(), Operation()):
        assert patience.current().until is None


def test_what_is_given_up_before_it_is_read_is_not_read() -> None:
    operation = Operation()
    patience.give_up(operation)  # not begun: nothing to end
    operation.terminated = True
    with patience.reading(Controller(), operation):
        cancel = patience.current().cancel
        assert cancel is not None
        assert cancel.is_set()


def test_giving_up_ends_a_read_between_two_calls(make_pool: Any, backends: Any) -> None:
    pool = make_pool(USUAL)
    backend = backends.open(pool, cpu=0)
    keys = page_hashes(2)
    assert backend.batch_set_v1(keys, indices(pool, [0, 1])) == [True, True]
    operation = Operation()
    with patience.reading(Controller(), operation):
        assert backend.batch_get_v1(keys, indices(pool, [2, 3])) == [True, True]
        patience.give_up(operation)
        assert backend.batch_get_v1(keys, indices(pool, [4, 5])) == [False, False]
    assert backend.batch_get_v1(keys, indices(pool, [4, 5])) == [True, True]
    assert backend._chain.faults.counts() == {}  # SGLang's choice, not the tier's fault
    assert not any(breaker.resting for breaker in backend._chain._breakers.values())
