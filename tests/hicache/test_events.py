"""What listeners to SGLang's KV events are told of the store: never more than is true, nor twice."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from lmcache_sglang import sglang_plugin
from lmcache_sglang.hicache import events
from lmcache_sglang.hicache.events import StoreEvents

PAGE = 4
TOKENS = list(range(40))


@pytest.fixture
def told(sglang: None, monkeypatch: pytest.MonkeyPatch) -> StoreEvents:
    """Those of this process, after SGLang has asked for the first time."""
    found = StoreEvents()
    found.take([])
    monkeypatch.setattr(events, "of_this_process", found)
    return found


def hashes(tokens: Sequence[int] = TOKENS, seed: str | None = None) -> list[str]:
    from sglang.srt.mem_cache.utils import get_hash_str

    found: list[str] = get_hash_str(list(tokens), seed, PAGE)
    return found


def blocks(page_hashes: Sequence[str]) -> list[int]:
    from sglang.srt.mem_cache.utils import hash_str_to_int64

    return [hash_str_to_int64(page) for page in page_hashes]


def back_up(told: StoreEvents, first: int, end: int, pages: list[str] | None = None) -> None:
    """Pages of TOKENS, as SGLang stores them: a run of the chain."""
    chain = pages or hashes()
    told.backed_up(chain[first:end], TOKENS[first * PAGE : end * PAGE], PAGE, chain[:first])


def test_a_run_is_told_with_its_tokens_and_the_block_before_it(told: StoreEvents) -> None:
    back_up(told, 0, 2)
    back_up(told, 2, 5)
    names = blocks(hashes())
    first, second = told.take([])
    assert (first.block_hashes, first.parent_block_hash) == (names[:2], None)
    assert (second.block_hashes, second.parent_block_hash) == (names[2:5], names[1])
    assert (first.token_ids, second.token_ids) == (TOKENS[:8], TOKENS[8:20])
    assert first.block_size == PAGE
    assert first.medium == "DISK"
    assert told.take([]) == []


def test_what_was_told_is_not_told_again(told: StoreEvents) -> None:
    back_up(told, 0, 2)
    told.take([])
    back_up(told, 0, 3)
    back_up(told, 0, 3)
    (event,) = told.take([])
    assert event.block_hashes == blocks(hashes())[2:3]
    assert event.token_ids == TOKENS[8:12]


def test_chains_with_a_salt_are_not_told(told: StoreEvents) -> None:
    """Their names in events are others; and of a run in the middle only the pages before it can say."""
    salted = hashes(seed="ab" * 32)
    back_up(told, 0, 2, salted)
    back_up(told, 2, 4, salted)
    assert told.take([]) == []


def test_nothing_is_kept_for_who_does_not_publish(sglang: None) -> None:
    never_asked = StoreEvents()
    back_up(never_asked, 0, 2)
    never_asked.stored(hashes(), TOKENS, PAGE, None)
    assert never_asked.take([]) == []


def test_what_is_not_found_is_taken_back(told: StoreEvents) -> None:
    back_up(told, 0, 3)
    told.lost(hashes()[1:6])
    told.lost(hashes()[1:6])
    stored, removed = told.take([])
    assert removed.block_hashes == blocks(hashes())[1:3]
    assert removed.medium == stored.medium
    back_up(told, 0, 3)
    (again,) = told.take([])
    assert again.block_hashes == blocks(hashes())[1:3]


def test_a_clear_takes_everything_back(told: StoreEvents) -> None:
    back_up(told, 0, 3)
    told.take([])
    told.cleared()
    told.cleared()
    (removed,) = told.take([])
    assert removed.block_hashes == blocks(hashes())[:3]


def test_what_sglang_tells_to_forget_is_told_again(told: StoreEvents) -> None:
    """Its event means every medium; what waits for it comes after it."""
    from sglang.srt.disaggregation.kv_events import AllBlocksCleared

    back_up(told, 0, 2)
    told.take([])
    back_up(told, 2, 4)
    cleared = AllBlocksCleared()
    forget, waited = told.take([cleared])
    assert forget is cleared
    assert waited.block_hashes == blocks(hashes())[2:4]
    back_up(told, 0, 4)
    (again,) = told.take([])
    assert again.block_hashes[:2] == blocks(hashes())[:2]


def test_the_oldest_are_taken_back_when_too_many_are_told(sglang: None) -> None:
    told = StoreEvents(most=3)
    told.take([])
    back_up(told, 0, 5)
    stored, removed = told.take([])
    assert stored.block_hashes == blocks(hashes())[:5]
    assert removed.block_hashes == blocks(hashes())[:2]


def test_a_lookup_a_read_and_a_clear_take_back_what_is_gone(
    told: StoreEvents, make_pool: Callable[..., Any], backends: Any
) -> None:
    """Another process has evicted it: this one learns of it when it asks."""
    from .test_backend import USUAL, indices

    backend = backends.open(make_pool(USUAL))
    keys, names = hashes(), blocks(hashes())
    backend.batch_set_v1(keys[:2], indices(backend.mem_pool_host, [0, 1]))
    back_up(told, 0, 6)
    told.take([])
    backend.batch_get_v1(keys[5:6], indices(backend.mem_pool_host, [5]))
    assert [event.block_hashes for event in told.take([])] == [names[5:6]]
    assert backend.batch_exists(keys[:5]) == 2
    assert [event.block_hashes for event in told.take([])] == [names[2:5]]
    backend.clear()
    assert [event.block_hashes for event in told.take([])] == [names[:2]]


# --- the hooks ---


def operation(pages: int) -> SimpleNamespace:
    return SimpleNamespace(
        handle="request",
        hash_value=hashes(),
        token_ids=TOKENS,
        prefix_keys=None,
        completed_tokens=pages * PAGE,
        last_hash=None,
        prefetch_kv_page_offset=0,
        all_hash_values=hashes(),
    )


@pytest.mark.parametrize(("backend", "told_of"), [(sglang_plugin.NAME, 3), ("file", 0)])
def test_a_backup_is_told_as_far_as_it_came(told: StoreEvents, backend: str, told_of: int) -> None:
    controller = SimpleNamespace(storage_backend_type=backend, page_size=PAGE)
    sglang_plugin._tell_of_stored(None, controller, operation(3))
    found = [block for event in told.take([]) for block in event.block_hashes]
    assert found == blocks(hashes())[:told_of]


@pytest.mark.parametrize(
    ("backend", "key", "told_of"),
    [
        (sglang_plugin.NAME, {}, 2),
        (sglang_plugin.NAME, {"cache_salt": "tenant"}, 0),
        (sglang_plugin.NAME, {"extra_key": "adapter"}, 0),
        ("file", {}, 0),
    ],
)
def test_a_restored_prefix_is_told_unless_it_is_a_tenants(
    told: StoreEvents, backend: str, key: dict[str, str], told_of: int
) -> None:
    plain = {"extra_key": None, "cache_salt": None, "is_bigram": False, "token_ids": TOKENS}
    asked = SimpleNamespace(prefetch_key=SimpleNamespace(**(plain | key)))
    tree = SimpleNamespace(
        cache_controller=SimpleNamespace(storage_backend_type=backend),
        ongoing_prefetch={"request": asked},
        page_size=PAGE,
    )

    def original(cache: Any, of: Any) -> str:
        cache.ongoing_prefetch.clear()
        of.completed_tokens = 2 * PAGE  # what all ranks have
        return "done"

    assert sglang_plugin._tell_of_restored(original, tree, operation(5)) == "done"
    found = [block for event in told.take([]) for block in event.block_hashes]
    assert found == blocks(hashes())[:told_of]


def test_a_prefix_whose_head_the_device_had_goes_on_from_that(told: StoreEvents) -> None:
    """SGLang cuts the head off the hashes and the key, and leaves the hash of what was before all of it."""
    rest = {
        "extra_key": None,
        "cache_salt": None,
        "is_bigram": False,
        "token_ids": TOKENS[2 * PAGE :],
    }
    tree = SimpleNamespace(
        cache_controller=SimpleNamespace(storage_backend_type=sglang_plugin.NAME),
        ongoing_prefetch={"request": SimpleNamespace(prefetch_key=SimpleNamespace(**rest))},
        page_size=PAGE,
    )
    trimmed = operation(3)
    trimmed.hash_value, trimmed.prefetch_kv_page_offset = hashes()[2:], 2
    sglang_plugin._tell_of_restored(lambda *_: None, tree, trimmed)
    (event,) = told.take([])
    assert event.block_hashes == blocks(hashes())[2:5]
    assert event.parent_block_hash == blocks(hashes())[1]


def test_nothing_is_worked_out_where_nobody_publishes(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be on the scheduler's thread, a page at a time."""
    never_asked = StoreEvents()
    monkeypatch.setattr(events, "_blocks", lambda _: pytest.fail("worked out"))
    never_asked.stored(hashes(), TOKENS, PAGE, None)
    never_asked.backed_up(hashes(), TOKENS, PAGE, [])
    never_asked.lost(hashes())


@pytest.mark.parametrize(
    ("hook", "given"),
    [
        (sglang_plugin._tell_of_stored, (None, SimpleNamespace(storage_backend_type="lmcache"), 1)),
        (sglang_plugin._tell, (None, None, SimpleNamespace(extra_key=None, cache_salt=None))),
        (sglang_plugin._key_of, (SimpleNamespace(cache_controller=None), 1)),
        (sglang_plugin._add_events, (1,)),
        (sglang_plugin._give_up, (None, SimpleNamespace(lmcache_cancel="none"))),
        (sglang_plugin._watch_the_policy, (None, None)),
        (sglang_plugin._note_the_speed, (None, SimpleNamespace(launch_ts=1.0), None)),
    ],
)
def test_a_hook_that_fails_leaves_sglang_alone(
    hook: Any, given: tuple[Any, ...], told: StoreEvents, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = threading.Event()
    made.set()
    monkeypatch.setattr(sglang_plugin, "_BACKEND_MADE", made)
    assert hook(*given) is None
