"""What a run measured. Kept as JSON; tables, targets and plot are made from it and from nothing else."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.catalog import ROOT

BUSY, NO_REUSE = "busy", "no reuse"  # workloads of a real engine


@dataclass(frozen=True)
class Series:
    """One operation of one subject, a value a round.

    Operations: put, durable put, get in GB/s (10^9 bytes); exists in microseconds a key; prepare in
    microseconds a batch, what the caller spends on arguments.
    """

    operation: str
    medium: str
    page_bytes: int
    processes: int
    subject: str
    values: list[float]


@dataclass(frozen=True)
class Failure:
    subject: str
    medium: str
    where: str
    reason: str


@dataclass(frozen=True)
class Reopened:
    """A store closed, its files out of the page cache, and opened by a new process."""

    subject: str
    medium: str
    pages: int
    found: int
    open_seconds: float
    first_true_seconds: float  # from the start of opening to the first answer to `exists`


@dataclass(frozen=True)
class Grown:
    """Our index with so many entries. Microseconds a key, in batches of 128, median (and 99th)."""

    medium: str
    entries: int
    lookup: float
    lookup_p99: float
    insert: float
    insert_p99: float
    evict: float  # inserts that evict
    index_bytes: float  # a page: used by the index
    beside_bytes: float  # a page: allocated for all files but the pages' own


@dataclass(frozen=True)
class Served:
    """One figure of a workload on a real engine, a value a round."""

    workload: str
    subject: str
    metric: str
    values: list[float]


@dataclass(frozen=True)
class About:
    """What the report says of a subject."""

    subject: str
    medium: str
    version: str
    setup: str
    durable: str


@dataclass
class Results:
    machine: dict[str, str]
    mode: str
    rounds: int
    seconds: float = 0.0
    subjects: list[About] = field(default_factory=list)
    series: list[Series] = field(default_factory=list)
    reopened: list[Reopened] = field(default_factory=list)
    grown: list[Grown] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    served: list[Served] = field(default_factory=list)
    served_on: str = ""  # when, and with how much else going on
    not_cold: dict[str, float] = field(
        default_factory=dict
    )  # part of the files still in the page cache

    def find(
        self, operation: str, medium: str, page_bytes: int, subject: str, processes: int = 1
    ) -> list[float] | None:
        """A value a round, or None if it was not measured."""
        wanted = (operation, medium, page_bytes, processes, subject)
        for one in self.series:
            if (one.operation, one.medium, one.page_bytes, one.processes, one.subject) == wanted:
                return one.values
        return None

    def find_served(self, workload: str, subject: str, metric: str) -> list[float] | None:
        """A value a round, or None if it was not measured."""
        wanted = (workload, subject, metric)
        for one in self.served:
            if (one.workload, one.subject, one.metric) == wanted:
                return one.values
        return None

    def about(self, about: About) -> None:
        if about not in self.subjects:
            self.subjects.append(about)

    def fail(self, subject: str, medium: str, where: str, reason: str) -> None:
        """Note that something could not run. The results are published, so without this machine's paths."""
        self.failures.append(Failure(subject, medium, where, reason.replace(f"{ROOT}/", "")))

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        raw = json.loads(path.read_text())
        kinds = (
            ("subjects", About),
            ("series", Series),
            ("reopened", Reopened),
            ("grown", Grown),
            ("failures", Failure),
            ("served", Served),
        )
        for name, kind in kinds:
            raw[name] = [kind(**each) for each in raw.get(name, [])]
        return cls(**raw)


@dataclass(frozen=True)
class Spread:
    """Median and range of a value a round."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Of each round by itself, so that a noisy moment hits both sides of it."""
    return Spread.of([a / b for a, b in zip(ours, theirs, strict=True)])
