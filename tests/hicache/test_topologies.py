"""Engines of other topologies and layouts on one store: a rank reads what it can put its pages together from."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch

from tests.hicache.test_backend import indices, page_hashes

if TYPE_CHECKING:
    from lmcache_sglang.hicache.backend import LMCacheBackend

PAGES = 3
PAGE_SIZE = 4
HEADS = 4
LAYERS = 4
LAYOUTS = ("page_first", "page_first_direct", "page_head", "layer_first")
SLOTS = [5, 1, 4]  # where in a pool the pages are

MakePool = Callable[..., Any]


class Topology(NamedTuple):
    """Of an engine: ranks of tensor parallelism, the layers of each pipeline stage, and the layouts."""

    tp: int = 1
    stages: tuple[int, ...] = (LAYERS,)
    layout: str = "page_first"
    kind: str = "mha"
    heads: int = HEADS
    order: str = "nhd"  # on the device

    def ranks(self) -> Iterator[tuple[int, tuple[int, int]]]:
        first = 0
        for layers in self.stages:
            yield from ((rank, (first, first + layers)) for rank in range(self.tp))
            first += layers


def value(token: int, layer: int, head: int, part: int) -> float:
    """What every engine computes there; no two places have the same."""
    return float(((token * LAYERS + layer) * HEADS + head) * 2 + part + 1)


class Rank:
    """One rank of an engine: its pool and its backend."""

    def __init__(
        self,
        topology: Topology,
        rank: int,
        layers: tuple[int, int],
        make_pool: MakePool,
        backends: Any,
        beside: LMCacheBackend | None,
    ) -> None:
        self.layout = topology.layout
        self.layers = layers
        self.is_mla = topology.kind == "mla"
        held = 1 if self.is_mla else max(1, topology.heads // topology.tp)
        first = rank * topology.heads // topology.tp
        self.heads = range(first, first + held)
        self.pool = make_pool(
            f"{topology.kind} {topology.layout}",
            page_size=PAGE_SIZE,
            heads=held,
            layers=layers,
            dtype=torch.float32,
            order=topology.order,
        )
        self.backend = backends.open(
            self.pool,
            beside=beside,
            kv_heads=topology.heads,
            is_mla_model=self.is_mla,
            tp_rank=rank,
            tp_size=topology.tp,
        )

    def fill(self) -> None:
        for places, number in self._rows():
            places.fill_(number)

    def wipe(self) -> None:
        for tensor in self._tensors():
            tensor.fill_(-1)

    def wrong(self, pages: range = range(PAGES)) -> int:
        """Rows of some pages that do not have what the engine computes there."""
        return sum(not torch.all(places == number).item() for places, number in self._rows(pages))

    def untouched(self, pages: range = range(PAGES)) -> bool:
        return all(torch.all(places == -1).item() for places, _ in self._rows(pages))

    def _rows(self, pages: range = range(PAGES)) -> Iterator[tuple[torch.Tensor, float]]:
        """Each row of K and V of some pages, found by SGLang's own shapes, and what belongs there."""
        for page in pages:
            for token in range(PAGE_SIZE):
                for layer in range(*self.layers):
                    for head in (0,) if self.is_mla else self.heads:
                        for part in (0,) if self.is_mla else (0, 1):
                            where = self._row(part, SLOTS[page], token, layer, head)
                            yield where, value(page * PAGE_SIZE + token, layer, head, part)

    def _row(self, part: int, page: int, token: int, layer: int, head: int) -> torch.Tensor:
        layer -= self.layers[0]
        head -= 0 if self.is_mla else self.heads[0]
        of = self._tensors()[part]
        place: dict[str, tuple[int, ...]] = {
            "page_first": (page * PAGE_SIZE + token, layer, head),
            "page_first_direct": (page, layer, token, head),
            "page_head": (page, head, token, layer),
            "layer_first": (layer, page * PAGE_SIZE + token, head),
        }
        return of[place[self.layout]]

    def _tensors(self) -> list[torch.Tensor]:
        if self.is_mla:
            return [self.pool.kv_buffer]
        return [self.pool.k_buffer, self.pool.v_buffer]

    def put(self, keys: list[str]) -> list[bool]:
        kept: list[bool] = self.backend.batch_set_v1(keys, self._places(keys))
        return kept

    def get(self, keys: list[str]) -> list[bool]:
        self.wipe()
        held: list[bool] = self.backend.batch_get_v1(keys, self._places(keys))
        return held

    def _places(self, keys: list[str]) -> torch.Tensor:
        places: torch.Tensor = indices(self.pool, SLOTS[: len(keys)])
        return places


Start = Callable[[Topology], list[Rank]]


@pytest.fixture(autouse=True)
def always_looking(sglang: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmcache_sglang.hicache.namespaces.LOOK_EVERY_SECONDS", 0.0)


@pytest.fixture
def start(make_pool: MakePool, backends: Any) -> Start:
    """Starts the ranks of an engine on the one store of the test."""
    ranks: list[Rank] = []

    def started(topology: Topology) -> list[Rank]:
        made = []
        for rank, layers in topology.ranks():
            beside = ranks[0].backend if ranks else None
            made.append(Rank(topology, rank, layers, make_pool, backends, beside))
            ranks.append(made[-1])
        return made

    return started


def stored_by(engine: list[Rank], keys: list[str]) -> None:
    for rank in engine:
        rank.fill()
        assert rank.put(keys) == [True] * len(keys)


def pairs() -> list[tuple[Topology, Topology]]:
    """Every tensor-parallel size with every other, and stages and layouts at random."""
    draw = random.Random(4)
    plain = [(Topology(a), Topology(b)) for a in (1, 2, 4) for b in (1, 2, 4) if a != b]
    layouts = [(Topology(layout=a), Topology(layout=b)) for a in LAYOUTS for b in LAYOUTS if a != b]
    stages = ((4,), (2, 2), (1, 3), (1, 2, 1))

    def drawn(kind: str) -> Topology:
        layout = draw.choice(LAYOUTS if kind != "mla" else [*LAYOUTS[:2], LAYOUTS[3]])
        return Topology(draw.choice((1, 2, 4)), draw.choice(stages), layout, kind)

    mixed = [(drawn(kind), drawn(kind)) for kind in ["mha"] * 12 + ["mla"] * 6]
    return [*plain, *layouts, *mixed]


@pytest.mark.parametrize(("writer", "reader"), pairs(), ids=str)
def test_a_page_of_one_topology_is_whole_in_another(
    writer: Topology, reader: Topology, start: Start
) -> None:
    keys = page_hashes(PAGES)
    stored_by(start(writer), keys)
    for rank in start(reader):
        assert rank.backend.batch_exists(keys) == PAGES
        assert rank.get(keys) == [True] * PAGES
        assert rank.wrong() == 0


@pytest.mark.parametrize("layout", ["page_first", "page_first_direct"])
@pytest.mark.parametrize("order", ["hnd", "vectorized_5d"])
def test_pages_that_the_device_orders_otherwise_are_neither_shared_nor_taken_apart(
    order: str, layout: str, start: Start
) -> None:
    """SGLang brings them to the host as they are, and calls the host pool's layout the same."""
    keys, usual = page_hashes(PAGES), Topology(layout=layout)
    ordered = usual._replace(order=order)
    stored_by(start(ordered), keys)
    found = [
        [rank.backend.batch_exists(keys) for rank in start(topology)]
        for topology in (usual, ordered._replace(tp=2), ordered)
    ]
    assert found == [[0], [0, 0], [PAGES]]


def test_pages_that_an_npu_holds_in_blocks_of_tokens_are_those_of_others(start: Start) -> None:
    keys = page_hashes(PAGES)
    stored_by(start(Topology(order="paged_nhd")), keys)
    for rank in start(Topology(tp=2)):
        assert rank.get(keys) == [True] * PAGES
        assert rank.wrong() == 0


@pytest.mark.parametrize(("writer", "reader"), [(1, 2), (2, 1)])
def test_the_pools_of_a_model_with_sliding_windows_are_read_across_topologies(
    writer: int, reader: int, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang gives such a pool its last layer for the end, and every other one the layer after it."""
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

    windowed = SWAKVPool(
        size=64,
        size_swa=64,
        page_size=PAGE_SIZE,
        dtype=torch.float32,
        head_num=HEADS,
        head_dim=8,
        swa_attention_layer_ids=[4, 5],
        full_attention_layer_ids=list(range(LAYERS)),
        device="cpu",
    )
    device = windowed.full_kv_pool
    assert (device.start_layer, device.layer_num) == (0, LAYERS)
    monkeypatch.setattr("tests.hicache.conftest.END", device.end_layer - LAYERS)
    keys = page_hashes(PAGES)
    stored_by(start(Topology(writer)), keys)
    for rank in start(Topology(reader)):
        assert rank.pool.end_layer == device.end_layer
        assert rank.backend.batch_exists(keys) == PAGES
        assert rank.get(keys) == [True] * PAGES
        assert rank.wrong() == 0


def test_pages_of_an_unknown_kind_of_pool_are_not_taken_apart(
    make_pool: MakePool, backends: Any
) -> None:
    """Nobody knows what lies in them; the same kind under the same topology reads them."""
    pool = make_pool("mha page_first", heads=2)
    pool.__class__ = type("Odd", (pool.__class__,), {})
    backend = backends.open(pool)
    assert backend.pools[_kv()].identity.shape == {"class": "Odd"}
    assert backend.batch_set_v1(page_hashes(2), indices(pool, [0, 1])) == [True, True]
    half = make_pool("mha page_first", heads=1)
    half.__class__ = pool.__class__
    other = backends.open(half, beside=backend, tp_size=2, kv_heads=2)
    assert other.batch_exists(page_hashes(2)) == 0
    assert other.reasons() == {"kinds.state that is no plain K and V": 1}


def test_the_rows_of_this_file_are_told_apart(start: Start) -> None:
    """Else the test above could not fail."""
    (one,) = start(Topology())
    one.wipe()
    assert one.untouched()
    assert one.wrong() == PAGES * PAGE_SIZE * LAYERS * HEADS * 2
    one.fill()
    assert one.wrong() == 0
    assert not one.untouched(range(1))


@pytest.mark.parametrize(("tp", "rank", "of_two"), [(4, 0, 0), (4, 1, 0), (4, 2, 1), (4, 3, 1)])
def test_ranks_that_repeat_a_head_share_its_pages(
    tp: int, rank: int, of_two: int, start: Start
) -> None:
    """Two KV heads on four ranks: SGLang gives ranks 0 and 1 the first."""
    keys = page_hashes(PAGES)
    stored_by(start(Topology(2, heads=2)), keys)
    reader = start(Topology(tp, heads=2))[rank]
    assert reader.get(keys) == [True] * PAGES
    assert reader.wrong() == 0
    assert reader.heads[0] == of_two


@pytest.mark.parametrize("reader", [Topology(1), Topology(1, layout="layer_first")], ids=str)
def test_a_page_with_a_piece_missing_is_a_miss(reader: Topology, start: Start) -> None:
    keys = page_hashes(PAGES)
    left, right = start(Topology(2))
    stored_by([left], keys)
    stored_by([right], keys[:1])
    (one,) = start(reader)
    assert one.backend.batch_exists(keys) == 1
    assert one.backend.reasons() == {"pieces.missing": PAGES - 1}
    assert one.get(keys) == [True, False, False]
    assert one.wrong(range(1)) == 0
    assert one.untouched(range(1, PAGES))


def test_a_page_whose_piece_has_gone_is_a_miss(start: Start) -> None:
    keys = page_hashes(PAGES)
    writers = start(Topology(2))
    stored_by(writers, keys)
    (one,) = start(Topology(1))
    assert one.get(keys) == [True] * PAGES
    chain = one.backend._chain
    space = writers[1].backend.pools[_kv()].namespace
    for tier in chain.tiers:
        tier.remove([space + bytes.fromhex(keys[1])])
    assert one.backend.batch_exists(keys) == 1
    assert one.get(keys) == [True, False, True]
    assert one.wrong(range(1)) == one.wrong(range(2, 3)) == 0


def test_own_pages_and_those_of_others_make_one_prefix(start: Start) -> None:
    keys = page_hashes(PAGES)
    (one,) = start(Topology(1))
    stored_by([one], keys[:2])
    pair = start(Topology(2))
    stored_by(pair, keys)
    assert one.backend.batch_exists(keys) == PAGES
    assert one.get(keys) == [True] * PAGES
    assert one.wrong() == 0


def test_what_others_begin_to_store_later_is_found(start: Start) -> None:
    keys = page_hashes(PAGES)
    (one,) = start(Topology(1))
    assert one.backend.batch_exists(keys) == 0
    stored_by(start(Topology(2)), keys)
    assert one.backend.batch_exists(keys) == PAGES


def test_pieces_are_looked_for_where_a_page_is_missing_and_no_further(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt of 250,000 tokens that nobody stored must not cost a lookup of each page in each topology."""
    monkeypatch.setattr("lmcache_sglang.hicache.lookup.PIECES_AT_ONCE", 2)
    keys = page_hashes(PAGES)
    (one,) = start(Topology(1))
    pair = start(Topology(2))
    stored_by(pair, keys)
    stored_by([one], keys[:1])
    chain = one.backend._chain
    asked: list[int] = []
    holders = chain.holders

    def counted(wanted: list[bytes]) -> Any:
        asked.append(len(wanted))
        return holders(wanted)

    assert one.backend.batch_exists(keys) == PAGES  # it has looked around
    monkeypatch.setattr(chain, "holders", counted)
    assert one.backend.batch_exists(keys) == PAGES
    assert asked == [PAGES, 2 * (PAGES - 1)]
    asked.clear()
    assert one.backend.batch_exists(page_hashes(50, seed="new")) == 0
    assert asked == [50, 2 * 2]
    asked.clear()
    assert one.backend.batch_exists(keys[:1]) == 1
    assert asked == [1]


def test_others_are_not_looked_for_at_each_miss(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmcache_sglang.hicache.namespaces.LOOK_EVERY_SECONDS", 3600.0)
    keys = page_hashes(PAGES)
    (one,) = start(Topology(1))
    looked: list[bool] = []

    def refreshed() -> bool:
        looked.append(True)
        return False

    monkeypatch.setattr(one.backend._namespaces, "refreshed", refreshed)
    for _ in range(3):
        assert one.backend.batch_exists(keys) == 0
        assert one.get(keys) == [False] * PAGES
    assert looked == [True]
    stored_by([one], keys)
    one.backend._namespaces._look_again = float("-inf")
    assert one.backend.batch_exists(keys) == PAGES
    assert looked == [True]  # nothing is missing: nobody else's pages are of use


def test_what_cannot_be_read_is_named_once(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    keys = page_hashes(PAGES)
    left, _ = start(Topology(2))
    stored_by([left], keys)
    (mla,) = start(Topology(1, kind="mla"))
    with caplog.at_level("INFO"):
        for _ in range(2):
            assert mla.backend.batch_exists(keys) == 0
    assert (
        caplog.text.count("head_dims (8, 8), here (16, 8)") == 2
    )  # a line for each rank of the two


def test_weights_replaced_while_serving_find_no_pieces(start: Start) -> None:
    from lmcache_sglang.hicache import weights

    keys = page_hashes(PAGES)
    stored_by(start(Topology(2)), keys)
    (one,) = start(Topology(1))
    assert one.backend.batch_exists(keys) == PAGES
    weights.replaced()
    assert one.backend.batch_exists(keys) == 0
    assert one.get(keys) == [False] * PAGES
    assert one.untouched()


def _kv() -> Any:
    from sglang.srt.mem_cache.hicache_storage import PoolName

    return PoolName.KV
