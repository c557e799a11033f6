"""A pool of SGLang, described: ranks that hold the same bytes share pages, all others do not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from lmcache_sglang.hicache.identity import PageIdentity
from lmcache_sglang.hicache.pools import describe, logical_page_size, page_bytes, segments

PAGE_SIZE = 4
RUN = 32  # bytes of each of the two runs of a page


@dataclass
class Pool:
    """As an MHA pool of SGLang: two runs a page, one after the other in a made-up address space."""

    page_size: int = PAGE_SIZE
    layout: str = "page_first"
    dtype: torch.dtype = torch.bfloat16
    start_layer: int = 0
    end_layer: int = 8
    layer_num: int = 8
    dcp_size: int = 1
    head_num: int = 2
    head_dim: int = 64

    def get_page_buffer_meta(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
        starts = indices.tolist()[:: logical_page_size(self)]
        addresses = [start * 100 + at for start in starts for at in (1, 2)]
        return addresses, [RUN] * len(addresses)


@dataclass
class MLAPool(Pool):
    kv_lora_rank: int = 512
    qk_rope_head_dim: int = 64


@dataclass
class Sharding:
    """The fields of SGLang's `HiCacheStorageConfig` that place a rank."""

    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    attn_cp_rank: int = 0
    attn_cp_size: int = 1
    dp_rank: int = 0
    dcp_rank: int = 0
    dcp_size: int = 1
    is_mla_model: bool = False


def described(pool: Pool | None = None, **sharding: Any) -> PageIdentity:
    return describe(pool or Pool(), "kv", Sharding(**sharding), 64)


@pytest.mark.parametrize("pages", [0, 1, 3])
def test_a_page_is_its_runs_in_order(pages: int) -> None:
    found = segments(Pool(), torch.arange(PAGE_SIZE * pages))
    assert len(found) == pages
    assert found.per_page == (2 if pages else 1)
    assert list(found.addresses) == [
        page * PAGE_SIZE * 100 + at for page in range(pages) for at in (1, 2)
    ]


def test_the_pool_outlives_the_addresses_into_it() -> None:
    pool = Pool()
    assert segments(pool, torch.arange(PAGE_SIZE)).owner is pool


def test_the_size_of_a_page_is_that_of_all_its_runs() -> None:
    assert page_bytes(Pool(), torch.arange(PAGE_SIZE)) == 2 * RUN


def test_a_page_shared_by_context_parallel_ranks_is_counted_once() -> None:
    pool = Pool(dcp_size=2)
    assert logical_page_size(pool) == 2 * PAGE_SIZE
    assert len(segments(pool, torch.arange(2 * PAGE_SIZE))) == 1
    assert described(pool).page_size == 2 * PAGE_SIZE


def test_the_same_heads_of_two_topologies_with_the_same_total_differ_from_others() -> None:
    """Rank 1 of 2 holds heads 2 and 3 of 4, rank 1 of 4 holds head 1 of 4."""
    of_two = described(Pool(head_num=2), tp_rank=1, tp_size=2)
    of_four = described(Pool(head_num=1), tp_rank=1, tp_size=4)
    assert of_two.heads == (2, 4)
    assert of_four.heads == (1, 2)
    assert of_two.total_heads == of_four.total_heads == 4


def test_repeated_heads_do_not_pass_for_others() -> None:
    """With 2 KV heads, rank 1 of 2 holds head 1 and rank 1 of 4 holds head 0, both as (1, 2)."""
    of_two = described(Pool(head_num=1), tp_rank=1, tp_size=2)
    of_four = described(Pool(head_num=1), tp_rank=1, tp_size=4)
    assert of_two.heads == of_four.heads
    assert of_two != of_four


def test_no_two_ranks_of_a_head_sharded_model_share_pages() -> None:
    ranks = [described(tp_rank=rank, tp_size=4) for rank in range(4)]
    assert len({str(rank) for rank in ranks}) == 4


def test_every_rank_of_an_mla_model_shares_pages() -> None:
    one = described(MLAPool(), is_mla_model=True)
    for rank in range(4):
        assert described(MLAPool(), is_mla_model=True, tp_rank=rank, tp_size=4) == one


@pytest.mark.parametrize("who", ["dp_rank", "pp_rank", "pp_size"])
def test_who_wrote_a_page_does_not_matter(who: str) -> None:
    second = Pool(start_layer=8, end_layer=16)
    assert described(second, **{who: 1}) == described(second)


def test_a_later_stage_that_counts_its_layers_from_0_is_not_taken_for_the_first() -> None:
    first, later = (described(Pool(), pp_rank=rank, pp_size=2) for rank in (0, 1))
    assert first == described()
    assert later != first
    assert later.slices == {"pp_rank": 1, "pp_size": 2}


def test_pipeline_stages_are_told_apart_by_their_layers() -> None:
    assert described(Pool(start_layer=8, end_layer=16)) != described()


@pytest.mark.parametrize("kind", ["attn_cp", "dcp"])
def test_context_parallel_ranks_hold_different_tokens_of_a_page(kind: str) -> None:
    def rank(number: int, of: int) -> PageIdentity:
        return described(Pool(), **{f"{kind}_rank": number, f"{kind}_size": of})

    assert len({str(page) for page in (rank(0, 1), rank(0, 2), rank(1, 2), rank(1, 4))}) == 4


@pytest.mark.parametrize(
    "other",
    [
        Pool(page_size=8),
        Pool(layout="layer_first"),
        Pool(dtype=torch.float16),
        Pool(dtype=torch.float8_e4m3fn),
        Pool(end_layer=6),
        Pool(layer_num=9),
        Pool(head_num=4),
        Pool(head_dim=128),
    ],
    ids=repr,
)
def test_another_geometry_is_another_page(other: Pool) -> None:
    assert described(other) != described()


def test_the_two_widths_of_a_page_are_told_apart() -> None:
    @dataclass
    class Asymmetric(Pool):
        v_head_dim: int = 32

    assert described(Asymmetric()).head_dims == (64, 32)
    assert described(Asymmetric(head_dim=32, v_head_dim=64)).head_dims == (32, 64)
    assert described().head_dims == (64, 64)
    assert described(MLAPool(), is_mla_model=True).head_dims == (512, 64)


def test_the_names_of_types_are_those_of_torch_without_its_prefix() -> None:
    assert described().dtype == "bfloat16"
