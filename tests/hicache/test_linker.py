"""The direct path under SGLang's own `UnifiedRadixCache`, with its external linker and its ranks, without a model.

As test_radix_cache.py for HiCache: KV is written by hand into SGLang's device pools, offloaded by its tree as soon as
it is inserted, evicted, and must come back from the store bit by bit, to both of two ranks or to one.
"""

from __future__ import annotations

import shutil
from typing import Any

import pytest

from lmcache_sglang.testing.rank_pools import Family
from lmcache_sglang.testing.rank_processes import Nursery
from tests.hicache.test_radix_cache import ENDS, FAMILIES, PAGES, POOLS, converse, prompt, whole

Store = dict[str, Any]
DIRECT = {"direct": {"landing": "8MiB"}}


@pytest.fixture
def direct(store: Store) -> Store:
    return store | DIRECT


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_was_evicted_comes_back_from_the_store(
    name: str, page_size: int, nursery: Nursery, direct: Store
) -> None:
    family = Family(name, page_size)
    tokens = prompt(family)
    with nursery.ranks(family, direct) as ranks:
        assert ranks.call("describe") == [
            {"tree": "UnifiedRadixCache", "linker": "LMCacheLinker", "pools": POOLS[name]}
        ]
        assert ranks.call("prefetch", tokens) == [0]
        converse(ranks, family)
        assert ranks.call("matched", tokens) == [[PAGES * page_size, 0]]
        ranks.call("forget")
        assert ranks.call("matched", tokens) == [[0, 0]]
        assert ranks.call("restore", tokens) == whole(family, PAGES)
    with nursery.ranks(family, direct) as anew:
        assert anew.call("restore", tokens) == whole(family, PAGES)


@pytest.mark.parametrize("name", FAMILIES)
def test_two_ranks_restore_each_its_own_part(name: str, nursery: Nursery, direct: Store) -> None:
    family = Family(name, 16, ranks=2)
    tokens = prompt(family)
    for first in (True, False):  # then processes that have nothing but the store
        with nursery.ranks(family, direct) as ranks:
            if first:
                converse(ranks, family)
                ranks.call("forget")
            assert ranks.call("restore", tokens) == whole(family, PAGES)


@pytest.mark.parametrize("name", FAMILIES)
def test_hicache_and_the_direct_path_read_each_others_pages(
    name: str, nursery: Nursery, store: Store, direct: Store
) -> None:
    """By the same name, so that the order of bytes is one, and not converted."""
    family = Family(name, 16)
    tokens, others = prompt(family), prompt(family, first=9000)
    with nursery.ranks(family, store) as hicache:
        converse(hicache, family)
        names = hicache.call("namespaces", POOLS[name])
    with nursery.ranks(family, direct) as ranks:
        assert ranks.call("namespaces", POOLS[name]) == names
        assert ranks.call("restore", tokens) == whole(family, PAGES)
        ranks.call("write", others)
    with nursery.ranks(family, store) as hicache:
        assert hicache.call("restore", others) == whole(family, PAGES)


@pytest.mark.parametrize("name", ["mha", "swa"])
@pytest.mark.parametrize(("writing", "reading"), [(1, 2), (2, 1)])
def test_ranks_of_another_engine_restore_what_they_hold_of_each_page(
    writing: int, reading: int, name: str, nursery: Nursery, direct: Store
) -> None:
    tokens = prompt(Family(name, 16))
    for ranks_of_it in (writing, reading):
        family = Family(name, 16, ranks=ranks_of_it)
        with nursery.ranks(family, direct) as ranks:
            if ranks_of_it == writing:
                converse(ranks, family)
            else:
                assert ranks.call("restore", tokens) == whole(family, PAGES)


def stored_only(ranks: Any, family: Family) -> None:
    """A conversation that is in the tiers, and nowhere else."""
    converse(ranks, family)
    ranks.call("forget")


def test_only_what_the_device_lacks_is_loaded(nursery: Nursery, direct: Store) -> None:
    family = Family("mha", 16, ranks=2)
    with nursery.ranks(family, direct) as ranks:
        stored_only(ranks, family)
        assert ranks.call("restore", prompt(family, ENDS[0])) == whole(family, ENDS[0])
        rest = PAGES - ENDS[0]
        assert ranks.call("restore", prompt(family)) == whole(family, PAGES, of_store=rest)


def test_another_prompt_gets_the_pages_it_shares_and_no_others(
    nursery: Nursery, direct: Store
) -> None:
    family = Family("mha", 16)
    with nursery.ranks(family, direct) as ranks:
        stored_only(ranks, family)
        tokens = prompt(family, 9) + prompt(family, 4, first=9000)
        assert ranks.call("restore", tokens) == whole(family, 9)
        assert ranks.call("prefetch", prompt(family, first=9000)) == [0]


# --- pages that only one rank has ---


@pytest.mark.parametrize("name", ["mha", "swa"])
def test_ranks_agree_on_the_shorter_prefix(name: str, nursery: Nursery, direct: Store) -> None:
    family = Family(name, 16, ranks=2)
    tokens = prompt(family)
    with nursery.ranks(family, direct) as ranks:
        stored_only(ranks, family)
        ranks.only(0, "remove", "kv", tokens, list(range(14, PAGES)))
        ranks.only(1, "remove", "kv", tokens, list(range(11, PAGES)))
        assert ranks.call("restore", tokens) == whole(family, 11)


@pytest.mark.parametrize(
    ("name", "lacking", "legal"),
    [
        # Rank 0 may stop at 6 and 10, rank 1 at 6 and 16: the shorter of their longest would be 10.
        ("mamba", ([15], [9]), 6),
        # Two pages of window: rank 0 may not stop at 16, rank 1 not at 14 and 15.
        ("swa", ([15], [13]), 13),
    ],
)
def test_ranks_agree_on_a_prefix_that_both_may_stop_at(
    name: str, lacking: tuple[list[int], list[int]], legal: int, nursery: Nursery, direct: Store
) -> None:
    family = Family(name, 16, ranks=2)
    tokens = prompt(family)
    with nursery.ranks(family, direct) as ranks:
        stored_only(ranks, family)
        for rank, pages in enumerate(lacking):
            ranks.only(rank, "remove", name, tokens, pages)
        assert ranks.call("restore", tokens) == whole(family, legal)


# --- what goes wrong ---


def test_a_tier_that_fails_is_a_miss(nursery: Nursery, direct: Store) -> None:
    family = Family("mha", 16, ranks=2)
    tokens = prompt(family)
    with nursery.ranks(family, direct) as ranks:
        stored_only(ranks, family)
        ranks.only(1, "break_reads")
        assert ranks.call("prefetch", tokens) == [0, 0]
        assert ranks.only(1, "faults")["cpu.io"] > 0


def test_what_was_promised_is_loaded_though_no_tier_delivers_any_more(
    nursery: Nursery, direct: Store
) -> None:
    family = Family("mha", 16)
    tokens = prompt(family)
    with nursery.ranks(family, direct) as ranks:
        stored_only(ranks, family)
        assert ranks.call("prefetch", tokens) == [PAGES * 16]
        ranks.call("break_reads")
        assert ranks.call("load_back", tokens) == [each[1:] for each in whole(family, PAGES)]


def test_a_load_of_damaged_memory_fails_on_all_ranks_and_what_is_stored_is_loaded_after(
    nursery: Nursery, direct: Store
) -> None:
    family = Family("mha", 16, ranks=2)
    tokens = prompt(family)
    with nursery.ranks(family, direct) as ranks:
        stored_only(ranks, family)
        assert ranks.call("prefetch", tokens) == [PAGES * 16] * 2
        answers = ranks.ask([["load_back", [tokens]], ["load_back", [tokens, True]]])
        assert answers == [False, False]
        assert ranks.only(1, "faults") == {"landing.corrupt": 1}
        assert ranks.only(0, "faults") == {}
        assert ranks.call("restore", tokens) == whole(family, PAGES)


def test_replaced_weights_find_nothing_of_the_old_ones_and_leave_nothing_to_others(
    nursery: Nursery, direct: Store
) -> None:
    family = Family("mha", 16, ranks=2)
    tokens, others = prompt(family), prompt(family, first=9000)
    with nursery.ranks(family, direct) as ranks:
        stored_only(ranks, family)
        assert ranks.call("prefetch", tokens) == [PAGES * 16] * 2  # has landed, too
        ranks.call("replace_weights")
        assert ranks.call("prefetch", tokens) == [0, 0]
        ranks.call("write", others)
        ranks.call("forget")
        assert ranks.call("restore", others) == whole(family, PAGES)
    with nursery.ranks(family, direct) as anew:
        assert anew.call("prefetch", others) == [0, 0]
        assert anew.call("restore", tokens) == whole(family, PAGES)


def test_a_clear_forgets_what_is_stored_and_what_has_landed(
    nursery: Nursery, direct: Store
) -> None:
    family = Family("swa", 16, ranks=2)
    tokens = prompt(family)
    with nursery.ranks(family, direct) as ranks:
        stored_only(ranks, family)
        assert ranks.call("prefetch", tokens) == [PAGES * 16] * 2
        assert ranks.call("clear") == [True, True]
        for pool in POOLS["swa"]:
            assert ranks.call("stored", pool, tokens) == [[False] * PAGES] * 2
        assert ranks.call("prefetch", tokens) == [0, 0]
        converse(ranks, family)
        ranks.call("forget")
        assert ranks.call("restore", tokens) == whole(family, PAGES)


def test_a_linker_that_is_closed_twice_has_written_everything(
    nursery: Nursery, direct: Store
) -> None:
    family = Family("swa", 16)
    with nursery.ranks(family, direct) as ranks:
        converse(ranks, family)
        ranks.call("close")
        # and once more at the end of the block
    shutil.rmtree(direct["cpu"]["path"])
    with nursery.ranks(family, direct) as anew:
        assert anew.call("restore", prompt(family)) == whole(family, PAGES)


# --- leases ---


@pytest.mark.parametrize("cancel", [True, False])
def test_a_load_that_is_cancelled_or_reset_leaves_no_lease(
    cancel: bool, nursery: Nursery, direct: Store
) -> None:
    family = Family("swa", 16)
    tokens = prompt(family)
    with nursery.ranks(family, direct) as ranks:
        stored_only(ranks, family)
        ranks.call("prefetch", tokens)
        (leases,) = ranks.call("load_from", tokens, cancel)
        assert leases["promised"] >= leases["queued"] > 0
        assert leases["left"] == 0
        ranks.call("reset")
        assert ranks.call("count_leases") == [0]


@pytest.mark.parametrize("name", ["mha", "swa"])
def test_requests_that_are_admitted_without_a_load_leave_nothing(
    name: str, nursery: Nursery, direct: Store
) -> None:
    family = Family(name, 16, ranks=2)
    with nursery.ranks(family, direct) as ranks:
        stored_only(ranks, family)
        nothing = {"leases": 0, "requests": 0, "markers": 0}
        assert ranks.call("admit_together", prompt(family), 4) == [nothing] * 2


def test_a_request_waits_again_whose_prefix_the_device_has_lost(
    nursery: Nursery, direct: Store
) -> None:
    family = Family("mha", 16, ranks=2)
    with nursery.ranks(family, direct) as ranks:
        stored_only(ranks, family)
        part = prompt(family, ENDS[0])
        assert ranks.call("restore", part) == whole(family, ENDS[0])
        ranks.call("unland")
        answer = [0, True, PAGES * 16, False, 0]
        assert ranks.call("lose_what_the_device_had", prompt(family)) == [answer] * 2


# --- writing ---


def test_what_is_stored_is_not_stored_again(nursery: Nursery, direct: Store) -> None:
    """SGLang offloads a prefix that was just loaded as soon as its request inserts it."""
    family = Family("mha", 16)
    tokens = prompt(family)
    with nursery.ranks(family, direct) as ranks:
        stored_only(ranks, family)
        assert ranks.call("writes")[0]["pages"] == PAGES
        assert ranks.call("restore", tokens) == whole(family, PAGES)
        assert ranks.call("writes")[0]["pages"] == PAGES
        ranks.call("remove", "kv", tokens, [3, 7, 8])
        ranks.call("forget")
        assert ranks.call("write", tokens) == [0]
        assert ranks.call("writes")[0]["pages"] == PAGES + 3
        ranks.call("forget")
        assert ranks.call("restore", tokens) == whole(family, PAGES)


def test_each_page_knows_the_one_before_it(nursery: Nursery, direct: Store) -> None:
    family = Family("mha", 16)
    with nursery.ranks(family, direct) as ranks:
        converse(ranks, family)
        hashes = ranks.call("hashes", prompt(family))[0]
        (writes,) = ranks.call("writes")
        assert writes["positions"] == [0, *ENDS[:-1]]
        assert writes["parents"] == ["", *(hashes[end - 1] for end in ENDS[:-1])]


def test_latent_pages_are_stored_by_the_first_rank_alone(nursery: Nursery, direct: Store) -> None:
    family = Family("mla", 16, ranks=2)
    with nursery.ranks(family, direct) as ranks:
        converse(ranks, family)
        assert [each["pages"] for each in ranks.call("writes")] == [PAGES, 0]
