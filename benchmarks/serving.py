"""What a store costs the requests that do not need it: a real SGLang on CPU, with and without ours.

Two engines of each kind are alive at once and one of all runs; the others are stopped by a signal, so that they
take no time and a round of each follows the other within seconds. Processes of a kind differ for as long as they
live (2.3 % was seen over three rounds), so a round's value is the mean of the twins.

    off      HiCache without a storage backend
    null     HiCache with a backend that moves nothing (null_storage.py)
    lmcache  ours, memory over disk

`busy` is a mix of decoding streams and prompts, half of them stored before and half new: every one of them
makes the store read or write. Without a store those prompts would be computed, another mix; so it is
compared with null, where SGLang does all that it does for a store. `no reuse` is prompts that nothing has
seen, which lmcache stores and off does not.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import null_storage, requests
from benchmarks.catalog import ROOT
from benchmarks.requests import Mix
from benchmarks.results import BUSY, NO_REUSE, Served
from lmcache_sglang.testing.engine import Setup, server
from lmcache_sglang.testing.server import SGLangServer
from lmcache_sglang.testing.tiny_model import make_tiny_llama

Say = Callable[[str], None]

MIX = Mix(stream_tokens=800, prompt_tokens=512, documents=24, period=0.3)
NEW = (24, 512, 32)  # prompts of a round without reuse, their tokens, and new tokens of each
PAGE_SIZE = 16  # tokens; 256 KiB
DEVICE_TOKENS = 4096  # and twice as many on the host: a third of the documents is in neither
# One thread computes; the other core is left to SGLang's other processes, the store and the client.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
ARGS = (
    *("--max-total-tokens", str(DEVICE_TOKENS), "--hicache-ratio", "2"),
    *("--enable-hierarchical-cache", "--hicache-mem-layout", "page_first"),
    *("--hicache-storage-prefetch-policy", "wait_complete", "--skip-server-warmup"),
)
STORAGE = ("--hicache-storage-backend", "dynamic", "--hicache-storage-backend-extra-config")


@dataclass(frozen=True)
class Engine:
    """A server that runs only while it is measured."""

    name: str
    server: SGLangServer

    def pause(self) -> None:
        os.killpg(self.server.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self.server.pid, signal.SIGCONT)

    def cpu_seconds(self) -> float:
        """Of all its processes so far."""
        ticks = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(") ")[2].split()
            except (FileNotFoundError, ProcessLookupError):  # it has just ended
                continue
            if int(fields[2]) == self.server.pid:
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")


def measure(rounds: int, disk: Path, say: Say) -> list[Served]:
    """Start the engines, warm them up, and measure in turned order. Args: disk: for the store."""
    table: dict[tuple[str, str, str], list[float]] = {}
    with ExitStack() as stack:
        engines = _start(stack, disk, say)
        for number in range(-1, rounds):
            found: dict[tuple[str, str, str], list[float]] = {}
            for engine in engines if number % 2 else reversed(engines):
                engine.resume()
                for (workload, metric), value in _round(engine, number).items():
                    found.setdefault((workload, engine.name, metric), []).append(value)
                engine.pause()
            for names, values in found.items() if number >= 0 else ():
                table.setdefault(names, []).append(statistics.fmean(values))
            say("  warmed up" if number < 0 else f"  round {number + 1} of {rounds}")
    return [Served(*names, values) for names, values in table.items()]


def _start(stack: ExitStack, disk: Path, say: Say) -> list[Engine]:
    """One after the other, each with the documents stored."""
    model = make_tiny_llama(
        disk / "model", dtype="float32", num_layers=8, num_kv_heads=4, head_dim=64
    )
    null = (*ARGS, *STORAGE, json.dumps(null_storage.CONFIG))
    none = Setup(disk, flag=False, args=ARGS, env=ENVIRONMENT, page_size=PAGE_SIZE)
    setups = {
        "off": none,
        "null": replace(none, args=null),
        "lmcache": replace(none, flag=True, cpu="1GiB", disk="4GiB"),
    }
    engines = []
    for at, name in enumerate((*setups, *reversed(setups))):
        setup = replace(setups[name], store=disk / f"store {at}")
        stack.callback(setup.forget_memory)
        log = disk / f"{name} {at}.log"
        engine = Engine(name, stack.enter_context(server(model, setup, log)))
        stack.callback(engine.resume)  # a stopped process does not hear that it is to end
        for number in range(MIX.documents):
            prompt = requests.tokens(requests.document(MIX, number), MIX.prompt_tokens)
            requests.ask(engine.server, prompt, 1)
        engine.pause()
        engines.append(engine)
        say(f"  {name} is up")
    return engines


def _round(engine: Engine, number: int) -> dict[tuple[str, str], float]:
    """By workload and metric."""
    found = dict[tuple[str, str], float]()
    before = engine.cpu_seconds()
    found[NO_REUSE, "seconds"] = requests.all_new(engine.server, f"new {number}", *NEW)
    between = engine.cpu_seconds()
    found[NO_REUSE, "CPU seconds"] = between - before
    if engine.name == "off":
        return found
    heard = requests.busy(engine.server, MIX, f"busy {number}", first=number * MIX.documents // 2)
    ordered = sorted(heard.gaps)
    found[BUSY, "CPU seconds"] = engine.cpu_seconds() - between
    found[BUSY, "median, ms"] = statistics.median(ordered) * 1e3
    found[BUSY, "mean, ms"] = statistics.fmean(ordered) * 1e3
    found[BUSY, "99th percentile, ms"] = ordered[int(len(ordered) * 0.99)] * 1e3
    found[BUSY, "prompts"] = heard.prompts
    found[BUSY, "restored tokens"] = heard.restored
    return found
