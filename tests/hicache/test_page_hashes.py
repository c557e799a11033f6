"""The hashes of pages are those that SGLang makes: else two engines would miss all of each other's pages."""

from __future__ import annotations

import random

import pytest

from lmcache_sglang.hicache.page_hashes import page_hashes, seed

TEXT = [7, 0, 511, 2**31, 2**32 - 1, 12, 99, 100, 101]
# SGLang 0.5.23's own, for environments that it is not in.
OF_PAGES_OF_4 = [
    "97389b631823f8418465ac9276d36843e3401b9e24da541e47169dae4132c511",
    "29356f7154e57252a566c4276552b35d4db2bd73b9c7beb56282915d4b9d7330",
]
OF_A_SALT = "5f13418525dab1622c2b874506d1bf6212302e5a74c5f5c7da8af1e791496ad5"
OF_AN_ADAPTER_AND_A_SALT = "c8c5acd517d9109ddf84843ef6f4603af6c4fe55b093a70ed9de8e7ee5769282"


def test_known_hashes() -> None:
    assert [each.hex() for each in page_hashes(TEXT, 4)] == OF_PAGES_OF_4
    assert seed(None, "tenant").hex() == OF_A_SALT
    assert seed("a", "b").hex() == OF_AN_ADAPTER_AND_A_SALT


@pytest.mark.parametrize("adapter", [None, "", "a", "é" * 40])
@pytest.mark.parametrize("salt", [None, "", "b", "a"])
def test_sglangs_own(adapter: str | None, salt: str | None) -> None:
    utils = pytest.importorskip("sglang.srt.mem_cache.utils")
    prior = utils.storage_namespace_seed(adapter, salt or None)  # as its requests have it
    assert seed(adapter, salt).hex() == (prior or "")
    rng = random.Random(f"{adapter} {salt}")
    for page_size in (1, 16, 64):
        tokens = [rng.randrange(2**32) for _ in range(4 * page_size)]
        expected = utils.get_hash_str(tokens, prior, page_size)
        found = page_hashes(tokens, page_size, seed(adapter, salt))
        assert [each.hex() for each in found] == expected


def test_a_chain_goes_on_where_it_was_left() -> None:
    whole = page_hashes(TEXT, 2, b"before")
    first = page_hashes(TEXT[:4], 2, b"before")
    assert whole == first + page_hashes(TEXT[4:], 2, first[-1])
    assert len(whole) == len(TEXT) // 2


def test_no_page_no_hash() -> None:
    assert page_hashes([], 4) == page_hashes([1, 2, 3], 4) == []


@pytest.mark.parametrize("token", [-1, 2**32])
def test_other_token_ids_are_refused(token: int) -> None:
    with pytest.raises(OverflowError):
        page_hashes([token], 1)
