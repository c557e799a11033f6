"""The command line of the benchmarks."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks import (
    copies,
    environments,
    machine,
    plan,
    reopen,
    report,
    rounds,
    serving,
    sharing,
)
from benchmarks.catalog import CACHE, FAMILIES, PEERS, ROOT, SPECS, Places, Spec
from benchmarks.crew import CouldNotRun, Crew, Size
from benchmarks.results import Grown, Results

MEMORY = Path("/dev/shm")
GROWTH_SECONDS = 3600.0  # for one count

DESCRIPTION = """\
Measures our store beside its peers and beside what the machine can do, all in one run: put, get (cold on
disk) and exists in memory and on disk, with pages of several sizes and with several processes; what is
left after a restart, and how soon; and what the index costs as it grows. Every page that is read is
compared byte for byte with what was put.

Each peer gets an environment of its own in .cache/bench, made when it is first needed. One that cannot be
installed or started is named in the report with the reason.
"""

EPILOG = """\
examples:
  make bench ARGS=--quick                        about 3 minutes: does it work, and roughly how fast
  make bench                                     about 20 minutes: the tables in docs/benchmarks
  make bench ARGS="--full --data /nvme/bench"    an hour or so, on another disk
  python -m benchmarks --subjects ours,memcpy --only get,put --out /tmp/bench
                                                 while working on one path
  make bench ARGS=--serving                      about 6 minutes: what a store costs a real SGLang engine; its
                                                 tables are added to those that are there
  make bench ARGS=--copies                       about 6 minutes: copies between layouts beside memcpy and torch
  make bench ARGS=--sharing                      about 6 minutes: pages of another process over TCP; more options:
                                                 python -m benchmarks.sharing --help
  python -m benchmarks --report                  tables and plot again from results.json

The machine should do nothing else. Rounds are interleaved and ratios are taken within a round, so noise
widens the spread rather than favouring one side; a spread as wide as the difference means: measure again.
"""


def main() -> int:
    options = _parser().parse_args()
    results_file = options.out / "results.json"
    if options.report:
        _write(Results.load(results_file), options.out)
        return 0
    chosen = _mode(options)
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:5.0f} s] {text}", flush=True)

    if options.copies:
        copies.run(options.rounds or chosen.rounds, copies.THREADS, options.out, say)
        return 0
    if options.sharing:
        sizes = sharing.QUICK_SIZES if options.mode == "quick" else sharing.SIZES
        sharing.run(sizes, options.rounds or chosen.rounds, sharing.FAMILIES, options.out, say)
        return 0
    if options.serving:
        _serve(options, chosen.rounds, results_file, say)
        return 0
    with _places(options.data) as places:
        results = Results(
            machine.describe(places["nvme"]), options.mode, options.rounds or chosen.rounds
        )
        specs = _installed(_specs(options.subjects), results, say)
        _run(chosen, specs, options.only, places, results, say)
    results.seconds = time.monotonic() - started
    results.save(results_file)
    _write(results, options.out)
    say(f"done: {options.out / 'README.md'}")
    return 0


@contextmanager
def _places(disk: Path) -> Iterator[Places]:
    """Fresh folders: on the disk to measure, and in memory for stores that share it by files."""
    disk.mkdir(parents=True, exist_ok=True)
    memory = MEMORY if os.access(MEMORY, os.W_OK) else disk
    with (
        tempfile.TemporaryDirectory(prefix="bench-", dir=memory) as dram,
        tempfile.TemporaryDirectory(prefix="bench-", dir=disk) as nvme,
    ):
        yield {"dram": Path(dram), "nvme": Path(nvme)}


def _serve(options: argparse.Namespace, rounds: int, results_file: Path, say: rounds.Say) -> None:
    """Only this part, beside what an earlier run has left of the others."""
    with _places(options.data) as places:
        where = machine.describe(places["nvme"])
        earlier = results_file.exists()
        results = Results.load(results_file) if earlier else Results(where, options.mode, rounds)
        say("a real engine")
        results.served = serving.measure(options.rounds or rounds, places["nvme"], say)
    results.served_on = f"{where['date']}, {where['cores']} cores, load {where['load at start']}"
    results.save(results_file)
    _write(results, options.out)
    say(f"done: {options.out / 'README.md'}")


def _run(
    chosen: plan.Plan,
    specs: list[Spec],
    operations: list[str],
    places: Places,
    results: Results,
    say: rounds.Say,
) -> None:
    timed = [name for name in operations if name in ("put", "get", "exists")]
    for cell in chosen.cells if timed else ():
        beside = [spec for spec in specs if spec.medium == cell.medium]
        if cell.page_bytes == report.SMALL_CELL:
            beside = [spec for spec in beside if spec.family == "ours" and not spec.is_twin]
        if cell.processes > 1:  # are enough threads already
            beside = [spec for spec in beside if not spec.is_twin]
        if not beside:
            continue
        say(rounds.where(cell))
        rounds.measure(cell, beside, results.rounds, timed, places, results, say)
    if "reopen" in operations:
        say("after a restart")
        reopen.measure(specs, chosen.reopen_pages, places, results, say)
    if "growth" in operations and any(spec.family == "ours" for spec in specs):
        say("the index as it grows")
        _grow(chosen.growth, places, results, say)


def _grow(
    steps: Iterable[tuple[str, int]], places: Places, results: Results, say: rounds.Say
) -> None:
    """Each count in a process of its own, so that memory is counted from the start."""
    ours = next(spec for spec in SPECS if spec.family == "ours")
    for medium, entries in steps:
        place = places.get(medium, places["dram"]) / "growth"
        crew = Crew(
            ours, Size(page_bytes=0, pages=0, batch_pages=0), place, deadline=GROWTH_SECONDS
        )
        try:
            crew.wait_ready()
            answer = crew.do("grow", medium=medium, directory=str(place), count=entries)[0]
            results.grown.append(Grown(medium, entries, **answer))
            say(f"  {medium}, {entries:,}: {answer['lookup']:.2f} µs a lookup")
        except CouldNotRun as error:
            results.fail("ours", medium, f"growth to {entries:,}", str(error))
            say(f"  {medium}, {entries:,}: {error}")
        finally:
            crew.end()
            shutil.rmtree(place, ignore_errors=True)


def _installed(specs: list[Spec], results: Results, say: rounds.Say) -> list[Spec]:
    """Those whose environment is there or can be made."""
    missing: dict[str, str] = {}
    for peer in PEERS:
        if any(spec.venv == peer for spec in specs):
            reason = environments.make(peer)
            if reason:
                missing[peer] = reason
                say(f"{peer}: {reason}")
    for spec in specs:
        if spec.venv in missing:
            results.fail(spec.name, spec.medium, "installation", missing[spec.venv])
    return [spec for spec in specs if spec.venv not in missing]


def _write(results: Results, out: Path) -> None:
    """Tables and plot."""
    (out / "README.md").write_text(report.markdown(results))
    reason = environments.make("plot")
    if reason:
        print(f"no plot: {reason}", file=sys.stderr)
        return
    command = [str(CACHE / "plot" / "bin" / "python"), "-m", "benchmarks.plot"]
    subprocess.run(
        [*command, str(out / "results.json"), str(out / "results.png")],
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def _specs(families: Iterable[str]) -> list[Spec]:
    return [spec for spec in SPECS if spec.family in families]


def _mode(options: argparse.Namespace) -> plan.Plan:
    modes = {"quick": plan.QUICK, "default": plan.DEFAULT, "full": plan.FULL}
    return modes[options.mode]


def _list_of(allowed: tuple[str, ...]) -> Callable[[str], list[str]]:
    """The type of an option that takes some of these words."""

    def parse(text: str) -> list[str]:
        words = text.split(",")
        for word in words:
            if word not in allowed:
                raise argparse.ArgumentTypeError(f"{word!r} is none of {', '.join(allowed)}")
        return words

    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    mode = parser.add_mutually_exclusive_group()
    for name, text in (("quick", "two page sizes, 3 rounds"), ("full", "11 rounds, 10^7 entries")):
        mode.add_argument(
            f"--{name}", dest="mode", action="store_const", const=name, default="default", help=text
        )
    parser.add_argument(
        "--only",
        type=_list_of(plan.OPERATIONS),
        default=list(plan.OPERATIONS),
        metavar="A,B",
        help="of " + ", ".join(plan.OPERATIONS) + "; a get or exists puts as well",
    )
    parser.add_argument(
        "--subjects",
        type=_list_of(FAMILIES),
        default=list(FAMILIES),
        metavar="A,B",
        help="of " + ", ".join(FAMILIES),
    )
    parser.add_argument("--rounds", type=int, help="measured rounds, instead of the mode's")
    parser.add_argument(
        "--data",
        type=Path,
        default=CACHE / "data",
        help="directory on the disk to measure (default: .cache/bench/data)",
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs" / "benchmarks", help="directory of the results"
    )
    parser.add_argument(
        "--copies",
        action="store_true",
        help="measure copies of pages between an engine's layouts, only",
    )
    parser.add_argument(
        "--serving",
        action="store_true",
        help="measure a real engine with and without a store, only",
    )
    parser.add_argument(
        "--sharing",
        action="store_true",
        help="measure how pages of another process come over TCP, only",
    )
    parser.add_argument(
        "--report", action="store_true", help="measure nothing, write tables and plot"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
