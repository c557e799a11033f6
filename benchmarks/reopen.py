"""What is still there after a restart, and how soon: put, close, drop the page cache, open anew."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.catalog import Places, Spec
from benchmarks.crew import CouldNotRun, Crew, Size
from benchmarks.plan import BATCH
from benchmarks.results import Reopened, Results

SMALL = 4 << 10  # bytes of a page: what counts here is how many there are
NAME = "reopen"  # of the pages: the second process asks for the same ones


def measure(
    specs: Sequence[Spec], pages: int, places: Places, results: Results, say: Callable[[str], None]
) -> None:
    """Our store with `pages`, and each peer with one batch, to see what a restart leaves."""
    for spec in specs:
        if spec.is_twin or spec.is_limit:
            continue
        place = places[spec.medium] / "reopen"
        counts = (BATCH, pages) if spec.family == "ours" else (BATCH,)
        for count in counts:
            try:
                one = _reopen(spec, Size(SMALL, count, BATCH), place)
            except CouldNotRun as error:
                results.fail(spec.name, spec.medium, "reopen", str(error))
                say(f"  {spec.name}: {error}")
                continue
            finally:
                shutil.rmtree(place, ignore_errors=True)
            results.reopened.append(one)
            say(f"  {spec.medium} {spec.name}: {one.found:,} of {count:,} pages")


def _reopen(spec: Spec, size: Size, directory: Path) -> Reopened:
    before = Crew(spec, size, directory)
    try:
        before.open()
        before.begin(NAME)
        before.time("put")
        before.time("sync")
        before.do("drop")
        before.do("close")
    finally:
        before.end()
    after = Crew(spec, size, directory)
    try:
        opened = after.open()
        after.begin(NAME)
        first = after.do("found_first")[0]
        found = after.do("found")[0]
        after.do("close")
    finally:
        after.end()
    seconds = float(opened["seconds"])
    return Reopened(
        spec.name, spec.medium, size.pages, found["found"], seconds, seconds + first["seconds"]
    )
