"""The same workload on SGLang's file backend and on this one: what a restarted engine got back.

    SGLANG_USE_CPU_ENGINE=1 python -m lmcache_sglang.testing.compare_backends [modes|families] [NUMBER...]

Prints the tables of docs/sglang.md; NUMBER picks rows from 0, of `modes.MODES` or of
`families_workload.SERVICES`. Four real servers a row.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from . import families_workload, modes
from .engine import MEMORY, Setup, whole_pages
from .families_workload import SERVICES, Service
from .modes import FIRST, MODES, ONCE, Mode
from .tiny_families import make_tiny
from .tiny_model import make_tiny_llama

RESULTS = ("asked", "`file`", "`lmcache`", "same tokens")
SEED = 1  # of the models' weights


class Outcome(Protocol):
    """What a restarted engine got back from one backend."""

    @property
    def restored(self) -> int:
        """Tokens."""
        ...

    @property
    def right(self) -> Mapping[str, Sequence[int]]:
        """The tokens that an engine computed to which nothing was restored, by request."""
        ...

    @property
    def same(self) -> bool:
        """Whether the restarted engine gave these tokens."""
        ...


@dataclass(frozen=True, slots=True)
class Case:
    """A row: how it is served, how many tokens could come back, and the workload.

    `run` takes the store, and a folder for the model and the logs.
    """

    cells: Sequence[str]
    asked: int
    run: Callable[[Setup, Path], Outcome]


@dataclass(frozen=True, slots=True)
class Table:
    """Cases of one kind, and what their cells say."""

    columns: Sequence[str]
    cases: Sequence[Case]

    @property
    def head(self) -> str:
        names = (*self.columns, *RESULTS)
        return f"| {' | '.join(names)} |\n{'|---' * len(names)}|"


def of_mode(mode: Mode) -> Case:
    """Tokens of both prompts together."""
    overlap = "on" if mode.overlap else "off"
    flags = [mode.memory, mode.write, mode.prefetch, mode.layout, overlap]
    asked = sum(whole_pages(request, mode.page_size) for request in (FIRST, ONCE))

    def run(setup: Setup, folder: Path) -> Outcome:
        model = make_tiny_llama(folder / "model", seed=SEED, dtype="float32")
        return modes.run(model, setup, mode, folder)

    return Case([*flags, str(mode.page_size), str(mode.ranks)], asked, run)


def of_service(service: Service) -> Case:
    """Tokens of all requests together."""
    cells = [service.family, service.memory, str(service.page_size), str(service.ranks)]

    def run(setup: Setup, folder: Path) -> Outcome:
        model = make_tiny(service.family, folder / "model", seed=SEED)
        return families_workload.run(model, setup, service, folder)

    return Case(cells, service.asked, run)


TABLES = {
    "modes": Table(
        ("host memory", "write policy", "prefetch policy", "layout", "overlap", "page", "TP"),
        [of_mode(mode) for mode in MODES],
    ),
    "families": Table(
        ("family", "host memory", "page", "TP"), [of_service(service) for service in SERVICES]
    ),
}


def all_same(file: Outcome, ours: Outcome) -> bool:
    """Whether all four engines gave the same tokens."""
    return file.same and ours.same and file.right == ours.right


def row(case: Case, file: Outcome, ours: Outcome) -> str:
    """A line of the table."""
    numbers = [f"{tokens:,}" for tokens in (case.asked, file.restored, ours.restored)]
    same = "yes" if all_same(file, ours) else "**no**"
    return f"| {' | '.join([*case.cells, *numbers, same])} |"


def holds(file: Outcome, ours: Outcome) -> bool:
    """Whether this backend gave back as much as SGLang's, and neither another token."""
    return ours.restored >= file.restored and all_same(file, ours)


def fill(table: Table, numbers: Iterable[int], folder: Path) -> list[int]:
    """Print the rows as they come. Returns those that do not hold."""
    print(table.head, flush=True)
    bad = []
    for number in numbers:
        case, here = table.cases[number], folder / str(number)
        file = case.run(Setup(here / "file", backend="file"), here)
        ours = case.run(Setup(here / "lmcache"), here)
        print(row(case, file, ours), flush=True)
        if not holds(file, ours):
            bad.append(number)
    return bad


def main() -> None:
    chosen = _arguments()
    bad = {}
    with tempfile.TemporaryDirectory(prefix="lmcache-compare-") as scratch:
        try:
            for name, numbers in chosen.items():
                bad[name] = fill(TABLES[name], numbers, Path(scratch) / name)
                print(flush=True)
        finally:
            shutil.rmtree(MEMORY, ignore_errors=True)
    if any(bad.values()):
        sys.exit(f"less than the file backend, or other tokens: rows {bad}")


def _arguments() -> dict[str, Iterable[int]]:
    """The rows to run of each table."""
    parser = argparse.ArgumentParser(
        prog="python -m lmcache_sglang.testing.compare_backends",
        description="What a restarted engine gets back from SGLang's file backend and from lmcache, "
        "on real servers, four a row (half a minute to a minute and a half). Exits with 1 where "
        "lmcache gives back less, or an output differs.",
    )
    parser.add_argument("table", choices=TABLES, nargs="?", help="one table; otherwise both")
    parser.add_argument("rows", metavar="NUMBER", nargs="*", type=int, help="its rows, from 0")
    given = parser.parse_args()
    if given.table is None:
        return {name: range(len(table.cases)) for name, table in TABLES.items()}
    every = range(len(TABLES[given.table].cases))
    if not set(given.rows) <= set(every):
        parser.error(f"rows of {given.table} are 0 to {every[-1]}")
    return {given.table: given.rows or every}


if __name__ == "__main__":
    main()
