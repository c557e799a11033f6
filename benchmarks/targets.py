"""What our store is to reach, and whether it did. Ratios are of one round each, then the median."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.plan import BATCH, KIB, MIB
from benchmarks.results import BUSY, NO_REUSE, Results, Spread, ratio

PAGE = 2 * MIB
OVERHEAD_PAGE = 4 * KIB
STORE = "ours, through Store"
REOPENED = 100_000


@dataclass(frozen=True)
class Target:
    """`measured` is None where this run did not measure it."""

    text: str
    limit: float
    at_most: bool
    unit: str  # after the number; "x" for a ratio
    measured: Spread | None

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        value = self.measured.median
        return value <= self.limit if self.at_most else value >= self.limit


def evaluate(results: Results) -> list[Target]:
    """Every target, measured or not."""
    parts = (_lookups, _memory, _disk, _index, _serving)
    return [target for part in parts for target in part(results)]


def _lookups(results: Results) -> list[Target]:
    found = []
    for medium, subject in (("dram", STORE), ("dram", "ours"), ("nvme", "ours")):
        values = results.find("exists", medium, PAGE, subject)
        text = f"exists, batch of {BATCH}, {medium}, {subject}"
        found.append(Target(text, 1.2, True, " µs a key", Spread.of(values) if values else None))
    return found


def _memory(results: Results) -> list[Target]:
    compare = _comparer(results, "dram")
    two = ", 2 threads"
    return [
        compare("get", "ours" + two, "get", ["memcpy" + two], 1.0),
        compare("put", "ours" + two, "put", ["memcpy" + two], 0.95),
        compare("get", "ours", "get", ["memcpy"], 1.0),
        compare("put", "ours", "put", ["memcpy"], 0.95),
        compare("get", "ours", "get", ["Mooncake"], 1.1),
        compare("get", "ours" + two, "get", ["Mooncake" + two], 1.1),
        compare("get", "ours", "get", ["LMCache CPU"], 1.1),
        compare("get", "ours" + two, "get", ["LMCache CPU" + two], 1.1),
    ]


def _disk(results: Results) -> list[Target]:
    compare = _comparer(results, "nvme")
    durable, nixl = "durable put", ["NIXL io_uring", "NIXL AIO"]
    return [
        *[
            target
            for depth in (8, 32)
            for target in (
                compare("get", "ours", "get", [f"raw direct I/O, depth {depth}"], 0.90),
                compare(durable, "ours", durable, [f"raw direct I/O, depth {depth}"], 0.80),
            )
        ],
        compare("get", "ours", "get", ["HiCacheFile"], 3.0),
        compare(durable, "ours", durable, ["HiCacheFile"], 3.0),
        compare("get", "ours", "get", ["LMCache disk"], 3.0),
        compare(durable, "ours", durable, ["LMCache disk"], 3.0),
        compare("get", "ours", "get", nixl, 1.0),
        compare(durable, "ours", durable, nixl, 1.0),
        compare(durable, "ours", "put", nixl, 1.0),
    ]


def _comparer(results: Results, medium: str) -> Callable[[str, str, str, list[str], float], Target]:
    def compare(operation: str, mine: str, other: str, theirs: list[str], limit: float) -> Target:
        """Against the best of `theirs`, round by round."""
        values = results.find(operation, medium, PAGE, mine)
        peers = [found for name in theirs if (found := results.find(other, medium, PAGE, name))]
        best = [max(round_) for round_ in zip(*peers, strict=True)]
        cold = "cold " if medium == "nvme" and operation == "get" else ""
        not_same = " (theirs not durable)" if other != operation else ""
        text = f"{medium}: {mine}, {cold}{operation} / {' or '.join(theirs)}{not_same}"
        measured = ratio(values, best) if values and best else None
        return Target(text, limit, False, "x", measured)

    return compare


def _index(results: Results) -> list[Target]:
    opened = [
        one.first_true_seconds
        for one in results.reopened
        if one.subject == "ours" and one.medium == "nvme" and one.found == one.pages >= REOPENED
    ]
    per_page = [one.index_bytes for one in results.grown]
    return [
        *[
            Target(f"{call} of {BATCH} pages of 4 KiB, {STORE}: the call", 0.5, True, " ms", spread)
            for call, spread in (("get", _call(results, "get")), ("put", _call(results, "put")))
        ],
        Target(
            "reopen 100,000 pages to the first true exists, nvme", 1.0, True, " s", _spread(opened)
        ),
        Target("index bytes a page, at any count", 256.0, True, " bytes", _spread(per_page)),
    ]


def _serving(results: Results) -> list[Target]:
    """Of a real engine: on a GPU the part of it that computes is elsewhere; here it shares the cores."""

    def compare(workload: str, metric: str, other: str, limit: float) -> Target:
        ours = results.find_served(workload, "lmcache", metric)
        theirs = results.find_served(workload, other, metric)
        text = f"SGLang, {workload}: lmcache / {other}, {metric.partition(',')[0]}"
        return Target(text, limit, True, "x", ratio(ours, theirs) if ours and theirs else None)

    return [
        compare(BUSY, "mean, ms", "null", 1.02),
        compare(BUSY, "median, ms", "null", 1.02),
        compare(NO_REUSE, "seconds", "off", 1.01),
        compare(NO_REUSE, "seconds", "null", 1.01),
    ]


def _call(results: Results, operation: str) -> Spread | None:
    """Milliseconds of one call, its arguments made included: no less than its time in Python."""
    rates = results.find(operation, "dram", OVERHEAD_PAGE, STORE)
    prepared = results.find("prepare", "dram", OVERHEAD_PAGE, STORE)
    if not rates or not prepared:
        return None
    moved = BATCH * OVERHEAD_PAGE
    pairs = zip(rates, prepared, strict=True)
    return Spread.of([moved / (rate * 1e6) + made / 1e3 for rate, made in pairs])


def _spread(values: Sequence[float]) -> Spread | None:
    return Spread.of(values) if values else None
