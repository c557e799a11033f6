"""One command for a machine with a GPU: are the copies right, how fast are they, and does SGLang run with the store."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks import gpu_copies, gpu_overlap
from benchmarks.gpu_copies import LARGE, Machine, Place
from benchmarks.gpu_report import Report, Served
from lmcache_sglang.errors import CudaUnavailableError
from lmcache_sglang.kernels.cuda import CudaCopier

ROOT = Path(__file__).parents[1]
NO_GPU = 2  # exit status
ROUNDS = 5
QUICK_PAGES = 8
QUICK_RUNS = 16 << 20  # bytes
DEMO_SECONDS = 1800
TAIL = 60  # lines of the demo's output

DESCRIPTION = """\
Checks and measures this package on an NVIDIA GPU, and writes what was seen into one report.

  1. copies     every pair of page layouts, host to GPU, GPU to host and within the GPU, by kernel and by
                copy engine, aligned and not; conversions to e4m3 and back; each compared with torch, bit by bit
  2. speed      GB/s of the same copies with pages of Llama 3 8B, beside cudaMemcpy of as many bytes; how many
                blocks a launch should have; from which length of a run the copy engine is the faster one
  3. overlap    copies a layer at a time beside matrix products
  4. SGLang     the demo on the GPU: a restarted server restores what the first one stored

It needs torch with CUDA, and cuda-python (pip install "lmcache-sglang[cuda]"); for 4 also SGLang. For speed it takes
about 2 GiB of the GPU's memory and as much pinned memory.
"""

EPILOG = """\
examples:
  python -m benchmarks.gpu_check                     everything; the report in docs/benchmarks/gpu
  python -m benchmarks.gpu_check --quick             small sizes and no SGLang: is it right at all
  python -m benchmarks.gpu_check --only copies       one part
  python -m benchmarks.gpu_check --only sglang --model ~/models/Llama-3.1-8B-Instruct

exit status: 0 all that ran is right, 1 something is wrong (the report says what), 2 there is no GPU to check.
"""

PARTS = ("copies", "speed", "overlap", "sglang")


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns the exit status."""
    options = _parser().parse_args(arguments)
    begun = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - begun:5.0f} s] {text}", flush=True)

    if not torch.cuda.is_available():
        _refuse("torch finds no GPU here. Nothing was checked, and no report written.")
        return NO_GPU
    torch.cuda.set_device(options.device)
    try:
        copier = CudaCopier(options.device, cubins=ROOT / ".cache" / "cubins")
    except CudaUnavailableError as error:
        _refuse(f"{error}. Nothing was checked, and no report written.")
        return NO_GPU
    report = Report(_describe(options.device, copier))
    say(", ".join(report.machine.values()))
    # The default stream is the legacy one, which takes no batch of copies.
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        _check(report, copier, options, say)
    page = report.write(options.out)
    for complaint in report.complaints():
        say(f"wrong: {complaint}")
    say(f"the report is {page}, and gpu_check.json beside it")
    return 1 if report.complaints() else 0


def _check(
    report: Report, copier: CudaCopier, options: argparse.Namespace, say: Callable[[str], None]
) -> None:
    """Each part that is wanted. What is seen is in the report even if a later part is interrupted."""
    machine = _machine(copier, options.device)
    shape = replace(LARGE, pages=QUICK_PAGES) if options.quick else LARGE
    if "copies" in options.only:
        report.checked = gpu_copies.check_layouts(machine, say)
        report.checked += gpu_copies.check_conversions(machine, say)
        report.write(options.out)
    if "speed" in options.only:
        report.layouts = gpu_copies.time_layouts(machine, shape, say)
        report.blocks = gpu_copies.time_blocks(machine, shape, say)
        total = QUICK_RUNS if options.quick else gpu_copies.RUNS_BYTES
        report.runs = gpu_copies.time_runs(machine, total, say)
        report.write(options.out)
    if "overlap" in options.only:
        report.overlap = gpu_overlap.measure(copier, shape)
        say(f"overlap: {report.overlap.hidden:.0%} of the shorter one is hidden")
        report.write(options.out)
    if "sglang" in options.only and not options.quick:
        report.served = _serve(options.model, say)
    report.skipped = [part for part in PARTS if part not in options.only]
    if options.quick:
        report.skipped.append("sglang, and large sizes (--quick)")


def _machine(copier: CudaCopier, device: int) -> Machine:
    def seconds(call: Callable[[], object]) -> float:
        call()
        return min(gpu_overlap.milliseconds(call) for _ in range(ROUNDS)) / 1e3

    return Machine(
        copier,
        Place("pinned host memory", pinned=True),
        Place("GPU", device=f"cuda:{device}"),
        torch.cuda.synchronize,
        seconds,
    )


def _describe(device: int, copier: CudaCopier) -> dict[str, str]:
    seen = torch.cuda.get_device_properties(device)
    source = copier.built.source
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "GPU": f"{seen.name}, {seen.multi_processor_count} SMs, {seen.total_memory >> 30} GiB",
        "architecture": f"sm_{seen.major}{seen.minor}",
        "kernels": f"by {source}, {'compiled now' if copier.built.compiled else 'kept'}",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}",
        "cores": str(os.cpu_count()),
        "kernel": f"{platform.system()} {platform.release()}",
    }


def _serve(model: Path | None, say: Callable[[str], None]) -> Served:
    """The demo, with this Python's SGLang."""
    command = [sys.executable, str(ROOT / "examples" / "demo" / "run.py"), "--device", "cuda"]
    if model is not None:
        command += ["--model", str(model)]
    say("SGLang: " + " ".join(command[1:]))
    try:
        done = subprocess.run(
            command,
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=DEMO_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return Served(124, f"not ended after {DEMO_SECONDS} s")
    say(f"SGLang: the demo ended with {done.returncode}")
    return Served(done.returncode, "\n".join(done.stdout.splitlines()[-TAIL:]))


def _refuse(text: str) -> None:
    print(f"gpu_check: {text}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", type=int, default=0, metavar="N", help="which GPU (default: 0)")
    parser.add_argument(
        "--only",
        type=_parts,
        default=PARTS,
        metavar="PART,...",
        help=f"these parts: {', '.join(PARTS)} (default: all)",
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, and no SGLang")
    parser.add_argument(
        "--model", type=Path, help="a checkpoint for SGLang (default: Gemma 3 270M, prepared)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "docs" / "benchmarks" / "gpu",
        metavar="DIR",
        help="for the report (default: docs/benchmarks/gpu)",
    )
    return parser


def _parts(text: str) -> tuple[str, ...]:
    wanted = tuple(text.split(","))
    for part in wanted:
        if part not in PARTS:
            raise argparse.ArgumentTypeError(f"{part!r} is none of {', '.join(PARTS)}")
    return wanted


if __name__ == "__main__":
    sys.exit(main())
