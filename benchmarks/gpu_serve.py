"""SGLang with the store, restarted: by HiCache, which is the demo, and by the direct path.

    python -m benchmarks.gpu_serve --model DIR --device cpu

tries the direct path where there is no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_report import Served
from lmcache_sglang.testing.engine import CPU_ARGS, CPU_ENVIRONMENT, Setup, pages_on_disk, until
from lmcache_sglang.testing.server import SGLangServer

ROOT = Path(__file__).parents[1]
TEXTS = ROOT / "examples" / "demo" / "texts"
DEMO = "SGLang with HiCache (its own kernels between its host pool and the GPU)"
DIRECT = "SGLang with the direct path"
DEMO_SECONDS = 1800
ENDING_SECONDS = 90  # that the demo gets to stop its servers
START_SECONDS = 900
STORED_SECONDS = 120
TAIL = 60  # lines of the demo's output
PAGE_SIZE = 64
PROMPTS = 3
PROMPT_CHARACTERS = 4000
NEW_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Asked:
    """One answer.

    Attributes:
        tokens: that were made.
        prompt: how many the prompt has.
        cached: of these, how many were not computed.
    """

    tokens: list[int]
    prompt: int
    cached: int

    @property
    def restorable(self) -> int:
        """Whole pages, and one token stays to compute."""
        return (self.prompt - 1) // PAGE_SIZE * PAGE_SIZE


def serve_demo(model: Path | None, say: Callable[[str], None]) -> Served:
    """The demo, with this Python's SGLang."""
    command = [sys.executable, str(ROOT / "examples" / "demo" / "run.py"), "--device", "cuda"]
    if model is not None:
        command += ["--model", str(model)]
    say("SGLang: " + " ".join(command[1:]))
    status, output = run_to_its_end(command, DEMO_SECONDS)
    return Served(DEMO, status, "\n".join(output.splitlines()[-TAIL:]))


def run_to_its_end(command: Sequence[str], seconds: float) -> tuple[int, str]:
    """Exit status and output; 124 where it took too long. None of the processes that it began is left then.

    It is asked to end first, since only it knows what else it began: SGLang's servers have sessions of their own.
    """
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            _end(process)
            status = 124
        output.seek(0)
        text = output.read()
    return status, text if status != 124 else f"{text}\nnot ended after {seconds:.0f} s"


def _end(process: subprocess.Popen[str]) -> None:
    groups = set(_groups_below(process.pid))
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(ENDING_SECONDS)
    for group in groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    process.wait()


def _groups_below(pid: int) -> Iterator[int]:
    """The process groups of a process and of all that it began."""
    yield os.getpgid(pid)
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for child in task.read_text().split():
                yield from _groups_below(int(child))


def serve_direct(
    model: Path, device: str, say: Callable[[str], None], args: Sequence[str] = ()
) -> Served:
    """A server with an empty store, and another one with what that one left, without SGLang's host pool.

    Args:
        device: cuda, or cpu, for a trial.
        args: further flags of SGLang.

    Raises:
        RuntimeError, OSError: a server did not start, or broke off an answer, or nothing was stored in time.
    """
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        setup = Setup(Path(folder) / "store", cpu="2GiB", disk="4GiB", page_size=PAGE_SIZE)
        try:
            return _serve_direct(model, setup, device, args, say)
        finally:
            setup.forget_memory()


def _serve_direct(
    model: Path, setup: Setup, device: str, args: Sequence[str], say: Callable[[str], None]
) -> Served:
    rounds = []
    for name in ("cold", "warm"):
        say(f"SGLang: the direct path, {name}")
        server = SGLangServer(
            model,
            args=[*_flags(setup, device), *args],
            env=_environment(device),
            log_path=setup.store.with_name(f"{name}.log"),
        )
        server.start(START_SECONDS)
        try:
            rounds.append([_ask(server, text) for text in _prompts()])
            if name == "cold":
                _await_stored(setup, rounds[0])
        finally:
            server.stop()
    return compare(*rounds)


def _await_stored(setup: Setup, asked: Sequence[Asked]) -> None:
    pages = sum(each.restorable for each in asked) // PAGE_SIZE
    until(lambda: pages_on_disk(setup) >= pages, STORED_SECONDS)


def compare(cold: Sequence[Asked], warm: Sequence[Asked]) -> Served:
    """What the second server restored, and whether it went on as the first one."""
    lines, wrong = [], 0
    for number, (first, second) in enumerate(zip(cold, warm, strict=True)):
        same = first.tokens == second.tokens
        restored = second.cached >= second.restorable > 0
        wrong += not (same and restored)
        lines.append(
            f"prompt {number}: {second.prompt} tokens, {first.cached} cached before the restart, "
            f"{second.cached} after it; {'the same' if same else 'OTHER'} tokens"
        )
    if wrong:
        lines.append("In 16-bit arithmetic a near tie can fall either way, with no cache at fault.")
    return Served(DIRECT, min(wrong, 1), "\n".join(lines))


def _flags(setup: Setup, device: str) -> list[str]:
    settings = json.dumps({**setup.settings, "direct": True})
    flags = ["--hicache-storage-backend", "lmcache"]
    flags += ["--hicache-storage-backend-extra-config", settings]
    flags += ["--page-size", str(PAGE_SIZE), "--enable-cache-report"]
    flags += ["--max-total-tokens", "16384"]
    return [*flags, *(CPU_ARGS if device == "cpu" else ("--device", device))]


def _environment(device: str) -> dict[str, str]:
    return dict(CPU_ENVIRONMENT) if device == "cpu" else {"HF_HUB_OFFLINE": "1"}


def _prompts() -> list[str]:
    text = (TEXTS / "constitution.txt").read_text(encoding="utf-8")
    begins = range(0, PROMPTS * PROMPT_CHARACTERS, PROMPT_CHARACTERS)
    return [text[begin : begin + PROMPT_CHARACTERS] for begin in begins]


def _ask(server: SGLangServer, text: str) -> Asked:
    said: dict[str, Any] = server.generate(text, NEW_TOKENS, ignore_eos=True)
    seen = said["meta_info"]
    return Asked(said["output_ids"], seen["prompt_tokens"], seen["cached_tokens"])


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_serve", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options, args = parser.parse_known_args(arguments)
    begun = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - begun:5.0f} s] {text}", flush=True)

    served = serve_direct(options.model, options.device, say, args)
    print(served.output)
    return served.status


if __name__ == "__main__":
    sys.exit(main())
