"""The demo: fill a store, restart the server, ask again, compare."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import signal
import sys
from pathlib import Path

from examples.demo.model import Model, default_model, local_model
from examples.demo.progress import Progress
from examples.demo.report import Report, compare, table
from examples.demo.rounds import Player
from examples.demo.server import Setup, device_of
from examples.demo.store import StoreFolder
from examples.demo.workload import scripts, shortener
from lmcache_sglang.errors import LMCacheError

CACHE = Path(__file__).resolve().parents[2] / ".cache"

DESCRIPTION = """\
Shows that a restarted SGLang server is warm. It starts `sglang` with a store for its KV cache, asks
three questions about a document and holds a chat about another, stops the server, starts a new one
and asks the same again. The table tells for each request how many prompt tokens each server had
cached and where (device, host memory, store), the time to the first token, and whether the greedy
output is the same. The exit status is 0 only if each text was restored and every output is the same.
"""

EPILOG = """\
examples:
  run.py                                      Gemma 3 270M, on a GPU if there is one
  run.py --model ~/models/some-model          your own checkpoint
  run.py --backend file                       SGLang's own store, to compare
  run.py --keep --json result.json            leave the store there, and the numbers
  run.py -- --hicache-storage-prefetch-policy wait_complete
                                              any flag of SGLang, after two dashes
"""

# A prompt computed at once and one continued from the cache run through kernels of other shapes.
GPU_HINT = """\
In 16-bit arithmetic a near tie between two words can fall either way, with no cache at fault; see
whether it stays with `-- --enable-deterministic-inference`."""


def main() -> int:
    options = _parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no server is left behind
    progress = Progress(sys.stderr)
    try:
        report = _run(options, progress)
    except LMCacheError as error:
        print(f"The demo failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    if options.json:
        options.json.write_text(json.dumps(report.as_json(), indent=2) + "\n")
    return report.exit_status


def _run(options: argparse.Namespace, progress: Progress) -> Report:
    """Everything that is shown is shown here; progress goes to stderr, results to stdout."""
    store = StoreFolder(options.store)
    if options.backend == "lmcache":
        store.require_usable()
    store.empty()
    device, device_name = device_of(options.device)
    model = _model(options.model, progress)
    setup = Setup(model.path, store.pages, options.backend, device, options.engine_args)
    sglang = importlib.metadata.version("sglang")
    progress.say(f"SGLang {sglang}, {device_name}, {model.name}, storage backend {options.backend}")
    workload = scripts(shortener(model.path))
    player = Player(
        setup,
        workload,
        max_tokens=options.max_new_tokens,
        start_timeout=options.start_timeout,
        logs=CACHE / "demo-logs",
        progress=progress,
    )
    cold = player.play("cold")
    report = compare(workload, cold, player.play("warm", cold))
    _show(report, setup, store, keep=options.keep)
    if not options.keep:
        store.remove()
    return report


def _model(path: Path | None, progress: Progress) -> Model:
    return local_model(path) if path else default_model(CACHE / "models", progress)


def _show(report: Report, setup: Setup, store: StoreFolder, *, keep: bool) -> None:
    print(f"\n{table(report)}\n")
    for complaint in report.complaints():
        print(f"FAILED  {complaint}")
    if setup.device == "cuda" and not all(row.same for row in report.rows):
        print(GPU_HINT)
    print(report.summary(setup.backend))
    if keep:
        print(f"The store: {store.pages}, {store.size / 1e6:.0f} MB, and in memory {store.memory}")
    print(
        f"Try next: `make demo MODEL=path/to/model`, or this server by hand:\n  {setup.command()}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="run.py",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=Path, help="a folder with a checkpoint (default: Gemma 3 270M, prepared)")
    add("--backend", default="lmcache", help="SGLang's name of the store (default: lmcache)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    store = "where the store lives; emptied at the start (default: .cache/demo-store)"
    add("--store", type=Path, default=CACHE / "demo-store", metavar="DIR", help=store)
    add("--keep", action="store_true", help="leave the store on disk and in memory")
    add("--json", type=Path, metavar="FILE", help="also write the result there")
    add("--max-new-tokens", type=int, default=16, metavar="N", help="of each answer (default: 16)")
    wait = "how long a server may take to start (default: 300)"
    add("--start-timeout", type=float, default=300.0, metavar="SECONDS", help=wait)
    add("engine_args", nargs="*", metavar="-- FLAG ...", help="more flags for SGLang")
    return parser


if __name__ == "__main__":
    sys.exit(main())
