"""Copies of pages between an engine's layouts, beside memcpy and torch: `make bench ARGS=--copies`.

    python -m benchmarks.copies --rounds 7 --out docs/benchmarks

Every cell moves the same pages, in the same random order, three ways: `copy_pages`; memcpy of as many bytes, a whole
page at a time, which is what the machine can do; and torch's indexing, by pages or by tokens, whichever is faster
there. All three have the same number of threads. Subjects take turns within a round, and ratios are of one round.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.catalog import ROOT
from lmcache_sglang.kernels.copy_plan import CopyPlan, copy_pages, parts_of
from lmcache_sglang.testing.torch_pools import Pool, PoolShape

CELL_BYTES = 192 << 20  # moved in one call; more than the caches hold
SPARE_PAGES = 2
MEMCPY_RUN = 4096  # from here on copies are to be no slower than memcpy
MODELS = {
    "Llama-3-8B": PoolShape(layers=32, heads=8, dims=(128, 128)),
    "Llama-3-70B, TP 8": PoolShape(layers=80, heads=1, dims=(128, 128)),
    "DeepSeek-V3 (MLA)": PoolShape(layers=61, heads=1, dims=(576,)),
    "Qwen3-30B-A3B": PoolShape(layers=48, heads=4, dims=(128, 128)),
}
THREADS = (1, 2)
SGLANG_PAGE, VLLM_PAGE = 64, 16
PAIRS = (
    ("device", "page_first", SGLANG_PAGE),
    ("device", "layer_first", SGLANG_PAGE),
    ("device", "page_head", SGLANG_PAGE),
    ("device", "page_first_direct", SGLANG_PAGE),
    ("LBNHC", "slots", VLLM_PAGE),
    ("LBHNC", "slots", VLLM_PAGE),
    ("BLHNC", "slots", VLLM_PAGE),
)


@dataclass(frozen=True)
class Measured:
    """One direction between two layouts; GB/s (10^9 bytes), a value a round."""

    model: str
    src: str
    dst: str
    threads: int
    run: int  # bytes that are contiguous on both sides; long ones as they are cut for threads
    ours: list[float]
    memcpy: list[float]
    torch: list[float]


def measure(rounds: int, threads: Sequence[int], say: Callable[[str], None]) -> list[Measured]:
    """Every model, pair of layouts, direction and number of threads."""
    found = []
    for model, shape in MODELS.items():
        for one, other, page_size in PAIRS:
            sized = replace(shape, page_size=page_size)
            pages = max(4, CELL_BYTES // sized.page_bytes)
            sized = replace(sized, pages=pages + SPARE_PAGES)
            pools = {kind: Pool(kind, sized, allocate=_touched) for kind in (one, other)}
            for seed, pool in enumerate(pools.values()):
                pool.fill(seed)
            for src, dst in ((one, other), (other, one)):
                for count in threads:
                    cell = _Cell(sized, pools[src], pools[dst], pages, count)
                    say(f"{model}: {src} to {dst}, {count} threads")
                    found.append(Measured(model, src, dst, count, cell.run, *cell.measure(rounds)))
    return found


def _touched(size: int) -> Tensor:
    return torch.ones(size, dtype=torch.uint8)


class _Cell:
    """The three subjects over one list of pages."""

    def __init__(self, shape: PoolShape, src: Pool, dst: Pool, pages: int, threads: int) -> None:
        rng = random.Random(0)
        self._src, self._dst, self._threads = src, dst, threads
        self._from, self._to = (rng.sample(range(shape.pages), pages) for _ in range(2))
        self._bytes = pages * shape.page_bytes
        self._page_bytes = shape.page_bytes
        self._plan = CopyPlan.of_pages(self._from, self._to, page_size=shape.page_size)
        self.run = parts_of(self._plan, src.layout, dst.layout)[0].run
        self._buffers = [_touched(shape.pages * shape.page_bytes) for _ in range(2)]

    def measure(self, rounds: int) -> tuple[list[float], list[float], list[float]]:
        """GB/s of ours, of memcpy and of torch; the round before the first is thrown away."""
        torch.set_num_threads(self._threads)
        self._require_right()
        with ThreadPoolExecutor(self._threads) as workers:
            subjects = [self._ours, lambda: self._memcpy(workers), self._faster_torch()]
            values: list[list[float]] = [[], [], []]
            for turn in range(rounds + 1):
                for i in range(3):
                    which = (turn + i) % 3
                    values[which].append(self._bytes / _seconds(subjects[which]) / 1e9)
        ours, memcpy, others = (each[1:] for each in values)
        return ours, memcpy, others

    def _require_right(self) -> None:
        """What is timed is a copy: ours has written what torch then writes."""
        theirs = _layers(self._dst)
        self._ours()
        written = [layer[self._to].view(torch.uint8) for layer in theirs]  # as bytes: some are NaNs
        for layer in theirs:
            layer.zero_()
        self._torch_by_pages()()
        right = [layer[self._to].view(torch.uint8) for layer in theirs]
        if not all(map(torch.equal, written, right)):
            raise AssertionError(f"a copy to {self._dst.kind} differs from torch's")

    def _ours(self) -> None:
        copy_pages(self._plan, self._src.layout, self._dst.layout, threads=self._threads)

    def _memcpy(self, workers: ThreadPoolExecutor) -> None:
        """ctypes gives the GIL back while it copies."""
        src, dst = (each.data_ptr() for each in self._buffers)
        size = self._page_bytes

        def some(first: int) -> None:
            for a, b in zip(
                self._from[first :: self._threads], self._to[first :: self._threads], strict=True
            ):
                ctypes.memmove(dst + b * size, src + a * size, size)

        list(workers.map(some, range(self._threads)))

    def _faster_torch(self) -> Callable[[], None]:
        ways = [self._torch_by_pages(), self._torch_by_tokens()]
        return min(ways, key=lambda way: min(_seconds(way) for _ in range(2)))

    def _torch_by_pages(self) -> Callable[[], None]:
        here, there = torch.tensor(self._from), torch.tensor(self._to)
        pairs = list(zip(_layers(self._src), _layers(self._dst), strict=True))

        def copy() -> None:
            for src, dst in pairs:
                dst[there] = src[here]

        return copy

    def _torch_by_tokens(self) -> Callable[[], None]:
        """As an engine has them: a slot a token; for pools that have a slot axis, or one of pages and one of tokens."""
        size = self._src.layout.page_size
        token = torch.arange(size).repeat(len(self._from))
        here, there = (
            torch.tensor(each).repeat_interleave(size) for each in (self._from, self._to)
        )
        pairs = list(zip(_layers(self._src), _layers(self._dst), strict=True))

        def copy() -> None:
            for src, dst in pairs:
                dst[there, token] = src[here, token]

        return copy


def _layers(pool: Pool) -> list[Tensor]:
    """[page, token, head, dim] of each plane and layer: the pool's own memory."""
    return [
        pool.rows(plane, layer).flatten(2, 3)  # of one group, or of groups side by side
        for plane in range(pool.planes)
        for layer in range(pool.shape.layers)
    ]


def _seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


# The page.

HEAD = """\
# Copies of pages

Generated by `make bench ARGS=--copies`; nothing here was written by hand. {rounds} rounds. {machine}.

`copy_pages` between an engine's layouts, on a CPU, {size} MiB a call in random pages ({sglang} tokens each, vLLM's {vllm}).
GB is 10⁹ bytes, moved once; medians, and of the ratios, which are of one round each, their range. *run* is what is
contiguous on both sides (long ones are cut into 32 KiB for threads to share). memcpy copies as many bytes, a whole page
at a time, with as many threads; torch assigns by index, by pages or by tokens, whichever was faster. Ours is compared
with torch's before it is timed. *device* is SGLang's pool on the device, page_first and the like its host pools, slots the
store's records at a fixed distance, LBNHC and the like vLLM's orders of layers, blocks, tokens, heads and content.

Targets: no slower than memcpy where a run is 4 KiB or longer, three times as fast as torch.
"""


def page(found: Sequence[Measured], rounds: int, where: dict[str, str]) -> str:
    """The whole page."""
    about = "; ".join(
        f"{key}: {where[key]}" for key in ("date", "cpu", "cores", "kernel", "load at start")
    )
    head = HEAD.format(
        rounds=rounds, machine=about, size=CELL_BYTES >> 20, sglang=SGLANG_PAGE, vllm=VLLM_PAGE
    )
    return "\n".join([head, *_summary(found), "", *_table(found), ""])


def _summary(found: Sequence[Measured]) -> Iterator[str]:
    long = [each for each in found if each.run >= MEMCPY_RUN]
    yield "| target | cells | met in | lowest median |"
    yield "| --- | --- | --- | --- |"
    rows = (
        ("ours / memcpy ≥ 1.0, runs of 4 KiB and longer", long, "memcpy", 1.0),
        ("ours / torch ≥ 3.0", list(found), "torch", 3.0),
    )
    for text, cells, other, limit in rows:
        medians = [statistics.median(_ratios(each, other)) for each in cells]
        met = sum(median >= limit for median in medians)
        yield f"| {text} | {len(cells)} | {met} | {min(medians):.2f}x |"


def _table(found: Sequence[Measured]) -> Iterator[str]:
    yield "| model | from | to | threads | run | ours GB/s | memcpy GB/s | torch GB/s | ours / memcpy | ours / torch |"
    yield "| --- " * 10 + "|"
    for each in found:
        rates = " | ".join(
            f"{statistics.median(v):.1f}" for v in (each.ours, each.memcpy, each.torch)
        )
        ratios = " | ".join(_spread(_ratios(each, other)) for other in ("memcpy", "torch"))
        yield (
            f"| {each.model} | {each.src} | {each.dst} | {each.threads} | {_size(each.run)} "
            f"| {rates} | {ratios} |"
        )


def _ratios(each: Measured, other: str) -> list[float]:
    return [a / b for a, b in zip(each.ours, getattr(each, other), strict=True)]


def _spread(values: Sequence[float]) -> str:
    return f"**{statistics.median(values):.2f}x** ({min(values):.2f} to {max(values):.2f})"


def _size(count: int) -> str:
    return f"{count / 1024:g} KiB" if count >= 1024 else f"{count} B"


def write(found: Sequence[Measured], rounds: int, where: dict[str, str], out: Path) -> None:
    """`copies.json` and `copies.md`."""
    out.mkdir(parents=True, exist_ok=True)
    data = {"machine": where, "rounds": rounds, "cells": [asdict(each) for each in found]}
    (out / "copies.json").write_text(json.dumps(data, indent=1) + "\n")
    (out / "copies.md").write_text(page(found, rounds, where))


def run(rounds: int, threads: Sequence[int], out: Path, say: Callable[[str], None]) -> None:
    """Measure, and write the page."""
    where = machine.describe(out if out.exists() else ROOT)
    write(measure(rounds, threads, say), rounds, where, out)
    say(f"done: {out / 'copies.md'}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="of each cell (default %(default)s)")
    parser.add_argument(
        "--threads", type=int, nargs="+", default=THREADS, help="one table row each (default 1 2)"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs" / "benchmarks", help="folder of copies.md"
    )
    options = parser.parse_args()
    run(options.rounds, options.threads, options.out, lambda text: print(text, flush=True))


if __name__ == "__main__":
    main()
