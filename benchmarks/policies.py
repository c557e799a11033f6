"""Hit rates of the eviction policies on a trace of real requests:

    python -m benchmarks.policies conversation_trace.jsonl

The trace has one JSON object a line with `hash_ids`, the ids of a prompt's blocks; equal ids are equal
prefixes up to and including that block (Mooncake, FAST '25, https://github.com/kvcache-ai/Mooncake). Each
request looks its blocks up, counts those that are there without a gap, and puts them all, as an engine does.
The store's own index and policies run; only the pages' bytes are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args

import numpy as np

from lmcache_sglang.storage import _native
from lmcache_sglang.storage.base import NAMESPACE_BYTES
from lmcache_sglang.storage.slab.settings import Eviction

from .bare_store import bare_store

CAPACITIES = (1_000, 10_000, 30_000, 50_000)
NAMESPACE = b"p" * NAMESPACE_BYTES
SECONDS = 10.0


def requests(trace: Path) -> list[list[bytes]]:
    """The page keys of each prompt."""
    keys: dict[int, bytes] = {}
    prompts = []
    for line in trace.read_text().splitlines():
        ids = json.loads(line)["hash_ids"]
        for block in ids:
            keys.setdefault(block, NAMESPACE + sha256(str(block).encode()).digest())
        prompts.append([keys[block] for block in ids])
    return prompts


def replay(store: _native.SlabStore, prompts: Sequence[Sequence[bytes]]) -> float:
    """The share of blocks that were there, without a gap from the start."""
    page = np.zeros(1, dtype=np.uint8)
    address = page.ctypes.data
    hits = total = 0
    for prompt in prompts:
        here = store.exists(list(prompt))
        hits += here.index(False) if False in here else len(here)
        total += len(prompt)
        many = len(prompt)
        store.put(list(prompt), [address] * many, [1] * many, 1, None, None, "never", SECONDS)
    return hits / total


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.policies", description=__doc__)
    parser.add_argument("trace", type=Path, help="JSON lines with hash_ids")
    prompts = requests(parser.parse_args(arguments).trace)
    print(f"| blocks | {' | '.join(get_args(Eviction))} |")
    print("|---|" + "---|" * len(get_args(Eviction)))
    for capacity in CAPACITIES:
        rates = []
        for eviction in get_args(Eviction):
            started = time.monotonic()
            with TemporaryDirectory(dir="/dev/shm", prefix="lmcache-bench-") as folder:
                rates.append(replay(bare_store(Path(folder), capacity, eviction), prompts))
            print(f"{eviction}, {capacity}: {time.monotonic() - started:.1f} s", file=sys.stderr)
        print(f"| {capacity} | {' | '.join(f'{rate:.3f}' for rate in rates)} |")


if __name__ == "__main__":
    main()
