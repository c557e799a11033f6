"""Interleaved rounds of one cell: every subject once, then every subject again, in turned order.

The round before the first is measured like the others and thrown away: it touches memory and makes files
for the first time. A subject that fails in a cell is left out of it and named in the report.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.catalog import Places, Spec
from benchmarks.crew import Crew, in_turn
from benchmarks.plan import Cell
from benchmarks.results import About, Results, Series

EXISTS_KEYS = 16_384  # looked up at least, by each process, in one timed call
SURELY_COLD = 0.01  # of the bytes in the page cache before a cold read
Say = Callable[[str], None]


class _Cell:
    """The crews of one cell, and what they have measured so far."""

    def __init__(self, cell: Cell, specs: Sequence[Spec], place: Path, results: Results, say: Say):
        self._cell = cell
        self._results = results
        self._say = say
        self._values: dict[tuple[str, str], list[float]] = defaultdict(list)  # operation, subject
        self._folders = {spec.name: place / spec.slug for spec in specs}
        self._crews: dict[str, Crew] = {}  # those that have not failed
        for spec in specs:
            folder = self._folders[spec.name]
            self._crews[spec.name] = Crew(spec, cell.size, folder, cell.processes)

    def each(self, action: Callable[[Crew], object], turn: int = 0) -> None:
        """Do it with every crew in turn, the first one being another each time."""
        in_turn(self._crews, action, turn, self._leave_out)

    def open(self, crew: Crew) -> None:
        answer = crew.open()
        about = (answer["version"], answer["setup"], answer["durable"])
        self._results.about(About(crew.spec.name, crew.spec.medium, *about))

    def add(self, crew: Crew, found: dict[str, float]) -> None:
        for operation, value in found.items():
            self._values[operation, crew.spec.name].append(value)

    def note_cached(self, crew: Crew, part: float) -> None:
        """A file that stayed in the page cache makes a read that is not cold; the report says so."""
        if part > SURELY_COLD:
            name = crew.spec.name
            self._results.not_cold[name] = max(part, self._results.not_cold.get(name, 0.0))

    def finish(self, rounds: int) -> None:
        """Keep what was measured in every round."""
        cell = self._cell
        for (operation, name), values in self._values.items():
            if len(values) == rounds:
                series = Series(
                    operation, cell.medium, cell.page_bytes, cell.processes, name, values
                )
                self._results.series.append(series)

    def end(self) -> None:
        for crew in self._crews.values():
            crew.hang_up()
        for crew in self._crews.values():
            crew.end()
        for folder in self._folders.values():
            shutil.rmtree(folder, ignore_errors=True)

    def _leave_out(self, name: str, reason: str) -> None:
        self._results.fail(name, self._cell.medium, where(self._cell), reason)
        self._say(f"  {name}: {reason}")
        self._crews.pop(name).end()


def measure(
    cell: Cell,
    specs: Sequence[Spec],
    rounds: int,
    operations: Sequence[str],
    places: Places,
    results: Results,
    say: Say,
) -> None:
    """Measure a cell and add it to the results."""
    table = _Cell(cell, specs, places[cell.medium], results, say)

    def one_round(crew: Crew) -> None:
        found = _round(crew, number, operations, table)
        if number >= 0:
            table.add(crew, found)

    try:
        table.each(table.open)
        for number in range(-1, rounds):
            table.each(one_round, turn=number)
            say("  warmed up" if number < 0 else f"  round {number + 1} of {rounds}")
        table.each(lambda crew: crew.do("close"))
        table.finish(rounds)
    finally:
        table.end()


def where(cell: Cell) -> str:
    size = cell.page_bytes
    text = f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"
    return f"{cell.medium}, pages of {text}, {cell.processes} process{'es' * (cell.processes > 1)}"


def _round(crew: Crew, number: int, operations: Sequence[str], table: _Cell) -> dict[str, float]:
    """Put, sync, look up, read cold, compare, forget; what was measured, by operation."""
    found: dict[str, float] = {}
    keys = crew.size.pages
    on_disk = crew.spec.medium == "nvme"
    prepared = crew.begin(f"{crew.spec.medium}/{crew.spec.name}/{number}")
    found["prepare"] = prepared["seconds"] / prepared["batches"] * 1e6
    put = crew.time("put")
    found["put"] = crew.bytes / put / 1e9
    if on_disk:
        found["durable put"] = crew.bytes / (put + crew.time("sync")) / 1e9
    if "exists" in operations and not crew.spec.is_limit:
        repeat = -(-EXISTS_KEYS // keys)
        found["exists"] = crew.time("exists", repeat=repeat) / (keys * repeat) * 1e6
    if "get" in operations:
        crew.do("blank")
        if on_disk:
            left = [answer["cached"] for answer in crew.do("drop") if answer["cached"] is not None]
            table.note_cached(crew, max(left, default=0) / crew.bytes)
        found["get"] = crew.bytes / crew.time("get") / 1e9
        crew.do("verify")
    crew.do("forget")
    return found
