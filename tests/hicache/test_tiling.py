"""Which sets of other kinds of page fill a rank's rectangle, and why the rest does not."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from lmcache_sglang.hicache.form import PageForm, Untileable, overlap
from lmcache_sglang.hicache.identity import ModelIdentity, PageIdentity, namespace
from lmcache_sglang.hicache.kind import Kind
from lmcache_sglang.hicache.tiling import MOST_COVERS, Tiling, tiling

MODEL = ModelIdentity(name="m", fingerprint="f", kv_dtype="auto", settings={"dtype": "bfloat16"})
HEADS, LAYERS = 8, 8
ROW = 2 * 16 * 2  # bytes of K and V of a token, for one head in one layer


def kind(
    heads: tuple[int, int] = (0, HEADS),
    layers: tuple[int, int] = (0, LAYERS),
    model: ModelIdentity = MODEL,
    **changed: Any,
) -> Kind:
    cells = (heads[1] - heads[0]) * (layers[1] - layers[0])
    page = PageIdentity(
        pool="kv",
        page_size=4,
        page_bytes=4 * cells * ROW,
        dtype="bfloat16",
        layers=layers,
        stored_layers=layers[1] - layers[0],
        heads=heads,
        total_heads=HEADS,
        head_dims=(16, 16),
        layout="page_first",
        slices={},
    )
    page = msgspec.structs.replace(page, **changed)
    return Kind(namespace(model, page), model, page)


def ranks(tp: int, layers: tuple[int, int] = (0, LAYERS), **changed: Any) -> list[Kind]:
    width = HEADS // tp
    return [kind((rank * width, (rank + 1) * width), layers, **changed) for rank in range(tp)]


def covers(mine: Kind, others: list[Kind]) -> list[set[tuple[Any, Any]]]:
    found = tiling(mine, others).covers
    return [{(piece.form.layers, piece.form.heads) for piece in cover} for cover in found]


def test_a_pair_fills_the_whole() -> None:
    assert covers(kind(), ranks(2)) == [{((0, 8), (0, 4)), ((0, 8), (4, 8))}]


def test_the_whole_fills_a_part() -> None:
    assert covers(ranks(4)[1], [kind()]) == [{((0, 8), (0, 8))}]


def test_only_the_pieces_that_are_needed_are_in_a_cover() -> None:
    assert covers(ranks(2)[0], ranks(4)) == [{((0, 8), (0, 2)), ((0, 8), (2, 4))}]


def test_the_fewest_pieces_come_first() -> None:
    sizes = [len(cover) for cover in covers(kind(), [*ranks(8), *ranks(2), *ranks(4)])]
    assert sizes == [2, 4, 8]


def test_stages_and_ranks_fill_the_whole_together() -> None:
    others = [*ranks(2, (0, 3)), *ranks(2, (3, 8))]
    assert covers(kind(), others) == [
        {((0, 3), (0, 4)), ((0, 3), (4, 8)), ((3, 8), (0, 4)), ((3, 8), (4, 8))}
    ]


def test_pieces_of_two_topologies_fill_what_neither_does() -> None:
    left, _ = ranks(2)
    *_, third, fourth = ranks(4)
    assert covers(kind(), [left, third, fourth])[0] == {
        ((0, 8), (0, 4)),
        ((0, 8), (4, 6)),
        ((0, 8), (6, 8)),
    }


def test_a_kind_is_no_piece_of_its_own_pages() -> None:
    assert tiling(kind(), [kind()]) == Tiling()


def test_what_fills_nothing_says_what_is_missing() -> None:
    left, _ = ranks(2)
    found = tiling(kind(), [left])
    assert found.covers == ()
    assert found.apart[left.namespace] == (
        "of its topology only layers 0-7 of heads 0-3 was ever stored"
    )


def test_another_rank_of_the_own_topology_is_neither_a_piece_nor_apart() -> None:
    left, right = ranks(2)
    assert tiling(left, [right]) == Tiling()


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (kind(page_size=8), "page_size 8, here 4"),
        (kind(dtype="float16"), "dtype float16, here bfloat16"),
        (kind(head_dims=(8, 24)), "head_dims (8, 24), here (16, 16)"),
        (kind(slices={"dcp_rank": 0}), "slices {'dcp_rank': 0}, here {}"),
        (kind(layout="page_first_kv_split"), "layout page_first_kv_split"),
        (kind(stored_layers=4), "4 of the layers (0, 8) are in it"),
        (
            kind(model=msgspec.structs.replace(MODEL, fingerprint="g")),
            "another fingerprint of the weights",
        ),
        (
            kind(model=msgspec.structs.replace(MODEL, settings={"quantization": "fp8"})),
            "another dtype, quantization",
        ),
        (kind(model=msgspec.structs.replace(MODEL, kv_dtype="fp8")), "another kv_cache_dtype"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_a_piece_says_why(other: Kind, why: str) -> None:
    found = tiling(kind((0, 4)), [other])
    assert found.covers == ()
    assert found.apart == {other.namespace: why}


@pytest.mark.parametrize(
    "other",
    [kind(pool="swa"), kind(model=msgspec.structs.replace(MODEL, name="another"))],
    ids=["pool", "name"],
)
def test_other_models_and_pools_are_nobodys_business(other: Kind) -> None:
    assert tiling(kind((0, 4)), [other]) == Tiling()


def test_there_are_not_more_covers_than_a_lookup_may_cost() -> None:
    others = [
        piece
        for cut in range(1, LAYERS)
        for tp in (1, 2)
        for piece in [*ranks(tp, (0, cut)), *ranks(tp, (cut, LAYERS))]
    ]
    assert len(tiling(kind(), others).covers) == MOST_COVERS


@pytest.mark.parametrize(
    "changed",
    [
        {"page_bytes": 4 * 64 * ROW + 1},
        {"page_bytes": 4 * 64, "head_dims": (16, 16)},
        {"shape": {"row_bytes": "96"}},
        {"layers": (4, 4)},
        {"dtype": "uint8"},  # rows twice as long: K alone, of two bytes, say
        {"head_dims": (32, 0)},
        {"head_dims": (0, 0)},
    ],
    ids=str,
)
def test_a_page_that_is_no_rectangle_of_rows_has_no_form(changed: dict[str, Any]) -> None:
    with pytest.raises(Untileable):
        PageForm.of(kind(**changed).page)


def test_ranges_that_do_not_meet_share_nothing() -> None:
    assert overlap((0, 4), (2, 8)) == (2, 4)
    start, end = overlap((0, 2), (4, 8))
    assert start == end
