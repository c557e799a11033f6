"""One command for a machine with a GPU: are the copies right, how fast are they, and does SGLang run with the store."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu_copies, gpu_overlap, gpu_pieces, gpu_serve
from benchmarks.gpu_copies import LARGE, Machine, Place
from benchmarks.gpu_report import Report, Served
from examples.demo.model import default_model
from examples.demo.progress import Progress
from lmcache_sglang.errors import CudaUnavailableError, LMCacheError
from lmcache_sglang.kernels.cuda import CudaCopier
from lmcache_sglang.kernels.cuda.staging import Passed
from lmcache_sglang.testing.torch_pools import PoolShape

ROOT = Path(__file__).parents[1]
NO_GPU = 2  # exit status
ROUNDS = 5
QUICK_PAGES = 8
QUICK_RUNS = 16 << 20  # bytes

DESCRIPTION = """\
Checks and measures this package on an NVIDIA GPU, and writes what was seen into one report.

  1. copies     every pair of page layouts, host to GPU, GPU to host and within the GPU, by kernel and by
                copy engine, aligned and not; conversions to e4m3 and back; single tokens, some layers, a layer at
                a time behind its event, registered memory, all orders of vLLM's blocks; each compared with torch,
                bit by bit
  2. speed      GB/s of the same copies with pages of Llama 3 8B, beside cudaMemcpy of as many bytes; how many
                blocks a launch should have; from which length of a run the copy engine is the faster one
  3. overlap    copies a layer at a time beside matrix products
  4. sglang     the demo on the GPU, by HiCache: a restarted server restores what the first one stored
  5. direct     the same without SGLang's host pool

It needs torch with CUDA, and cuda-python (pip install "lmcache-sglang[cuda]"); for 4 and 5 also SGLang. For speed it takes
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

PARTS = ("copies", "speed", "overlap", "sglang", "direct")
# What torch, the driver, our own checks and SGLang's servers raise; a GPU's fault is torch's RuntimeError.
FAILURES = (RuntimeError, ValueError, LookupError, OSError, LMCacheError)


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
    """Each part that is wanted. What is seen is in the report whatever becomes of a later part."""
    machine = _machine(copier, options.device)
    shape = replace(LARGE, pages=QUICK_PAGES) if options.quick else LARGE
    report.skipped = [part for part in PARTS if part not in options.only]
    parts: dict[str, Callable[[], None]] = {
        "copies": partial(_check_copies, report, machine, say),
        "speed": partial(_check_speed, report, machine, shape, options.quick, say),
        "overlap": partial(_check_overlap, report, copier, shape, say),
    }
    if options.quick:
        report.skipped.append("SGLang, and large sizes (--quick)")
    else:
        parts["sglang"] = lambda: report.served.append(gpu_serve.serve_demo(options.model, say))
        parts["direct"] = lambda: report.served.append(_serve_direct(options.model, say))
    run_parts(
        report, {name: parts[name] for name in parts if name in options.only}, options.out, say
    )


def run_parts(
    report: Report, parts: dict[str, Callable[[], None]], out: Path, say: Callable[[str], None]
) -> None:
    """One after another; one that fails is complained of, and the others run. The report is written after each."""
    for name, part in parts.items():
        try:
            part()
        except FAILURES as error:
            report.failed.append(f"{name}: {type(error).__name__}: {error}")
            say(report.failed[-1])
        finally:
            report.write(out)


def _check_copies(report: Report, machine: Machine, say: Callable[[str], None]) -> None:
    for check in (
        gpu_copies.check_layouts,
        gpu_copies.check_conversions,
        gpu_pieces.check_tokens,
        gpu_pieces.check_registered,
        gpu_pieces.check_by_layer,
        gpu_pieces.check_orders,
    ):
        report.checked += check(machine, say)


def _check_speed(
    report: Report, machine: Machine, shape: PoolShape, quick: bool, say: Callable[[str], None]
) -> None:
    report.layouts = gpu_copies.time_layouts(machine, shape, say)
    report.blocks = gpu_copies.time_blocks(machine, shape, say)
    total = QUICK_RUNS if quick else gpu_copies.RUNS_BYTES
    report.runs = gpu_copies.time_runs(machine, total, say)


def _check_overlap(
    report: Report, copier: CudaCopier, shape: PoolShape, say: Callable[[str], None]
) -> None:
    report.overlap = gpu_overlap.measure(copier, shape)
    say(f"overlap: {report.overlap.hidden:.0%} of the shorter one is hidden")


def _serve_direct(model: Path | None, say: Callable[[str], None]) -> Served:
    chosen = model or default_model(ROOT / ".cache", Progress(sys.stderr)).path
    return gpu_serve.serve_direct(chosen, "cuda", say)


def _machine(copier: CudaCopier, device: int) -> Machine:
    reading = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def seconds(call: Callable[[], object]) -> float:
        call()
        return min(gpu_overlap.milliseconds(call) for _ in range(ROUNDS)) / 1e3

    def read_behind(event: Passed, tensors: Sequence[Tensor]) -> list[Tensor]:
        if not tensors[0].is_cuda:
            event.synchronize()
            return [each.clone() for each in tensors]
        reading.wait_event(event)  # type: ignore[arg-type]  # torch's, as the stream is
        with torch.cuda.stream(reading):
            return [each.clone() for each in tensors]

    return Machine(
        copier,
        Place("pinned host memory", pinned=True),
        Place("GPU", device=f"cuda:{device}"),
        torch.cuda.synchronize,
        seconds,
        read_behind,
        _registered,
    )


@contextmanager
def _registered(memory: Sequence[tuple[int, int]]) -> Iterator[None]:
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    for address, size in memory:
        torch.cuda.check_error(int(runtime.cudaHostRegister(address, size, 0)))
    try:
        yield
    finally:
        torch.cuda.synchronize()
        for address, _ in memory:
            torch.cuda.check_error(int(runtime.cudaHostUnregister(address)))


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
