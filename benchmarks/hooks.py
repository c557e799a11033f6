"""What the plug-in's hooks cost SGLang's scheduler's thread, a call, in microseconds.

    SGLANG_USE_CPU_ENGINE=1 python -m benchmarks.hooks

Each is called as SGLang calls it, with nothing of SGLang's own work behind it. The last one of the hooks is a page's
part of a prefix of 250,000 tokens, of which listeners to KV events are told. Below them are the calls of the direct
path's linker, for a prefix of so many pages in all, and its lookups where a model has windows too, or ranks must agree.
The last one is on the fetching thread, with the lock that lookups need.
"""

from __future__ import annotations

import functools
import hashlib
import statistics
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.hybrid_cache.linker_pool_assembler import DevicePoolGroup

from lmcache_sglang import sglang_plugin as plugin
from lmcache_sglang.hicache import events, patience
from lmcache_sglang.hicache.fetching import Fetch
from lmcache_sglang.hicache.landing import Landing
from lmcache_sglang.hicache.linker import LMCacheLinker
from lmcache_sglang.hicache.offloading import Offloading
from lmcache_sglang.hicache.promises import Patience, Promises
from lmcache_sglang.hicache.statistics import Statistics

CALLS = 2000
PAGE_SIZE, PAGES = 16, 15_625


def microseconds(call: Callable[[], object], calls: int = CALLS) -> float:
    """The median of a call."""
    taken = []
    for _ in range(calls):
        begun = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken) * 1e6


def of_each_hook() -> dict[str, float]:
    """By what happens."""
    plugin._BACKEND_MADE.set()
    operation = SimpleNamespace(is_terminated=lambda: False, handle="request")
    with patience.reading(Controller(), operation):
        pass
    batch = SimpleNamespace(launch_ts=time.monotonic())
    stats = SimpleNamespace(log_input_tokens=500)
    controller = SimpleNamespace(storage_backend_type=plugin.NAME)
    cache = SimpleNamespace(cache_controller=controller, page_size=PAGE_SIZE)
    metrics = Statistics(True, dict)
    told_nobody = microseconds(lambda: plugin._tell_of_restored(lambda *_: None, cache, operation))
    return {
        "a prefix is given up": microseconds(lambda: plugin._give_up(None, operation)),
        "a prefill batch ended": microseconds(lambda: plugin._note_the_speed(None, batch, stats)),
        "metrics are asked for": microseconds(metrics.take),
        "KV events are taken, none of ours": microseconds(lambda: plugin._add_events([])),
        "a prefix was restored, nobody listens": told_nobody,
        "a prefix was restored, a page, to who listens": a_page_told(),
    }


class Controller:
    """A controller that nobody watches; weak keys want a class of one's own."""


def a_page_told() -> float:
    hashes = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(PAGES)]
    tokens = list(range(PAGES * PAGE_SIZE))

    def tell() -> None:
        told = events.StoreEvents()
        told.take([])  # somebody publishes
        told.stored(hashes, tokens, PAGE_SIZE, None)

    return microseconds(tell, calls=11) / PAGES


DIRECT_PAGES = 256
PAGE_BYTES = 512
WINDOW = 8  # pages
RECORDS = 1 << 18  # of a landing of 4 GiB of pages of 16 KiB
BATCH = 128  # pages that are read at once


def of_each_call_of_the_linker(pages: int = DIRECT_PAGES) -> dict[str, float]:
    """By what happens; of a prefix of so many pages, all of them landed but where it says otherwise."""
    hashes = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(2 * pages)]
    landing = _landed(hashes[:pages])
    linker = _linker(landing, _promises({"kv": landing}, alone=True))
    calls = {
        "a lookup, all landed": lambda: linker.lookup("landed", _transfers(hashes[:pages])),
        "a lookup, none landed": lambda: linker.lookup("waits", _transfers(hashes[pages:])),
        "a request is held up, its fetch under way": lambda: _turn(linker, "waits"),
        "a load is queued and cancelled": lambda: _load(linker, hashes[:pages]),
        "an offload is queued": lambda: linker.offload(_transfers(hashes[:pages])),
        "is an offload done": linker.num_completed_offloads,
    }
    return {what: microseconds(call) for what, call in calls.items()}


def of_each_kind_of_lookup(pages: int = DIRECT_PAGES) -> dict[str, float]:
    """By what the engine is; all pages have landed, but for windows those that a fetch reads."""
    hashes = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(pages)]
    landings = {"kv": _landed(hashes), "swa": _landed(hashes[-WINDOW:])}
    every = {"kv": _landed(hashes), "swa": _landed(hashes)}
    kinds = {
        "with windows": _promises(landings, alone=True),
        "of several ranks": _promises({"kv": landings["kv"]}, alone=False),
        "with windows, of several ranks": _promises(every, alone=False),
    }
    windows = {"swa": WINDOW}
    calls: dict[str, Callable[[], object]] = {
        f"a lookup {what}": functools.partial(promises.look_up, "r", hashes, windows)
        for what, promises in kinds.items()
    }
    lacking = _promises({"kv": Landing(1, PAGE_BYTES)}, alone=True)
    lacking.look_up("r", hashes, windows)
    calls["a lookup, the device prefix lost"] = lambda: _lose(lacking, hashes)
    return {what: microseconds(call) for what, call in calls.items()}


def _lose(promises: Promises, hashes: list[str]) -> None:
    """The first page was not among those of the fetch before, all of which are compared with it."""
    promises._requests["r"].fetch = Fetch(tuple(hashes[1:]), {})
    promises.look_up("r", hashes, {})


def a_batch_taken() -> float:
    """Room for a batch, from a landing that many prompts have come and gone in."""
    landing = Landing(RECORDS, 64)

    def take() -> None:
        room = landing.take(BATCH)
        landing.let_go(room)

    return microseconds(take)


def _landed(hashes: list[str]) -> Landing:
    """A landing with these pages, and room for as many."""
    pages = len(hashes)
    landing = Landing(2 * pages, PAGE_BYTES)
    keys = [page_hash.encode()[:48] for page_hash in hashes]
    landing.let_go(landing.came(landing.take(pages), hashes, keys, [True] * pages))
    return landing


def _promises(landings: dict[str, Landing], *, alone: bool) -> Promises:
    windowed = [name for name in landings if name != "kv"]
    return Promises(
        landings, windowed, lambda _: None, Patience(), alone=alone, hangs=lambda: False
    )


def _linker(landing: Landing, promises: Promises) -> Any:
    """One with a pool, whose threads are not there."""
    linker = LMCacheLinker.__new__(LMCacheLinker)
    entry = SimpleNamespace(name=PoolName.KV, indices_from_pool=PoolName.KV)
    entry.translate_indices = lambda indices: indices
    pool: Any = SimpleNamespace(name="kv", namespace=bytes(16), page_bytes=PAGE_BYTES)
    linker._group = DevicePoolGroup([entry], 1, PAGE_SIZE)
    linker._stored = {PoolName.KV: pool}
    linker._landings = {"kv": landing}
    linker._promises = promises
    linker._queued = {}
    linker._before = ("", 0)
    linker._with_windows = frozenset()
    linker._offloading = _offloading()
    return linker


def _offloading() -> Offloading:
    """One that never stores anything, and takes all there is."""
    idle: Any = SimpleNamespace(start=lambda: None)
    nothing: Any = SimpleNamespace()
    with patch.object(threading, "Thread", lambda **_: idle):
        return Offloading(nothing, most=1 << 60)


def _turn(linker: Any, rid: str) -> None:
    linker.begin_pass(lambda: [rid], lambda _: None)
    assert not linker.may_go(rid)
    linker.end_pass()


def _transfers(hashes: list[str]) -> list[PoolTransfer]:
    indices = torch.empty(len(hashes) * PAGE_SIZE, dtype=torch.int64)
    return [PoolTransfer(name=PoolName.KV, keys=hashes, device_indices=indices)]


def _load(linker: Any, hashes: list[str]) -> None:
    linker.load("landed", _transfers(hashes))
    linker.cancel_queued_load("landed")


def main() -> None:
    for what, cost in of_each_hook().items():
        print(f"{cost:6.2f} µs  {what}")
    for pages in (DIRECT_PAGES, 16 * DIRECT_PAGES):
        costs = of_each_call_of_the_linker(pages) | of_each_kind_of_lookup(pages)
        for what, cost in costs.items():
            print(f"{cost:6.2f} µs  {what}, {pages} pages")
    print(f"{a_batch_taken():6.2f} µs  room for {BATCH} pages is taken of {RECORDS} records")


if __name__ == "__main__":
    main()
