"""The same workload on SGLang's file backend and on this one: what a restarted engine got back.

    SGLANG_USE_CPU_ENGINE=1 python -m lmcache_sglang.testing.compare_backends [NUMBER...]

Prints the table of docs/sglang.md; NUMBER picks rows of `modes.MODES`, from 0. Four real servers a row.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from .engine import MEMORY, Setup, whole_pages
from .modes import FIRST, MODES, ONCE, Mode, Run, run
from .tiny_model import make_tiny_llama

HEAD = (
    "| host memory | write policy | prefetch policy | layout | overlap | page | TP "
    "| asked | `file` | `lmcache` | same tokens |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)


def compare(mode: Mode, model: Path, folder: Path) -> tuple[Run, Run]:
    """What SGLang's file backend gave back, and what this one did."""
    file = Setup(folder / "file", backend="file")
    ours = Setup(folder / "lmcache")
    return run(model, file, mode, folder), run(model, ours, mode, folder)


def row(mode: Mode, file: Run, ours: Run) -> str:
    """A line of the table; tokens of both prompts together."""
    asked = sum(whole_pages(request, mode.page_size) for request in (FIRST, ONCE))
    same = file.same and ours.same
    overlap = "on" if mode.overlap else "off"
    flags = [mode.memory, mode.write, mode.prefetch, mode.layout, overlap]
    numbers = [mode.page_size, mode.ranks, asked, file.restored, ours.restored]
    cells = [*flags, *map(str, numbers), "yes" if same else "**no**"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lmcache_sglang.testing.compare_backends",
        description="what a restarted engine gets back from SGLang's file backend and from lmcache",
    )
    parser.add_argument("rows", metavar="NUMBER", nargs="*", type=int)
    every = range(len(MODES))
    chosen = parser.parse_args().rows or every
    if not set(chosen) <= set(every):
        parser.error(f"rows are 0 to {every[-1]}")
    less = []
    print(HEAD)
    with tempfile.TemporaryDirectory(prefix="lmcache-compare-") as scratch:
        folder = Path(scratch)
        model = make_tiny_llama(folder / "model", seed=1, dtype="float32")
        try:
            for number in chosen:
                file, ours = compare(MODES[number], model, folder / str(number))
                print(row(MODES[number], file, ours), flush=True)
                if ours.restored < file.restored or not ours.same:
                    less.append(number)
        finally:
            shutil.rmtree(MEMORY, ignore_errors=True)
    if less:
        sys.exit(f"less than the file backend, or other tokens: rows {less}")


if __name__ == "__main__":
    main()
