"""``lmcache-sglang simulate``: what a cache would have served of a trace."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .sizes import count_of, size

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    from ..simulation import Simulated, Trace

EPILOG = """\
TRACE has a request a line, as JSON: {"hash_ids": [...]}, the ids of a prompt's blocks in their order, as Mooncake's public
traces have them. A block is a hit when it and all before it are there. Hit rates are of the trace and the cache alone; what they
are worth depends on the model and the machine, and is estimated for those that the options name.

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
  lmcache-sglang simulate trace.jsonl --plot trace.png \\
      --block-bytes 64MiB --compute-speed 5000 --load-speed 4GiB
"""
PICTURES = (".png", ".svg", ".pdf")
DAY = 86_400.0  # seconds
DEFAULT_POLICIES = ("default", "lru", "sieve", "s3-fifo", "second-touch", "belady")
PARTS = (0.01, 0.03, 0.1, 0.3)  # of a trace's different blocks, where no size is given


@dataclass(frozen=True, slots=True)
class Figure:
    """One of what a simulation found. `values`: for each policy and size. `said`: how a value is written."""

    title: str
    values: Sequence[float]
    said: Callable[[float], str]


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
    parser.add_argument(
        "--block-bytes",
        type=count_of,
        metavar="SIZE",
        help="of a block in the store, as 64MiB: also say what a disk would be written",
    )
    parser.add_argument(
        "--block-tokens",
        type=_tokens,
        default=512,
        metavar="N",
        help="in a block (default: 512, as in Mooncake's traces)",
    )
    parser.add_argument(
        "--compute-speed",
        type=_speed,
        metavar="N",
        help="tokens of a prompt that the engine computes in a second; with --load-speed and --block-bytes: "
        "also estimate by how much the first token comes earlier",
    )
    parser.add_argument(
        "--load-speed", type=count_of, metavar="SIZE", help="that comes from the store in a second"
    )
    parser.add_argument(
        "--plot",
        type=_picture,
        metavar="FILE",
        help="draw them as well, as .png, .svg or .pdf; needs matplotlib: pip install 'lmcache-sglang[plot]'",
    )
    parser.add_argument("--json", action="store_true", help="print a list of objects")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Replay it. Returns the exit status. Raises: TraceError, PictureError."""
    from ..simulation import Trace

    if says := _lacks(options):
        print(f"lmcache-sglang simulate: error: {says}", file=sys.stderr)
        return 2
    if options.plot:  # before the work, which would be lost without it
        from .simulation_plot import draw
    trace = Trace.read(options.trace)
    sizes = options.blocks or sorted({max(1, int(trace.distinct * part)) for part in PARTS})
    found: list[Simulated] = []
    for policy in options.policy:
        for blocks in sizes:
            _say(f"{policy}, {blocks} blocks ({len(found) + 1}/{len(options.policy) * len(sizes)})")
            found.append(trace.simulate(policy, blocks))
    _say("")
    worths = [_worth(each, trace, options) for each in found]
    figures = list(_figures(found, worths))
    if options.json:
        listed = [each.as_json() | worth for each, worth in zip(found, worths, strict=True)]
        print(json.dumps(listed, indent=1))
    else:
        print(f"{trace.requests:,} requests, {trace.blocks:,} blocks, {trace.distinct:,} different")
        for figure in figures:
            print(*_table(figure, found, sizes), sep="\n")
    if options.plot:  # last: where it cannot be written, the figures were said
        draw(figures, found, options.plot)
    return 0


def _lacks(options: argparse.Namespace) -> str:
    """What is missing for the estimate that is asked for; empty: nothing."""
    needed = ("block_bytes", "compute_speed", "load_speed")
    missing = [name for name in needed if getattr(options, name) is None]
    if options.compute_speed is options.load_speed is None or not missing:
        return ""
    flags = " and ".join(f"--{name.replace('_', '-')}" for name in missing)
    return f"to estimate when the first token comes, {flags} must be given too"


def _worth(found: Simulated, trace: Trace, options: argparse.Namespace) -> dict[str, float]:
    """Figures beyond the simulation's, of the model and the machine that the options describe, by their names in the JSON."""
    from ..simulation import Speeds

    worth: dict[str, float] = {}
    if options.block_bytes:
        worth["written_bytes"] = found.written_blocks * options.block_bytes
        if trace.seconds:
            worth["written_bytes_a_day"] = worth["written_bytes"] / trace.seconds * DAY
    if options.compute_speed:
        speeds = Speeds(options.compute_speed, options.load_speed)
        saved = speeds.saved_seconds(options.block_tokens, options.block_bytes)
        worth["ttft_saved_seconds"] = found.hit_blocks * saved / trace.requests
    return worth


def _say(what: str) -> None:
    """How far it is, where somebody watches."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{what}", end="", file=sys.stderr, flush=True)


def _figures(found: Sequence[Simulated], worths: Sequence[Mapping[str, float]]) -> Iterator[Figure]:
    """What is shown, a table or a panel each."""
    yield Figure("hit rate", [each.hit_rate for each in found], "{:.3f}".format)
    known = worths[0].keys()  # all know the same
    written = "written_bytes_a_day" if "written_bytes_a_day" in known else "written_bytes"
    if written in known:
        title = "written a day" if written.endswith("day") else "written"
        yield Figure(
            title, [worth[written] for worth in worths], lambda count: size(max(0, int(count)))
        )
    if "ttft_saved_seconds" in known:
        saved = [worth["ttft_saved_seconds"] for worth in worths]
        yield Figure("first token earlier by, on average", saved, "{:.3f} s".format)


def _table(figure: Figure, found: Sequence[Simulated], sizes: Sequence[int]) -> Iterator[str]:
    """A row a policy, a column a size."""
    width = max(len(each.policy) for each in found)
    yield f"{figure.title}:"
    yield " ".join([f"{'blocks':<{width}}", *(f"{blocks:>12,}" for blocks in sizes)])
    for policy in dict.fromkeys(each.policy for each in found):
        values = zip(found, figure.values, strict=True)
        cells = [figure.said(value) for each, value in values if each.policy == policy]
        yield " ".join([f"{policy:<{width}}", *(f"{cell:>12}" for cell in cells)])


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix not in PICTURES:
        raise argparse.ArgumentTypeError(f"{text!r} does not end with {' or '.join(PICTURES)}")
    return path


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


def _tokens(text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text) or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens")
    return int(text)


def _speed(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,12}(?:\.[0-9]+)?", text) or not float(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens a second")
    return float(text)
