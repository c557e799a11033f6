"""SGLang's own `UnifiedRadixCache` and `HybridCacheController`, with their threads and ranks, without a model.

KV is written by hand into SGLang's device pools, backed up by its tree as soon as it is inserted, evicted
everywhere, and must come back from the store bit by bit, to both of two ranks or to one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from lmcache_sglang.testing.rank_pools import Family
from lmcache_sglang.testing.rank_processes import Nursery, Ranks

# Pages after which a turn of the conversation ends, and with it a node of the tree.
ENDS = (6, 10, 16)
PAGES = ENDS[-1]
POOLS = {"mha": ["kv"], "mla": ["kv"], "swa": ["kv", "swa"], "mamba": ["kv", "mamba"]}
FAMILIES = list(POOLS)

Store = dict[str, Any]
Prompt = Callable[[int], list[int]]


def prompt(family: Family, pages: int = PAGES, first: int = 1000) -> list[int]:
    return list(range(first, first + pages * family.page_size))


def converse(ranks: Any, family: Family) -> None:
    """Each turn is inserted when it ends, and backed up at once."""
    known = [0, *ENDS]
    for before, end in zip(known, ENDS, strict=False):
        answers = ranks.call("write", prompt(family, end))
        assert answers == [before * family.page_size] * family.ranks


@contextmanager
def evicted(nursery: Nursery, family: Family, store: Store, **settings: str) -> Iterator[Ranks]:
    """Ranks whose conversation is in the store, and nowhere else. Of the host pools every slot is free at the end."""
    with nursery.ranks(family, store, **settings) as ranks:
        empty = ranks.call("free")
        converse(ranks, family)
        ranks.call("forget")
        assert ranks.call("matched", prompt(family)) == [[0, 0]] * family.ranks
        yield ranks
        ranks.call("forget")
        assert ranks.call("free") == empty


def whole(family: Family, pages: int, *, of_store: int | None = None) -> list[Any]:
    """What `restore` returns where every rank has the pages, with all that was written of them."""
    size = family.page_size
    same = dict.fromkeys(POOLS[family.name], True)
    return [[(pages if of_store is None else of_store) * size, pages * size, same]] * family.ranks


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_was_evicted_everywhere_comes_back_from_the_store(
    name: str, page_size: int, nursery: Nursery, store: Store
) -> None:
    family = Family(name, page_size)
    tokens = prompt(family)
    with nursery.ranks(family, store) as ranks:
        assert ranks.call("describe") == [
            {
                "tree": "UnifiedRadixCache",
                "controller": "HybridCacheController",
                "backend": "lmcache",
                "policy": "write_through",
                "pools": POOLS[name],
                "running": [True] * 4,
            }
        ]
        empty = ranks.call("free")
        assert ranks.call("prefetch", tokens) == [0]
        converse(ranks, family)
        assert ranks.call("matched", tokens) == [[PAGES * page_size, 0]]
        ranks.call("forget")
        assert ranks.call("matched", tokens) == [[0, 0]]
        assert ranks.call("free") == empty
        assert ranks.call("restore", tokens) == whole(family, PAGES)
    with nursery.ranks(family, store) as anew:
        assert anew.call("restore", tokens) == whole(family, PAGES)


@pytest.mark.parametrize("name", FAMILIES)
def test_two_ranks_restore_each_its_own_part(name: str, nursery: Nursery, store: Store) -> None:
    family = Family(name, 16, ranks=2)
    tokens = prompt(family)
    for first in (True, False):  # then processes that have nothing but the store
        with nursery.ranks(family, store) as ranks:
            if first:
                converse(ranks, family)
                ranks.call("forget")
            assert ranks.call("restore", tokens) == whole(family, PAGES)


def test_only_what_the_device_lacks_is_asked_of_the_store(nursery: Nursery, store: Store) -> None:
    family = Family("mha", 16, ranks=2)
    tokens, start = prompt(family), prompt(family, ENDS[0])
    with evicted(nursery, family, store) as ranks:
        assert ranks.call("restore", start) == whole(family, ENDS[0])
        rest = PAGES - ENDS[0]
        assert ranks.call("restore", tokens) == whole(family, PAGES, of_store=rest)


def test_another_prompt_gets_the_pages_it_shares_and_no_others(
    nursery: Nursery, store: Store
) -> None:
    family = Family("mha", 16)
    with evicted(nursery, family, store) as ranks:
        tokens = prompt(family, 9) + prompt(family, 4, first=9000)
        assert ranks.call("restore", tokens) == whole(family, 9)
        assert ranks.call("prefetch", prompt(family, first=9000)) == [0]


@pytest.mark.parametrize("name", ["mha", "swa"])
@pytest.mark.parametrize(("writing", "reading"), [(1, 2), (2, 1)])
def test_ranks_of_another_engine_restore_what_they_hold_of_each_page(
    writing: int, reading: int, name: str, nursery: Nursery, store: Store
) -> None:
    tokens = prompt(Family(name, 16))
    for ranks_of_it in (writing, reading):
        family = Family(name, 16, ranks=ranks_of_it)
        with nursery.ranks(family, store) as ranks:
            if ranks_of_it == writing:
                converse(ranks, family)
            else:
                assert ranks.call("restore", tokens) == whole(family, PAGES)


@pytest.mark.parametrize(
    "settings",
    [
        {"hicache_mem_layout": "page_first_direct", "hicache_io_backend": "direct"},
        {"hicache_mem_layout": "page_head"},
        {"hicache_mem_layout": "layer_first"},  # which the plug-in makes page_first
        {"hicache_storage_prefetch_policy": "timeout"},
        {"hicache_write_policy": "write_back"},
    ],
    ids=lambda settings: "-".join(settings.values()),
)
def test_so_it_is_with_other_settings(
    settings: dict[str, str], nursery: Nursery, store: Store
) -> None:
    family = Family("mha", 16, ranks=2)
    tokens = prompt(family)
    with evicted(nursery, family, store, **settings) as ranks:
        assert ranks.call("restore", tokens) == whole(family, PAGES)


# --- while the engine serves ---


@pytest.mark.parametrize("ranks_of_it", [1, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_was_stored_before_a_detach_comes_back_after_an_attach(
    name: str, ranks_of_it: int, nursery: Nursery, store: Store
) -> None:
    family = Family(name, 16, ranks=ranks_of_it)
    tokens, meanwhile = prompt(family), prompt(family, first=9000)
    with evicted(nursery, family, store) as ranks:
        ranks.call("detach")
        ranks.call("write", meanwhile)
        ranks.call("forget")
        assert ranks.call("matched", tokens) == [[0, 0]] * family.ranks
        ranks.call("attach")
        assert ranks.call("prefetch", meanwhile) == [0] * family.ranks
        assert ranks.call("restore", tokens) == whole(family, PAGES)
        ranks.call("forget")
        assert ranks.call("write", meanwhile) == [0] * family.ranks  # and is stored again
        ranks.call("forget")
        assert ranks.call("restore", meanwhile) == whole(family, PAGES)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_clear_forgets_what_both_ranks_have_and_nothing_of_another_model(
    name: str, nursery: Nursery, store: Store
) -> None:
    family = Family(name, 16, ranks=2)
    tokens = prompt(family)
    another = {"served_model_name": "another"}
    with nursery.ranks(family, store, **another) as ranks:
        converse(ranks, family)
    with evicted(nursery, family, store) as ranks:
        for pool in POOLS[name]:
            assert all(any(pages) for pages in ranks.call("stored", pool, tokens))
        assert ranks.call("clear") == [True, True]
        for pool in POOLS[name]:
            assert ranks.call("stored", pool, tokens) == [[False] * PAGES] * 2
        assert ranks.call("prefetch", tokens) == [0, 0]
        converse(ranks, family)  # stored anew
        ranks.call("forget")
        assert ranks.call("restore", tokens) == whole(family, PAGES)
    with nursery.ranks(family, store, **another) as ranks:
        assert ranks.call("restore", tokens) == whole(family, PAGES)


@pytest.mark.parametrize(
    ("policy", "budget"), [("timeout", 2.0 + PAGES * 0.125), ("wait_complete", None)]
)
def test_a_read_has_the_budget_that_sglang_gives_the_request(
    policy: str, budget: float | None, nursery: Nursery, store: Store
) -> None:
    """Of SGLang's own tree: a name that it changes fails here, and not as a read without an end."""
    family = Family("mha", 16)
    keys = {"prefetch_timeout_base": 2.0, "prefetch_timeout_per_ki_token": 8.0}  # 0.125 s a page
    expected = {"reading": budget, "sglang": budget, "equal": True}
    settings = {"hicache_storage_prefetch_policy": policy}
    with evicted(nursery, family, store | keys, **settings) as ranks:
        assert ranks.call("budget", prompt(family)) == [expected]
        ranks.call("forget")
        ranks.call("detach")
        ranks.call("attach")
        assert ranks.call("budget", prompt(family)) == [expected]


# --- pages that only one rank has ---


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("name", ["mha", "swa"])
def test_ranks_agree_on_the_shorter_prefix(
    name: str, page_size: int, nursery: Nursery, store: Store
) -> None:
    """Each lacks another end of it, the second rank the longer one."""
    family = Family(name, page_size, ranks=2)
    tokens = prompt(family)
    with evicted(nursery, family, store) as ranks:
        ranks.only(0, "remove", "kv", tokens, list(range(14, PAGES)))
        ranks.only(1, "remove", "kv", tokens, list(range(11, PAGES)))
        assert ranks.call("restore", tokens) == whole(family, 11)


@pytest.mark.parametrize(
    ("name", "lacking", "legal"),
    [
        # Rank 0 may stop at 6 and 10, rank 1 at 6 and 16: the shorter of their longest would be 10.
        ("mamba", ([15], [9]), 6),
        # Two pages of window: rank 0 may not stop at 16, rank 1 not at 14 and 15, where the shorter of
        # their longest would be.
        ("swa", ([15], [13]), 13),
    ],
)
@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_ranks_agree_on_a_prefix_that_both_may_stop_at(
    page_size: int,
    name: str,
    lacking: tuple[list[int], list[int]],
    legal: int,
    nursery: Nursery,
    store: Store,
) -> None:
    family = Family(name, page_size, ranks=2)
    tokens = prompt(family)
    with evicted(nursery, family, store) as ranks:
        for rank, pages in enumerate(lacking):
            ranks.only(rank, "remove", name, tokens, pages)
        assert ranks.call("restore", tokens) == whole(family, legal)


def test_nothing_is_restored_where_ranks_may_stop_nowhere_together(
    nursery: Nursery, store: Store
) -> None:
    family = Family("mamba", 16, ranks=2)
    tokens = prompt(family)
    with evicted(nursery, family, store) as ranks:
        ranks.only(0, "remove", "mamba", tokens, [5, 9])
        ranks.only(1, "remove", "mamba", tokens, [15])
        assert ranks.call("prefetch", tokens) == [0, 0]
        assert ranks.call("matched", tokens) == [[0, 0]] * 2


def test_latent_pages_of_one_rank_serve_all(nursery: Nursery, store: Store) -> None:
    """SGLang stores them from the first rank alone."""
    family = Family("mla", 16, ranks=2)
    tokens = prompt(family)
    with evicted(nursery, family, store) as ranks:
        ranks.only(1, "remove", "kv", tokens, [12])
        assert ranks.call("stored", "kv", tokens) == [[page != 12 for page in range(PAGES)]] * 2
        assert ranks.call("restore", tokens) == whole(family, 12)


@pytest.mark.parametrize(
    ("name", "pool", "page", "left"),
    [
        ("mha", "kv", 11, 11),
        # SGLang gives up all of a prefix of which a window or a state is not whole in the end.
        ("swa", "kv", 11, 0),
        ("swa", "swa", 15, 0),
        ("mamba", "mamba", 15, 0),
    ],
)
def test_what_one_rank_loses_between_lookup_and_read_is_used_by_none(
    name: str, pool: str, page: int, left: int, nursery: Nursery, store: Store
) -> None:
    family = Family(name, 16, ranks=2)
    tokens = prompt(family)
    with evicted(nursery, family, store) as ranks:
        ranks.only(1, "remove_when_found", pool, tokens, [page])
        assert ranks.call("prefetch", tokens) == [left * family.page_size] * 2
        missing = [place != page for place in range(PAGES)]
        if name != "mamba":  # whose states are at the ends of turns only
            assert ranks.call("stored", pool, tokens) == [[True] * PAGES, missing]
        assert ranks.call("matched", tokens) == [[0, left * family.page_size]] * 2
        if left:
            assert ranks.call("load_back", tokens) == [each[1:] for each in whole(family, left)]
