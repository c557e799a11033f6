"""One vLLM in this process, asked and timed as a plan (JSON, on stdin) says; what it took goes to a file, as JSON.

    python -m benchmarks.vllm.script RESULT < plan

It runs in vLLM's environment. The engine is stepped here, on the one thread that also computes; where a step had
nothing to compute it yields for a millisecond, as the loop of vLLM's engine process does (v1/core.py,
`_process_engine_step`). So what a connector does on other threads has the other core.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

IDLE_SECONDS = 0.001
CONNECTORS = ("vllm:lmcache", "vllm:kv_offload")  # how their counters begin


class Engine:
    """Args: arguments: of `vllm.LLM`."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        from vllm import LLM

        self._llm = LLM(**arguments)
        self._engine = self._llm.llm_engine
        core = self._engine.engine_core.engine_core
        step = core.step_fn

        def step_or_yield() -> Any:
            outputs, executed = step()
            if not executed and core.scheduler.has_requests():
                time.sleep(IDLE_SECONDS)
            return outputs, executed

        core.step_fn = step_or_yield
        self._asked = 0

    def ask(self, prompt: list[int], new_tokens: int) -> dict[str, Any]:
        """One prompt alone.

        Returns:
            ttft: seconds to the first token. cpu: of this thread until then. steps: of the engine until then.
            tokens: the answer's. cached: tokens of the prompt that were not computed.
        """
        begun, cpu = time.perf_counter(), time.thread_time()
        first: dict[str, Any] = {}
        self._add(prompt, new_tokens)
        for steps, outputs in enumerate(self._steps(), 1):
            for output in outputs:
                if not first and output.outputs[0].token_ids:
                    first = {
                        "ttft": time.perf_counter() - begun,
                        "cpu": time.thread_time() - cpu,
                        "steps": steps,
                    }
                last = output
        tokens = list(last.outputs[0].token_ids)
        return {**first, "tokens": tokens, "cached": last.num_cached_tokens or 0}

    def decode(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        """Prompts at once; only the steps in which all of them decode are counted.

        Returns:
            seconds, cpu: of a step, by the clock and of this thread alone, the mean. p99: seconds of a slow one.
            tokens: of all answers.
        """
        ids = [self._add(prompt, new_tokens) for prompt in prompts]
        tokens: dict[str, list[int]] = {}
        seconds, cpu = [], []
        at, used = time.perf_counter(), time.thread_time()
        for outputs in self._steps():
            now, used_now = time.perf_counter(), time.thread_time()
            if len(tokens) == len(ids):
                seconds.append(now - at)
                cpu.append(used_now - used)
            for output in outputs:
                tokens[output.request_id] = list(output.outputs[0].token_ids)
            at, used = time.perf_counter(), time.thread_time()
        return {
            "seconds": statistics.mean(seconds),
            "cpu": statistics.mean(cpu),
            "p99": statistics.quantiles(seconds, n=100)[-1],
            "tokens": [tokens[each] for each in ids],
        }

    def settle(self, seconds: float) -> None:
        """Go on, with no request, so that what is to be stored is."""
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            self._engine.step()
            time.sleep(IDLE_SECONDS)

    def counters(self) -> dict[str, float]:
        """Those that tell of connectors; of histograms the sum. vLLM's own `get_metrics` makes integers of seconds."""
        from prometheus_client import REGISTRY

        told: dict[str, float] = {}
        for metric in REGISTRY.collect():
            for sample in metric.samples:
                is_sum = sample.name.endswith(("_total", "_sum"))
                if is_sum and sample.name.startswith(CONNECTORS):
                    name = sample.name + sample.labels.get("transfer_type", "")
                    told[name] = told.get(name, 0.0) + sample.value
        return told

    def close(self) -> None:
        self._engine.engine_core.shutdown()

    def _add(self, prompt: list[int], new_tokens: int) -> str:
        from vllm import SamplingParams

        self._asked += 1
        name = f"asked-{self._asked}"
        sampling = SamplingParams(
            temperature=0, max_tokens=new_tokens, detokenize=False, ignore_eos=True
        )
        self._engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
        return name

    def _steps(self) -> Iterator[list[Any]]:
        while self._engine.has_unfinished_requests():
            yield self._engine.step()


def main() -> None:
    _make_numba_bearable()
    plan = json.load(sys.stdin)
    begun = time.perf_counter()
    engine = Engine(plan["llm"])
    opened = time.perf_counter() - begun
    for prompt in plan["warm_up"]:
        engine.ask(prompt, 4)
    first, again = [], []
    for prompt in plan["documents"]:
        first.append(engine.ask(prompt, plan["new_tokens"]))
        engine.settle(plan["settle"])
    for prompt in plan["documents"]:
        again.append(engine.ask(prompt, plan["new_tokens"]))
    decoded = []
    for prompts in plan["decode"]:
        decoded.append(engine.decode(prompts, plan["decode_tokens"]))
        engine.settle(plan["settle"])
    told = {
        "opened": opened,
        "first": first,
        "again": again,
        "decoded": decoded,
        "counters": engine.counters(),
    }
    Path(sys.argv[1]).write_text(json.dumps(told))
    engine.close()


def _make_numba_bearable() -> None:
    """vLLM 0.32 asks `vars()` of every object that modules have for a kernel; llvmlite's, which LMCache brings, fail."""
    if "--numba" in sys.argv:
        from llvmlite.binding import ffi  # type: ignore[import-not-found]

        ffi._lib_fn_wrapper.get = lambda self, name: None


if __name__ == "__main__":
    main()
