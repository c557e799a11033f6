"""The demo: fill a store, restart the server, ask again, compare."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from examples.demo.errors import DemoFailed
from examples.demo.model import Model, default_model, local_model
from examples.demo.progress import Progress
from examples.demo.report import Report, compare, table
from examples.demo.rounds import Player
from examples.demo.server import Device, Serves, Setup, device_of
from examples.demo.store import StoreFolder
from examples.demo.vllm_server import VLLMSetup
from examples.demo.workload import Script, scripts, shortener
from lmcache_sglang.errors import LMCacheError

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache"
VLLM = ROOT / ".venv-vllm" / "bin" / "python"
SERVED_NAME = "demo"  # the same in both engines, or they find nothing of each other

DESCRIPTION = """\
Shows that a restarted SGLang server is warm. It starts `sglang` with a store for its KV cache, asks
three questions about a document and holds a chat about another, stops the server, starts a new one
and asks the same again. The table tells for each request how many prompt tokens each server had
cached and where (device, host memory, store), the time to the first token, and whether the greedy
output is the same. The exit status is 0 only if each text was restored and every output is the same.

With --engine vllm the servers are vLLM's, and there is a third part: SGLang first, on a store of its own,
and then a vLLM that has never seen the texts, on the same one.
"""

EPILOG = """\
examples:
  run.py                                      Gemma 3 270M, on a GPU if there is one
  run.py --model ~/models/some-model          your own checkpoint
  run.py --backend file                       SGLang's own store, to compare
  run.py --keep --json result.json            leave the store there, and the numbers
  run.py --engine vllm                        vLLM; then SGLang, and vLLM over what SGLang stored
  run.py -- --hicache-storage-prefetch-policy wait_complete
                                              any flag of SGLang, after two dashes
"""

# A prompt computed at once and one continued from the cache run through kernels of other shapes.
GPU_HINT = """\
In 16-bit arithmetic a near tie between two words can fall either way, with no cache at fault; see
whether it stays with `-- --enable-deterministic-inference`."""


@dataclass(frozen=True, slots=True)
class Part:
    """Two servers over one store, one after the other."""

    store: StoreFolder
    first: Serves
    second: Serves
    names: tuple[str, str] = ("cold server", "warm server")
    occasion: str = "After a restart"


def main() -> int:
    options = _parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no server is left behind
    progress = Progress(sys.stderr)
    try:
        reports = _run(options, progress)
    except LMCacheError as error:
        print(f"The demo failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    if options.json:
        said = [report.as_json() for report in reports]
        options.json.write_text(json.dumps(said if len(said) > 1 else said[0], indent=2) + "\n")
    return max(report.exit_status for report in reports)


def _run(options: argparse.Namespace, progress: Progress) -> list[Report]:
    """Everything that is shown is shown here; progress goes to stderr, results to stdout."""
    stores = _stores(options)
    device, device_name = device_of(options.device)
    model = _model(options.model, progress)
    parts = _parts(options, stores, model, device)
    version = importlib.metadata.version("sglang")
    engine = f"SGLang {version}" if options.engine == "sglang" else f"vLLM, and SGLang {version}"
    progress.say(f"{engine}, {device_name}, {model.name}, storage backend {options.backend}")
    workload = scripts(shortener(model.path))
    reports = []
    for part in parts:
        reports.append(_played(part, workload, options, progress))
        _show(reports[-1], part, options.backend, device, keep=options.keep)
        if not options.keep:
            part.store.remove()
    return reports


def _stores(options: argparse.Namespace) -> list[StoreFolder]:
    """An empty one of each part."""
    root: Path = options.store
    roots = [root] if options.engine == "sglang" else [root, root.with_name(root.name + "-both")]
    stores = [StoreFolder(each) for each in roots]
    for store in stores:
        if options.backend == "lmcache":
            store.require_usable()
        store.empty()
    return stores


def _parts(
    options: argparse.Namespace, stores: Sequence[StoreFolder], model: Model, device: Device
) -> list[Part]:
    if options.engine == "sglang":
        (store,) = stores
        setup = Setup(model.path, store.pages, options.backend, device, options.engine_args)
        return [Part(store, setup, setup)]
    python = options.vllm_python
    if not python.exists():
        raise DemoFailed(f"{python} is not there: `make venv-vllm` makes it")
    own, both = stores
    alone, after = (
        VLLMSetup(python, model.path, SERVED_NAME, store.pages, device, options.engine_args)
        for store in stores
    )
    named = ("--served-model-name", SERVED_NAME)
    before = Setup(model.path, both.pages, options.backend, device, named)
    return [
        Part(own, alone, alone, ("cold vLLM", "warm vLLM")),
        Part(both, before, after, ("SGLang", "vLLM"), "vLLM over what SGLang computed"),
    ]


def _played(
    part: Part, workload: Sequence[Script], options: argparse.Namespace, progress: Progress
) -> Report:
    cold, warm = (
        Player(
            setup,
            workload,
            max_tokens=options.max_new_tokens,
            start_timeout=options.start_timeout,
            logs=CACHE / "demo-logs",
            progress=progress,
        )
        for setup in (part.first, part.second)
    )
    one, other = (name.removesuffix(" server") for name in part.names)
    earlier = cold.play(one)
    report = compare(workload, earlier, warm.play(other, earlier), part.names)
    return replace(report, occasion=part.occasion)


def _model(path: Path | None, progress: Progress) -> Model:
    return local_model(path) if path else default_model(CACHE / "models", progress)


def _show(report: Report, part: Part, backend: str, device: Device, *, keep: bool) -> None:
    print(f"\n{table(report)}\n")
    for complaint in report.complaints():
        print(f"FAILED  {complaint}")
    if device == "cuda" and not all(row.same for row in report.rows):
        print(GPU_HINT)
    print(report.summary(backend))
    if keep:
        store = part.store
        print(f"The store: {store.pages}, {store.size / 1e6:.0f} MB, and in memory {store.memory}")
    print(
        "Try next: `make demo MODEL=path/to/model`, or this server by hand:\n"
        f"  {part.second.command()}"
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
    engines = "whose servers are restarted (default: sglang)"
    add("--engine", choices=["sglang", "vllm"], default="sglang", help=engines)
    python = "the interpreter that has vLLM and this package (default: .venv-vllm's)"
    add("--vllm-python", type=Path, default=VLLM, metavar="FILE", help=python)
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    store = "where the store lives; emptied at the start (default: .cache/demo-store)"
    add("--store", type=Path, default=CACHE / "demo-store", metavar="DIR", help=store)
    add("--keep", action="store_true", help="leave the store on disk and in memory")
    add("--json", type=Path, metavar="FILE", help="also write the result there")
    add("--max-new-tokens", type=int, default=16, metavar="N", help="of each answer (default: 16)")
    wait = "how long a server may take to start (default: 300)"
    add("--start-timeout", type=float, default=300.0, metavar="SECONDS", help=wait)
    add("engine_args", nargs="*", metavar="-- FLAG ...", help="more flags for the engine")
    return parser


if __name__ == "__main__":
    sys.exit(main())
