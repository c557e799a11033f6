"""The example: one engine alone, then a prefill and a decode engine behind the proxy; the same questions to both."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from examples.demo.model import local_model
from examples.demo.progress import Progress
from examples.demo.server import device_of
from examples.demo.workload import shortener
from examples.prefill_decode.comparison import Comparison
from examples.prefill_decode.pair import Hardware
from examples.prefill_decode.report import Report, table
from examples.prefill_decode.workload import workload
from lmcache_sglang.errors import LMCacheError
from lmcache_sglang.testing.tiny_model import make_tiny_llama

CACHE = Path(__file__).resolve().parents[2] / ".cache"

DESCRIPTION = """\
Prompts are computed on one engine and continued on another. Two engines are started with a store each, as on two
machines: they are peers, and share pages through ZeroMQ, encrypted. A proxy has each prompt computed on the first,
and lets the second go on from the pages. In the end the first one is killed, and the second answers alone.

The table tells for each request how many tokens came from the prefill engine, the time to the first token beside
that of one engine alone, and whether the greedy output is the same. The exit status is 0 only if every document
crossed in whole and every output is the same.
"""


def main() -> int:
    options = _parser().parse_args()
    logging.basicConfig(level=logging.ERROR)  # what the proxy warns of is in the table
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no engine is left behind
    folder = Path(tempfile.mkdtemp(prefix="prefill-decode-"))
    try:
        report = _run(options, folder, Progress(sys.stderr))
    except LMCacheError as error:
        print(f"The example failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    finally:
        shutil.rmtree(folder)
    _show(report)
    if options.json:
        options.json.write_text(json.dumps(report.as_json(), indent=2) + "\n")
    return report.exit_status


def _run(options: argparse.Namespace, folder: Path, progress: Progress) -> Report:
    device, device_name = device_of(options.device)
    model = options.model and local_model(options.model).path
    model = model or make_tiny_llama(folder / "tiny", dtype="float32")
    progress.say(f"{device_name}, {options.model or 'a tiny model of random weights'}")
    logs = options.logs or CACHE / "prefill-decode-logs"
    hardware = Hardware(model, device, options.engine_args, logs)
    comparison = Comparison(
        hardware,
        workload(shortener(model)),
        options.max_new_tokens,
        options.start_timeout,
        progress,
    )
    return comparison.run(folder)


def _show(report: Report) -> None:
    print(f"\n{table(report)}\n")
    for complaint in report.complaints():
        print(f"FAILED  {complaint}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="run.py",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    model = "a folder with a checkpoint (default: a tiny model of random weights)"
    add("--model", type=Path, help=model)
    device = "of both engines; on a GPU give `-- --mem-fraction-static 0.4` (default: cpu)"
    add("--device", choices=["auto", "cpu", "cuda"], default="cpu", help=device)
    add("--json", type=Path, metavar="FILE", help="also write the result there")
    add("--logs", type=Path, metavar="DIR", help="of the engines")
    add("--max-new-tokens", type=int, default=16, metavar="N", help="of each answer (default: 16)")
    wait = "how long an engine may take to start (default: 300)"
    add("--start-timeout", type=float, default=300.0, metavar="SECONDS", help=wait)
    add("engine_args", nargs="*", metavar="-- FLAG ...", help="more flags for SGLang")
    return parser


if __name__ == "__main__":
    sys.exit(main())
