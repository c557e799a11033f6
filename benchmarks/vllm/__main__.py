"""`python -m benchmarks.vllm`; it runs in vLLM's environment."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks import machine
from benchmarks.catalog import CACHE, ROOT
from benchmarks.subjects.base import SubjectError
from benchmarks.vllm import rounds
from benchmarks.vllm.report import About, Run, write
from benchmarks.vllm.subjects import SUBJECTS, Subject, make_lmcache

ROUNDS = 5


def main() -> None:
    options = _options()
    chosen = [each for each in SUBJECTS if each.name in options.subjects.split(",")]
    failed: dict[str, str] = {}
    if any(each.has_server for each in chosen):
        try:
            make_lmcache()
        except SubjectError as error:
            failed["lmcache"] = str(error)
            chosen = [each for each in chosen if not each.has_server]
    count = 1 if options.quick else options.rounds
    with tempfile.TemporaryDirectory(dir=_cache(), prefix="vllm-") as name:
        folder = Path(name)
        run = Run(
            machine.describe(folder),
            [About(each.name, each.label, each.warm, each.about) for each in chosen],
            rounds.TOKEN_BYTES,
            failed=failed,
        )
        path = rounds.model(folder / "model")
        for number in range(count):
            print(f"round {number + 1} of {count}", flush=True)
            told = rounds.measure(number, _turned(chosen, number), path, folder, _say)
            run.rounds.append({name: asdict(each) for name, each in told.items()})
            run.machine["load at end"] = f"{os.getloadavg()[0]:.2f}"
            write(run, rounds.SETTING, options.out)
    print(f"written: {options.out / 'vllm.md'}")


def _turned(subjects: Sequence[Subject], number: int) -> list[Subject]:
    """Another one first in each round."""
    at = number % len(subjects)
    return [*subjects[at:], *subjects[:at]]


def _cache() -> Path:
    CACHE.mkdir(parents=True, exist_ok=True)
    return CACHE


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}{line}", file=sys.stderr, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vllm")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--quick", action="store_true", help="one round")
    names = ",".join(each.name for each in SUBJECTS)
    parser.add_argument("--subjects", default=names, help=f"of {names}; none is needed")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    return parser.parse_args()


if __name__ == "__main__":
    main()
