"""``lmcache-sglang simulate``: what a cache would have served of a trace."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    from ..simulation import Simulated

EPILOG = """\
TRACE has a request a line, as JSON: {"hash_ids": [...]}, the ids of a prompt's blocks in their order, as Mooncake's public
traces have them. A block is a hit when it and all before it are there.

policies:
  default       gives up what is least likely to be of use again, as learned from the trace so far, chains from their end
                (simulated only: the store has lru, sieve, which is its default, and s3-fifo)
  lru           least recently used
  sieve         SIEVE (NSDI '24)
  s3-fifo       S3-FIFO (SOSP '23)
  second-touch  LRU that takes a block when it is used for the second time
  belady        knows when each block is used next: hardly any policy can do better

examples:
  lmcache-sglang simulate trace.jsonl
  lmcache-sglang simulate trace.jsonl --blocks 1000,10000,30000 --policy default,lru --json
"""
DEFAULT_POLICIES = ("default", "lru", "sieve", "s3-fifo", "second-touch", "belady")
PARTS = (0.01, 0.03, 0.1, 0.3)  # of a trace's different blocks, where no size is given


def add_parser(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "simulate",
        help="what a cache would have served of a trace",
        description="Replay a trace against caches of several sizes and policies, without an engine.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("trace", type=Path, metavar="TRACE", help="the file")
    parser.add_argument(
        "--blocks",
        type=_sizes,
        metavar="N,...",
        help="room of the caches, in blocks (default: 1, 3, 10 and 30 %% of the trace's different ones)",
    )
    parser.add_argument(
        "--policy",
        type=_policies,
        default=DEFAULT_POLICIES,
        metavar="NAME,...",
        help="what gives way (default: all of them)",
    )
    parser.add_argument("--json", action="store_true", help="print a list of objects")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Replay it. Returns the exit status. Raises: TraceError."""
    from ..simulation import Trace

    trace = Trace.read(options.trace)
    sizes = options.blocks or sorted({max(1, int(trace.distinct * part)) for part in PARTS})
    found: list[Simulated] = []
    for policy in options.policy:
        for blocks in sizes:
            _say(f"{policy}, {blocks} blocks ({len(found) + 1}/{len(options.policy) * len(sizes)})")
            found.append(trace.simulate(policy, blocks))
    _say("")
    if options.json:
        print(json.dumps([each.as_json() for each in found], indent=1))
        return 0
    print(f"{trace.requests:,} requests, {trace.blocks:,} blocks, {trace.distinct:,} different")
    for line in _table(found, sizes):
        print(line)
    return 0


def _say(what: str) -> None:
    """How far it is, where somebody watches."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{what}", end="", file=sys.stderr, flush=True)


def _table(found: Sequence[Simulated], sizes: Sequence[int]) -> Iterator[str]:
    """Hit rates: a row a policy, a column a size."""
    width = max(len(each.policy) for each in found)
    yield " ".join([f"{'hit rate':<{width}}", *(f"{size:>12,}" for size in sizes)])
    for policy in dict.fromkeys(each.policy for each in found):
        rates = [each.hit_rate for each in found if each.policy == policy]
        yield " ".join([f"{policy:<{width}}", *(f"{rate:>12.3f}" for rate in rates)])


def _sizes(text: str) -> list[int]:
    sizes = []
    for word in text.split(","):
        size = int(word.replace("_", "")) if word.replace("_", "").isdecimal() else 0
        if not 0 < size < 1 << 32:
            raise argparse.ArgumentTypeError(f"{word!r} is no number of blocks")
        sizes.append(size)
    return sizes


def _policies(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in DEFAULT_POLICIES]:
        known = ", ".join(DEFAULT_POLICIES)
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {known}")
    return names
