"""The backend over SGLang's own host pools: a page comes back whole, or it does not come back."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import random
from collections.abc import Callable, Iterator
from threading import Barrier, Thread
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from lmcache_sglang.errors import ConfigError
from lmcache_sglang.hicache.pools import page_bytes, segments
from lmcache_sglang.storage.base import page_key

if TYPE_CHECKING:
    from lmcache_sglang.hicache.backend import LMCacheBackend

# Device pool and host layout: all that SGLang makes on CPU. "wide" has keys wider than values; "dsa"
# has an indexer beside its latent KV.
KINDS = [
    "mha layer_first",
    "mha page_first",
    "mha page_first_direct",
    "mha page_head",
    "wide page_first",
    "wide page_first_direct",
    "mla layer_first",
    "mla page_first",
    "mla page_first_direct",
    "mla page_first_kv_split",
    "dsa page_first_kv_split",
]
USUAL = "mha page_first"
FLUSH_SECONDS = 30.0

MakePool = Callable[..., Any]


def page_hashes(count: int, seed: str = "") -> list[str]:
    """As SGLang gives them: 64 hexadecimal digits."""
    return [hashlib.sha256(f"{seed} {i}".encode()).hexdigest() for i in range(count)]


def indices(pool: Any, slots: list[int]) -> torch.Tensor:
    """The token indices of pages, by their slots in the pool."""
    page = int(pool.page_size)
    starts = torch.tensor(slots, dtype=torch.int64).reshape(-1, 1) * page
    return (starts + torch.arange(page)).flatten()


def buffers(pool: Any) -> list[torch.Tensor]:
    """All memory that holds KV of the pool."""
    if pool.layout == "page_first_kv_split":
        found = [pool.k_buffer, pool.v_buffer, pool.index_k_buffer, pool.index_k_scale_buffer]
        return [buffer for buffer in found if buffer is not None]
    return list(pool.kv_buffer) if isinstance(pool.kv_buffer, tuple) else [pool.kv_buffer]


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def fill(pool: Any, seed: int = 0) -> None:
    """Every byte of the pool at random; NaNs of all kinds are among them."""
    random_bytes = torch.Generator().manual_seed(seed)
    for buffer in buffers(pool):
        as_bytes(buffer).random_(0, 256, generator=random_bytes)


def wipe(pool: Any) -> None:
    for buffer in buffers(pool):
        as_bytes(buffer).zero_()


def is_wiped(pool: Any) -> bool:
    return not any(as_bytes(buffer).any() for buffer in buffers(pool))


def page_views(pool: Any, slot: int) -> list[torch.Tensor]:
    """The tensors that make up a page, by the meaning of the layout and not by addresses."""
    token = slot * pool.page_size
    if pool.layout == "page_first_kv_split" or isinstance(pool.kv_buffer, tuple):
        by_token = pool.layout == "page_first"
        where = slice(token, token + pool.page_size) if by_token else slice(slot, slot + 1)
        return [buffer[where] for buffer in buffers(pool)]
    return [pool.get_data_page(token, flat=False)]


def content(pool: Any, slot: int) -> bytes:
    return b"".join(as_bytes(view).numpy().tobytes() for view in page_views(pool, slot))


def scattered(pool: Any, count: int, seed: int = 7) -> tuple[list[int], list[int]]:
    """Two disjoint sets of slots, each in an order without order."""
    slots = random.Random(seed).sample(range(pool.page_num), 2 * count)
    return slots[:count], slots[count:]


def flush(backend: LMCacheBackend) -> None:
    assert backend._chain.flush(FLUSH_SECONDS)


# --- pages come back ---


@pytest.mark.parametrize("kind", KINDS)
def test_the_addresses_of_a_page_are_its_own_and_no_others(kind: str, make_pool: MakePool) -> None:
    """SGLang's buffer metadata against its own indexing: every element is numbered and seen once."""
    pool = make_pool(kind, dtype=torch.float32)
    numbered = 0
    for buffer in buffers(pool):
        count = buffer.numel()
        numbers = torch.arange(numbered, numbered + count, dtype=torch.int32)
        buffer.view(torch.int32).copy_(numbers.reshape(buffer.shape))
        numbered += count
    seen: list[int] = []
    for slot in range(pool.page_num):
        where = segments(pool, indices(pool, [slot]))
        raw = b"".join(map(ctypes.string_at, where.addresses, where.sizes))
        numbers_there = torch.frombuffer(bytearray(raw), dtype=torch.int32).tolist()
        expected = [
            view.contiguous().view(torch.int32).flatten() for view in page_views(pool, slot)
        ]
        assert sorted(numbers_there) == sorted(torch.cat(expected).tolist())
        seen += numbers_there
    assert sorted(seen) == list(range(numbered))


@pytest.mark.parametrize("pages", [1, 2, 300])
@pytest.mark.parametrize("kind", KINDS)
def test_pages_come_back_whole_to_other_places(
    kind: str, pages: int, make_pool: MakePool, backends: Any
) -> None:
    pool = make_pool(kind, pages=2 * pages + 3)
    source, target = scattered(pool, pages)
    keys = page_hashes(pages)
    fill(pool)
    written = [content(pool, slot) for slot in source]
    assert len(set(written)) == pages  # or a mix-up of pages would pass

    backend = backends.open(pool)
    assert backend.batch_set_v1(keys, indices(pool, source)) == [True] * pages
    wipe(pool)
    assert backend.batch_get_v1(keys, indices(pool, target)) == [True] * pages
    assert [content(pool, slot) for slot in target] == written
    for slot in target:
        for view in page_views(pool, slot):
            view.zero_()
    assert is_wiped(pool)  # nothing was written beside the pages


@pytest.mark.parametrize("kind", KINDS)
def test_pages_outlive_the_backend_that_wrote_them(
    kind: str, make_pool: MakePool, backends: Any
) -> None:
    pool = make_pool(kind)
    source, target = scattered(pool, 3)
    keys = page_hashes(3)
    fill(pool)
    written = [content(pool, slot) for slot in source]
    before = backends.open(pool)
    before.batch_set_v1(keys, indices(pool, source))
    before.close()  # without a flush: closing writes what still waits

    restarted = make_pool(kind)
    wipe(restarted)
    after = backends.open(restarted)
    assert after.batch_exists(keys) == 3
    assert after.batch_get_v1(keys, indices(restarted, target)) == [True] * 3
    assert [content(restarted, slot) for slot in target] == written


def test_pages_come_back_from_the_disk_alone(make_pool: MakePool, backends: Any) -> None:
    pool = make_pool(USUAL)
    fill(pool)
    written = content(pool, 0)
    backend = backends.open(pool, cpu=0)
    keys = page_hashes(1)
    assert backend.batch_set_v1(keys, indices(pool, [0])) == [True]
    wipe(pool)
    assert backend.batch_get_v1(keys, indices(pool, [5])) == [True]
    assert content(pool, 5) == written


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e4m3fn, torch.uint8])
def test_every_element_type_keeps_its_bits(
    dtype: torch.dtype, make_pool: MakePool, backends: Any
) -> None:
    pool = make_pool(USUAL, dtype=dtype)
    fill(pool)
    written = content(pool, 1)
    backend = backends.open(pool)
    backend.batch_set_v1(page_hashes(1), indices(pool, [1]))
    wipe(pool)
    assert backend.batch_get_v1(page_hashes(1), indices(pool, [4])) == [True]
    assert content(pool, 4) == written


def test_a_page_that_is_not_stored_leaves_its_place_untouched(
    make_pool: MakePool, backends: Any
) -> None:
    pool = make_pool(USUAL)
    fill(pool)
    backend = backends.open(pool)
    first, missing, last = page_hashes(3)
    backend.batch_set_v1([first, last], indices(pool, [0, 1]))
    untouched = content(pool, 5)
    held = backend.batch_get_v1([first, missing, last], indices(pool, [4, 5, 6]))
    assert held == [True, False, True]
    assert content(pool, 5) == untouched
    assert (content(pool, 4), content(pool, 6)) == (content(pool, 0), content(pool, 1))


def test_the_memory_of_stored_pages_may_be_used_again_at_once(
    make_pool: MakePool, backends: Any
) -> None:
    """SGLang gives the host pages away when batch_set_v1 returns, written to the disk or not."""
    pool = make_pool(USUAL)
    fill(pool)
    written = content(pool, 0)
    backend = backends.open(pool)
    backend.batch_set_v1(page_hashes(1), indices(pool, [0]))
    fill(pool, seed=1)
    flush(backend)
    backend.close()
    backend = backends.open(pool)
    assert backend.batch_get_v1(page_hashes(1), indices(pool, [3])) == [True]
    assert content(pool, 3) == written


def test_existence_counts_the_first_pages_without_a_gap(make_pool: MakePool, backends: Any) -> None:
    pool = make_pool(USUAL)
    backend = backends.open(pool)
    keys = page_hashes(5)
    assert backend.batch_exists(keys) == 0
    backend.batch_set_v1([keys[i] for i in (0, 1, 3)], indices(pool, [0, 1, 2]))
    assert backend.batch_exists(keys) == 2
    assert backend.batch_exists(keys[1:]) == 1
    assert backend.batch_exists(keys[2:]) == 0
    assert backend.batch_exists([keys[3], keys[1], keys[0], keys[4]]) == 3
    assert backend.batch_exists([]) == 0
    assert [backend.exists(key) for key in keys] == [True, True, False, True, False]


def test_a_batch_of_no_pages_is_answered(make_pool: MakePool, backends: Any) -> None:
    backend = backends.open(make_pool(USUAL))
    nothing = torch.empty(0, dtype=torch.int64)
    assert backend.batch_set_v1([], nothing) == []
    assert backend.batch_get_v1([], nothing) == []


def test_pages_already_stored_are_reported_stored(make_pool: MakePool, backends: Any) -> None:
    """SGLang stops the backup of a node at the first False."""
    pool = make_pool(USUAL)
    backend = backends.open(pool)
    keys = page_hashes(3)
    backend.batch_set_v1(keys[:2], indices(pool, [0, 1]))
    assert backend.batch_set_v1(keys, indices(pool, [0, 1, 2])) == [True] * 3


@pytest.mark.parametrize("before", [0, 1, 3])
def test_what_comes_before_a_batch_reaches_the_store(
    before: int, make_pool: MakePool, backends: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang gives all page hashes from the start of the request; the last is the batch's parent."""
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageExtraInfo

    backend = backends.open(make_pool(USUAL))
    hashes = page_hashes(before + 2)
    told: list[tuple[str, object, object]] = []
    for name in ("store", "get"):
        real = getattr(backend._chain, name)

        def record(
            keys: Any, pages: Any, *, name: str = name, real: Any = real, **more: Any
        ) -> Any:
            told.append((name, more.get("parent"), more.get("position")))
            return real(keys, pages, **more)

        monkeypatch.setattr(backend._chain, name, record)
    info = HiCacheStorageExtraInfo(prefix_keys=hashes[:before])
    place = indices(make_pool(USUAL), [0, 1])
    assert backend.batch_set_v1(hashes[before:], place, info) == [True, True]
    assert backend.batch_get_v1(hashes[before:], place, info) == [True, True]
    named = next(iter(backend.pools.values())).namespace
    parent = page_key(named, bytes.fromhex(hashes[before - 1])) if before else b""
    assert told == [("store", parent, before), ("get", parent, None)]


@pytest.mark.parametrize("info", [None, {}, {"prefix_keys": None}])
def test_a_batch_of_which_sglang_says_no_more_begins_a_chain(
    info: dict[str, Any] | None, make_pool: MakePool, backends: Any
) -> None:
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageExtraInfo

    backend = backends.open(make_pool(USUAL))
    given = None if info is None else HiCacheStorageExtraInfo(**info)
    place = indices(make_pool(USUAL), [0, 1])
    assert backend.batch_set_v1(page_hashes(2), place, given) == [True, True]
    assert backend.batch_get_v1(page_hashes(2), place, given) == [True, True]


def test_the_start_of_a_request_outlives_its_end_over_batches(
    make_pool: MakePool, backends: Any
) -> None:
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageExtraInfo

    pool = make_pool(USUAL, pages=4)
    backend = backends.open(pool, cpu="512KiB", disk=0)
    request, place = page_hashes(12), indices(pool, [0, 1, 2, 3])
    for start in (0, 4, 8):
        info = HiCacheStorageExtraInfo(prefix_keys=request[:start])
        backend.batch_set_v1(request[start : start + 4], place, info)
    others, number = indices(pool, [0]), 0
    while backend.batch_exists(request):
        found = [backend.exists(page) for page in request]
        assert found == sorted(found, reverse=True), "a page was kept without those before it"
        backend.batch_set_v1(page_hashes(1, seed=str(number)), others)
        number += 1
        assert number < 2000


# --- other pages do not ---


@pytest.mark.parametrize(
    ("pool_options", "backend_options"),
    [
        ({}, {"model": "another model"}),
        ({}, {"tp_rank": 1, "tp_size": 2}),
        ({}, {"attn_cp_rank": 1, "attn_cp_size": 2}),
        ({"dtype": torch.float16}, {}),  # as wide as the bfloat16 of the pages
        ({"page_size": 8}, {}),
        ({"page_size": 8, "head_dim": 4}, {}),  # as many bytes as the pages
        ({"kind": "mla page_first"}, {}),
        ({"kind": "mla page_first"}, {"is_mla_model": True}),
    ],
)
def test_pages_of_another_kind_miss_in_the_same_store(
    pool_options: dict[str, Any],
    backend_options: dict[str, Any],
    make_pool: MakePool,
    backends: Any,
) -> None:
    keys = page_hashes(2)
    pool = make_pool(USUAL)
    backend = backends.open(pool)
    assert backend.batch_set_v1(keys, indices(pool, [0, 1])) == [True, True]

    other_pool = make_pool(**{"kind": USUAL} | pool_options)
    other = backends.open(other_pool, beside=backend, **backend_options)
    wipe(other_pool)
    assert other.batch_exists(keys) == 0
    assert other.batch_get_v1(keys, indices(other_pool, [0, 1])) == [False, False]
    assert is_wiped(other_pool)
    assert backend.batch_exists(keys) == 2


@pytest.mark.parametrize(
    ("kind", "rank"),
    [
        ("mla page_first", {"is_mla_model": True, "tp_rank": 1, "tp_size": 2}),
        (USUAL, {"dp_rank": 1}),
        (USUAL, {"pp_size": 2}),
    ],
)
def test_ranks_that_hold_the_same_bytes_share_pages(
    kind: str, rank: dict[str, Any], make_pool: MakePool, backends: Any
) -> None:
    pool = make_pool(kind)
    fill(pool)
    writer = backends.open(pool, is_mla_model=rank.get("is_mla_model", False))
    writer.batch_set_v1(page_hashes(1), indices(pool, [0]))
    reader_pool = make_pool(kind)
    reader = backends.open(reader_pool, beside=writer, **rank)
    assert reader.batch_get_v1(page_hashes(1), indices(reader_pool, [2])) == [True]
    assert content(reader_pool, 2) == content(pool, 0)


def test_clearing_forgets_the_own_pages_and_nobody_elses(
    make_pool: MakePool, backends: Any, caplog: pytest.LogCaptureFixture
) -> None:
    keys = page_hashes(3)
    pool = make_pool(USUAL)
    mine = backends.open(pool)
    theirs = backends.open(pool, model="another model", beside=mine)
    for backend in (mine, theirs):
        backend.batch_set_v1(keys, indices(pool, [0, 1, 2]))
    flush(mine)
    with caplog.at_level(logging.INFO):
        mine.clear()
    assert "cleared 3 pages" in caplog.text
    assert mine.batch_exists(keys) == 0
    assert theirs.batch_exists(keys) == 3
    mine.close()
    assert backends.open(pool).batch_exists(keys) == 0  # nor does a restart bring them back
    mine.close()


def test_the_other_pages_outlive_a_clear_on_the_disk(make_pool: MakePool, backends: Any) -> None:
    keys = page_hashes(3)
    pool = make_pool(USUAL)
    mine = backends.open(pool)
    theirs = backends.open(pool, model="another model", beside=mine)
    theirs.batch_set_v1(keys, indices(pool, [0, 1, 2]))
    mine.clear()
    mine.close()
    assert backends.open(pool, model="another model").batch_exists(keys) == 3


# --- what SGLang does besides ---


def test_sglang_reports_the_backend_by_the_name_of_the_flag(sglang: None) -> None:
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorage

    from lmcache_sglang.hicache.backend import LMCacheBackend

    assert LMCacheBackend.__name__ == "lmcache"
    assert issubclass(LMCacheBackend, HiCacheStorage)


@pytest.mark.parametrize("name", ["get", "batch_get", "set", "batch_set"])
def test_the_old_calls_say_what_to_call_instead(
    name: str, make_pool: MakePool, backends: Any
) -> None:
    """SGLang calls them only when the zero-copy calls were not selected."""
    backend = backends.open(make_pool(USUAL))
    keys: object = page_hashes(1) if name.startswith("batch") else page_hashes(1)[0]
    with pytest.raises(NotImplementedError, match=r"batch_(get|set)_v1"):
        getattr(backend, name)(keys, None, target_sizes=None)


def test_closing_twice_is_closing_once(make_pool: MakePool, backends: Any) -> None:
    pool = make_pool(USUAL)
    backend = backends.open(pool)
    backend.close()
    backend.close()
    backends.open(pool).close()  # the store is free again


def test_a_closed_backend_misses_and_does_not_raise(
    make_pool: MakePool, backends: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A storage thread may still have a call in hand when SGLang closes the backend."""
    pool = make_pool(USUAL)
    backend = backends.open(pool)
    keys = page_hashes(2)
    backend.batch_set_v1(keys, indices(pool, [0, 1]))
    backend.close()
    assert backend.batch_exists(keys) == 0
    assert backend.batch_get_v1(keys, indices(pool, [0, 1])) == [False, False]
    assert backend.batch_set_v1(keys, indices(pool, [0, 1])) == [False, False]
    with caplog.at_level(logging.INFO):
        backend.clear()
    assert "are still in the store" in caplog.text  # nobody may believe that they are gone
    assert "cleared" not in caplog.text


def test_the_kv_pool_may_be_registered_again(make_pool: MakePool, backends: Any) -> None:
    from sglang.srt.mem_cache.hicache_storage import PoolName

    pool = make_pool(USUAL)
    backend = backends.open(pool)
    before = backend.pools
    backend.register_mem_host_pool_v2(pool, PoolName.KV)
    backend.on_host_pools_registered()
    assert backend.pools == before


def test_a_pool_that_no_engine_was_seen_with_is_stored_and_that_is_said(
    make_pool: MakePool, backends: Any, caplog: pytest.LogCaptureFixture
) -> None:
    from sglang.srt.mem_cache.hicache_storage import PoolName

    backend = backends.open(make_pool(USUAL))
    with caplog.at_level("INFO"):
        backend.register_mem_host_pool_v2(make_pool(USUAL), PoolName.SWA)
        assert "not yet with an engine" not in caplog.text
        backend.register_mem_host_pool_v2(make_pool(USUAL), PoolName.INDEXER)
    assert "not yet with an engine" in caplog.text
    assert list(backend.pools) == [PoolName.KV, PoolName.SWA, PoolName.INDEXER]


def test_a_draft_models_pool_is_refused_where_nobody_names_the_draft_model(
    make_pool: MakePool, backends: Any
) -> None:
    from sglang.srt.mem_cache.hicache_storage import PoolName

    backends.draft = None
    backend = backends.open(make_pool(USUAL))
    with pytest.raises(NotImplementedError) as caught:
        backend.register_mem_host_pool_v2(make_pool(USUAL), PoolName.DRAFT)
    assert "'draft'" in str(caught.value)
    assert "--hicache-storage-backend lmcache" in str(caught.value)
    assert list(backend.pools) == [PoolName.KV]


@pytest.mark.parametrize("packed", [False, True])
def test_pages_of_another_draft_model_are_not_found(
    packed: bool, make_pool: MakePool, backends: Any
) -> None:
    """The target's own are, unless the draft model's layers lie in them."""
    from sglang.srt.mem_cache.hicache_storage import PoolName

    keys, found = page_hashes(2), []
    first = None
    for draft in ("one", "one", "another"):
        backends.draft = draft
        pool, drafts = make_pool(USUAL), make_pool(USUAL)
        pool.target_layer_num -= packed
        backend = backends.open(pool, beside=first)
        backend.register_mem_host_pool_v2(drafts, PoolName.DRAFT)
        if first is None:
            first = backend
            assert backend.batch_set_v1(keys, indices(pool, [0, 1])) == [True, True]
        found.append((backend.batch_exists(keys), backend.pools[PoolName.DRAFT].namespace))
    assert [pages for pages, _ in found] == [2, 2, 0 if packed else 2]
    assert found[0][1] == found[1][1] != found[2][1]


def test_a_pool_whose_pages_cannot_be_reached_is_refused_by_name(
    make_pool: MakePool, backends: Any
) -> None:
    from sglang.srt.mem_cache.hicache_storage import PoolName

    backend = backends.open(make_pool(USUAL))
    mute = SimpleNamespace(page_size=1, dcp_size=1)
    with pytest.raises(NotImplementedError) as caught:
        backend.register_mem_host_pool_v2(mute, PoolName.AUXILIARY_SWA)
    assert "'auxiliary_swa'" in str(caught.value)
    assert "--hicache-storage-backend lmcache" in str(caught.value)


@pytest.mark.parametrize(
    ("sizes", "blamed"),
    [
        ({"cpu": "8MiB", "disk": "64MiB"}, "cpu.size"),
        ({"cpu": "8MiB", "disk": 0}, "cpu.size"),
        ({"cpu": 0, "disk": "8MiB"}, "disk.size"),
    ],
)
def test_a_limit_below_one_page_stops_the_start(
    sizes: dict[str, object], blamed: str, make_pool: MakePool, backends: Any
) -> None:
    pool = make_pool(USUAL, page_size=64, head_dim=1024, pages=2)
    one_page = page_bytes(pool, indices(pool, [0]))
    backend = backends.make(**sizes)
    with pytest.raises(ConfigError) as caught:
        backend.register_mem_pool_host(pool)
    assert caught.value.setting == blamed
    assert str(one_page) in str(caught.value)
    backend.close()
    backend = backends.open(pool, cpu=0, disk="80MiB")  # the failed start left nothing open
    assert backend.batch_set_v1(page_hashes(1), indices(pool, [0])) == [True]


def test_without_metrics_there_are_no_statistics(make_pool: MakePool, backends: Any) -> None:
    pool = make_pool(USUAL)
    backend = backends.open(pool)
    backend.batch_set_v1(page_hashes(1), indices(pool, [0]))
    assert backend.get_stats() is None


def test_statistics_are_what_sglang_has_not_seen(make_pool: MakePool, backends: Any) -> None:
    from sglang.srt.observability.metrics_collector import StorageMetrics

    from lmcache_sglang.hicache.statistics import StoreMetrics

    pool = make_pool(USUAL)
    backend = backends.open(pool, metrics=True)
    assert backend.get_stats() == StoreMetrics()
    keys = page_hashes(5)
    backend.batch_set_v1(keys[:3], indices(pool, [0, 1, 2]))
    backend.batch_set_v1(keys[2:4], indices(pool, [2, 3]))  # one of them is there already
    backend.batch_get_v1(keys, indices(pool, [0, 1, 2, 3, 4]))
    backend.batch_get_v1(keys[4:], indices(pool, [4]))  # a miss moves nothing
    seen = backend.get_stats()
    assert isinstance(seen, StorageMetrics)  # which SGLang asserts, too
    assert seen.backup_pgs == [3, 1]
    assert seen.prefetch_pgs == [4]
    assert len(seen.backup_bandwidth) == 2
    assert len(seen.prefetch_bandwidth) == 1
    assert all(rate > 0 for rate in seen.backup_bandwidth + seen.prefetch_bandwidth)
    assert backend.get_stats() == StoreMetrics()


def test_a_bandwidth_is_in_gigabytes_a_second(
    make_pool: MakePool, backends: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make_pool(USUAL)
    backend = backends.open(pool, metrics=True)
    clock = iter([100.0, 102.0])  # two seconds for the batch
    fake = SimpleNamespace(perf_counter=lambda: next(clock))
    for module in ("backend", "statistics"):
        monkeypatch.setattr(f"lmcache_sglang.hicache.{module}.time", fake)
    backend.batch_set_v1(page_hashes(4), indices(pool, [0, 1, 2, 3]))
    seen = backend.get_stats()
    one_page = page_bytes(pool, indices(pool, [0]))
    assert seen.backup_bandwidth == [pytest.approx(4 * one_page / 2.0 / 1e9)]


@pytest.fixture
def injected(
    monkeypatch: pytest.MonkeyPatch, make_pool: MakePool, backends: Any
) -> Iterator[Callable[[str, str], tuple[Any, Any]]]:
    """A backend as SGLang's own fault tests wrap it, with its pool."""
    from sglang.srt.mem_cache import hicache_storage

    def wrap(variable: str, value: str) -> tuple[Any, Any]:
        pool = make_pool(USUAL)
        monkeypatch.setenv(f"SGLANG_TEST_HICACHE_BACKEND_{variable}", value)
        wrapped = hicache_storage._maybe_wrap_hicache_storage_failure_injector(backends.make())
        assert isinstance(wrapped, hicache_storage.HiCacheStorageFailureInjector)
        wrapped.register_mem_pool_host(pool)
        wrapped.register_mem_host_pool_v2(pool, hicache_storage.PoolName.KV)
        wrapped.on_host_pools_registered()
        return wrapped, pool

    yield wrap


def test_all_of_it_works_behind_sglangs_own_wrapper(
    injected: Callable[[str, str], tuple[Any, Any]],
) -> None:
    backend, pool = injected("RANDOM_DELAY", "0.001")
    keys = page_hashes(2)
    fill(pool)
    assert backend.batch_set_v1(keys, indices(pool, [0, 1]), None) == [True, True]
    assert backend.batch_exists(keys, None) == 2
    assert backend.exists(keys[0])
    assert backend.batch_get_v1(keys, indices(pool, [4, 5]), None) == [True, True]
    assert content(pool, 5) == content(pool, 1)
    assert backend.get_stats() is None
    backend.clear()
    assert backend.batch_exists(keys) == 0
    backend.close()


def test_injected_failures_are_misses(
    injected: Callable[[str, str], tuple[Any, Any]],
) -> None:
    backend, pool = injected("RANDOM_FAILURE", "1.0")
    keys = page_hashes(2)
    wipe(pool)
    assert backend.batch_set_v1(keys, indices(pool, [0, 1])) == [False, False]
    assert backend.batch_exists(keys) == 0
    assert backend.batch_get_v1(keys, indices(pool, [4, 5])) == [False, False]
    assert is_wiped(pool)


def test_reading_while_writing_never_mixes_pages(make_pool: MakePool, backends: Any) -> None:
    """SGLang's prefetch and backup threads call at once; here over the same pages, often evicted."""
    count, rounds = 24, 20
    pool = make_pool(USUAL, pages=3 * count)
    fill(pool)
    keys = page_hashes(count)
    written = [content(pool, slot) for slot in range(count)]
    backend = backends.open(pool, cpu="448KiB")  # the smallest store, but for little
    start = Barrier(3)
    wrong: list[object] = []

    def write() -> None:
        start.wait()
        for turn in range(rounds):
            backend.batch_set_v1(
                keys[turn % 3 :: 3], indices(pool, list(range(turn % 3, count, 3)))
            )

    def read(first: int) -> None:
        start.wait()
        for _ in range(rounds):
            held = backend.batch_get_v1(keys, indices(pool, list(range(first, first + count))))
            for i, whole in enumerate(held):
                if whole and content(pool, first + i) != written[i]:
                    wrong.append(i)

    threads = [Thread(target=write)]
    threads += [Thread(target=read, args=(first,)) for first in (count, 2 * count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    flush(backend)
    assert backend.batch_exists(keys) == count
    assert (
        backend.batch_get_v1(keys, indices(pool, list(range(count, 2 * count)))) == [True] * count
    )
