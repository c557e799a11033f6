"""SGLang's own controller over this backend and over its file backend, with pools made by hand.

What no engine on CPU has: an indexer, pools of draft models, DeepSeek V4's pages. The controller's own
code decides what is asked, cut and called; for its threads, groups of ranks and the tree see test_radix_cache.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from typing import Any

import pytest

from tests.hicache.test_backend import indices
from tests.hicache.test_several_pools import content, fill

PAGE, SPAN = 4, 6  # tokens; pages
# Beside the KV pool, which of "compressed" has no memory: pool, kind, how many of the last pages it needs (0: of all,
# where the KV lies).
SIDECARS: dict[str, list[tuple[str, str, int]]] = {
    "indexer": [("indexer", "key_only page_first", 0)],
    "indexer of layers": [("indexer", "key_only layer_first", 0)],
    "indexer and state": [
        ("indexer", "qsa_indexer page_first", 0),
        ("mamba", "mamba page_first", 1),
    ],
    "draft model": [
        ("draft", "mha page_first", 0),
        ("draft_indexer", "qsa_indexer page_first", 0),
        ("draft_swa", "mha page_first_direct", 2),
    ],
    "window": [("swa", "mha page_first", 2), ("auxiliary_swa", "mha layer_first", 3)],
    "state": [("mamba", "mamba page_first", 1)],
    "window and state": [("swa", "mha page_first", 2), ("mamba", "mamba page_first_direct", 1)],
    "compressed": [
        ("deepseek_v4_c4", "paged page_first", 0),
        ("deepseek_v4_c4_indexer", "paged page_first", 0),
        ("deepseek_v4_c4_indexer_scale", "paged page_first_direct", 0),
        ("deepseek_v4_c4_rope", "paged layer_first", 0),
        ("swa", "paged page_first", 2),
        ("deepseek_v4_c4_state", "compress_state page_first", 2),
        ("deepseek_v4_c4_indexer_state", "compress_state layer_first", 2),
    ],
}
MODELS = list(SIDECARS)
MakePool = Callable[..., Any]


class Side:
    """One backend with pools of its own under SGLang's controller."""

    def __init__(self, model: str, make_pool: MakePool, config: Any) -> None:
        from sglang.srt.mem_cache.hicache_storage import PoolName

        anchor = "logical page_first" if model == "compressed" else "mha page_first"
        kinds = {"kv": anchor} | {name: kind for name, kind, _ in SIDECARS[model]}
        self.pools = {
            PoolName(name): make_pool(kind, pages=3 * SPAN) for name, kind in kinds.items()
        }
        for seed, pool in enumerate(self.pools.values()):
            fill(pool, seed)
        self.config = config
        self.needs = {PoolName(name): pages for name, _, pages in SIDECARS[model]}

    def drive(self, backend: Any, kind: str) -> None:
        """Take this backend, as attach_storage_backend does."""
        from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController
        from sglang.srt.mem_cache.pool_host.group import HostPoolGroup, PoolEntry

        entries = [
            PoolEntry(name, pool, None, lambda layer: layer, name.value == "kv")
            for name, pool in self.pools.items()
        ]
        for entry in entries:
            backend.register_mem_host_pool_v2(entry.host_pool, entry.name)
        backend.on_host_pools_registered()
        controller = HybridCacheController.__new__(HybridCacheController)
        controller.page_size, controller.storage_config = PAGE, self.config
        controller.storage_backend, controller.storage_backend_type = backend, kind
        controller.mem_pool_host = HostPoolGroup(entries)
        controller.storage_host_pool = entries[0].host_pool
        controller.prefetch_hits_sync_groups = []
        controller.prefetch_sync_queue = Queue()
        controller.extra_host_mem_release_queues = {name: Queue() for name in self.needs}
        generic = kind == "file"
        get, put = controller._generic_page_get, controller._generic_page_set
        controller.page_get_func = get if generic else controller._page_get_zero_copy
        controller.page_set_func = put if generic else controller._page_set_zero_copy
        self.controller = controller

    def write(self, tokens: list[int], pages: int, slots: list[int]) -> None:
        """Back up the first pages of these tokens, as one node of the tree, from these slots."""
        from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import StorageOperation
        from sglang.srt.mem_cache.utils import get_hash_str

        kv = next(iter(self.pools.values()))
        hashes = get_hash_str(tokens[: pages * PAGE], page_size=PAGE)
        operation = StorageOperation(
            indices(kv, slots[:pages]),
            tokens[: pages * PAGE],
            hash_value=hashes,
            pool_transfers=self._transfers(hashes, slots[:pages]),
        )
        self.controller._page_backup(operation)
        assert operation.completed_tokens == pages * PAGE

    def prefetch(self, tokens: list[int], slots: list[int]) -> tuple[int, dict[str, int]]:
        """Restore what is there into these slots: the tokens of the prefix, and pages a sidecar got."""
        from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import PrefetchOperation

        wanted = self._transfers(["placeholder"] * SPAN, [])
        operation = PrefetchOperation(SimpleNamespace(rid="one"), tokens, pool_transfers=wanted)
        hashes, found = self.controller._storage_hit_query(operation)
        hit = self.controller._sync_prefetch_hit_query(operation, found)
        pages = hit // PAGE
        operation.hash_value = hashes[:pages]
        operation.host_indices = indices(next(iter(self.pools.values())), slots[:pages])
        for transfer in wanted:
            if transfer.indices_from_pool is None:
                count = min(self.needs[transfer.name], pages)
                pool = self.pools[transfer.name]
                transfer.host_indices = indices(pool, slots[pages - count : pages])
        if pages:
            self.controller._page_transfer(operation)
        got: dict[str, int] = {}
        completed = 0
        while not self.controller.prefetch_sync_queue.empty():
            ack = self.controller.prefetch_sync_queue.get()
            completed = max(completed, ack.completed_tokens or 0)
            got |= {str(name): count for name, count in (ack.pool_hits or {}).items()}
        assert completed == hit
        return hit, got

    def restored(self, source: list[int], target: list[int], pages: int) -> bool:
        """Whether what a prefix of so many pages needs lies in the target slots as in the source."""
        for name, pool in self.pools.items():
            need = self.needs.get(name, 0) or pages
            for page in range(max(0, pages - need), pages):
                if content(pool, target[page]) != content(pool, source[page]):
                    return False
        return True

    def _transfers(self, hashes: list[str], slots: list[int]) -> list[Any]:
        """As the tree's components make them."""
        from sglang.srt.mem_cache.hicache_storage import PoolHitPolicy, PoolName, PoolTransfer

        made = []
        for name, need in self.needs.items():
            if need == 0:
                made.append(PoolTransfer(name, indices_from_pool=PoolName.KV))
                continue
            where = indices(self.pools[name], slots[-need:]) if slots else None
            made.append(
                PoolTransfer(
                    name,
                    host_indices=where,
                    keys=hashes[-need:],
                    hit_policy=PoolHitPolicy.TRAILING_PAGES,
                )
            )
        return made


@pytest.fixture(params=MODELS)
def sides(
    request: pytest.FixtureRequest,
    make_pool: MakePool,
    backends: Any,
    storage_config: Any,
    tmp_path: Path,
) -> tuple[Side, Side]:
    """Ours, and SGLang's own as the oracle; equal pools with equal bytes."""
    from sglang.srt.mem_cache.hicache_storage import HiCacheFile, PoolName

    ours, theirs = (Side(request.param, make_pool, storage_config()) for _ in range(2))
    ours.drive(backends.open(ours.pools[PoolName.KV]), "lmcache")
    file = HiCacheFile(storage_config(), str(tmp_path / "file"))
    file.register_mem_pool_host(theirs.pools[PoolName.KV])
    theirs.drive(file, "file")
    return ours, theirs


SOURCE, TARGET = list(range(SPAN)), list(range(2 * SPAN, SPAN, -1))
TOKENS = list(range(100, 100 + SPAN * PAGE))


def test_what_was_backed_up_comes_back_to_other_slots(sides: tuple[Side, Side]) -> None:
    results = []
    for side in sides:
        side.write(TOKENS, SPAN, SOURCE)
        hit, got = side.prefetch(TOKENS, TARGET)
        assert hit == SPAN * PAGE
        assert side.restored(SOURCE, TARGET, SPAN)
        results.append(got)
    assert results[0] == results[1]


@pytest.mark.parametrize("asked", [2, 4, 5])
def test_a_shorter_or_longer_prompt_gets_what_the_file_backend_gives(
    sides: tuple[Side, Side], asked: int
) -> None:
    """Four pages are stored, then prompts that end before, at, or after their end."""
    tokens = TOKENS[: asked * PAGE] + [7] * PAGE
    hits = []
    for side in sides:
        side.write(TOKENS, 4, SOURCE)
        hit, got = side.prefetch(tokens, TARGET)
        assert side.restored(SOURCE, TARGET, hit // PAGE)
        hits.append((hit, got))
    assert hits[0] == hits[1]
    assert hits[0][0] in (0, min(asked, 4) * PAGE)
    assert asked == 2 or hits[0][0] == 4 * PAGE


def test_nothing_comes_from_an_empty_store(sides: tuple[Side, Side]) -> None:
    for side in sides:
        assert side.prefetch(TOKENS, TARGET) == (0, {})
