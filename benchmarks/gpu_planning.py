"""What the thread that asks for a copy pays before the driver is called: planning launches, tables included. No GPU.

python -m benchmarks.gpu_planning
"""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable
from itertools import product
from time import perf_counter

from lmcache_sglang.kernels.copy_plan import CopyPlan
from lmcache_sglang.kernels.cuda.choice import BLOCKS_OVER_A_LINK
from lmcache_sglang.kernels.cuda.prepared import PreparedCopy, PreparedLayers
from lmcache_sglang.testing.torch_pools import Pool, PoolShape

PAGES = (8, 64, 1000)
LAYERS = (32, 80)
ROUNDS = 200
WAYS: dict[str, type[PreparedCopy | PreparedLayers]] = {
    "all layers at once": PreparedCopy,
    "a layer at a time": PreparedLayers,
}


def main() -> None:
    """Prints a line a case: the median of some rounds, in microseconds."""
    for (name, way), layers, pages in product(WAYS.items(), LAYERS, PAGES):
        microseconds = _median(_planning(way, layers, pages)) * 1e6
        print(f"{name}: {pages:5} scattered pages of {layers} layers: {microseconds:8.1f} us")


def _planning(
    way: type[PreparedCopy | PreparedLayers], layers: int, pages: int
) -> Callable[[], object]:
    """From page_first in host memory to a buffer a layer."""
    shape = PoolShape(layers=layers, pages=pages, page_size=4, heads=1, dims=(8, 8))
    src, dst = Pool("page_first", shape), Pool("device", shape)
    order = random.Random(1).sample(range(pages), pages)
    plan = CopyPlan.of_pages(order, order[::-1], page_size=shape.page_size)
    room = ctypes.create_string_buffer(way(plan, src.layout, dst.layout, None).table_bytes)

    def work() -> None:
        at = ctypes.addressof(room)
        way(plan, src.layout, dst.layout, None).launches(at, at, BLOCKS_OVER_A_LINK)

    return work


def _median(work: Callable[[], object]) -> float:
    taken = []
    for _ in range(ROUNDS):
        begun = perf_counter()
        work()
        taken.append(perf_counter() - begun)
    return sorted(taken)[ROUNDS // 2]


if __name__ == "__main__":
    main()
