"""What the plug-in's hooks cost SGLang's scheduler's thread, a call, in microseconds.

    SGLANG_USE_CPU_ENGINE=1 python -m benchmarks.hooks

Each is called as SGLang calls it, with nothing of SGLang's own work behind it. The last one is a page's part of a
prefix of 250,000 tokens, of which listeners to KV events are told.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace

from lmcache_sglang import sglang_plugin as plugin
from lmcache_sglang.hicache import events, patience
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
    return {
        "a prefix is given up": microseconds(lambda: plugin._give_up(None, operation)),
        "a prefill batch ended": microseconds(lambda: plugin._note_the_speed(None, batch, stats)),
        "metrics are asked for": microseconds(metrics.take),
        "KV events are taken, none of ours": microseconds(lambda: plugin._add_events([])),
        "a prefix was restored, nobody listens": microseconds(
            lambda: plugin._tell_of_restored(lambda *_: None, cache, operation)
        ),
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


def main() -> None:
    for what, cost in of_each_hook().items():
        print(f"{cost:6.2f} µs  {what}")


if __name__ == "__main__":
    main()
