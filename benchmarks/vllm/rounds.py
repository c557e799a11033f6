"""Rounds over the subjects: each stores in one process of vLLM and loads in the next."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.catalog import ROOT
from benchmarks.vllm.subjects import CHUNK, SHARED, Place, Subject
from lmcache_sglang.testing.tiny_model import make_tiny_llama
from lmcache_sglang.testing.vllm import ENVIRONMENT

Say = Callable[[str], None]
Process = dict[str, Any]  # what script.py tells

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 8, 8, 4, 64
TOKEN_BYTES = 2 * LAYERS * KV_HEADS * HEAD_DIM * 4
VOCABULARY = 512
PROMPT_TOKENS = 4000
NEW_TOKENS = 8
DOCUMENTS = 2  # the first one is what a new process loads first
STREAMS, STREAM_TOKENS, DECODE_TOKENS = 8, 128, 256
DECODES = 3  # in each process
STEP_TOKENS = 2048  # that vLLM computes at once
SETTLE_SECONDS = 1.0
PROCESS_SECONDS = 300.0
THREADS = "1"  # that compute; the other core is the connectors'
SETTING = {  # in the report's words
    "token": TOKEN_BYTES >> 10,
    "chunk": CHUNK,
    "prompt": f"{PROMPT_TOKENS:,}",
    "streams": STREAMS,
    "tokens": f"{STREAM_TOKENS} + {DECODE_TOKENS}",
    "runs": DECODES,
}


class WrongAnswer(RuntimeError):
    """Tokens differ from those that were computed without a connector."""


class ProcessFailed(RuntimeError):
    """vLLM ended with an error; the message is the end of what it wrote."""


@dataclass(frozen=True)
class Load:
    """What all subjects are asked in one round: token ids."""

    warm_up: list[list[int]]
    documents: list[list[int]]
    decode: list[list[list[int]]]

    @classmethod
    def of(cls, seed: int) -> Load:
        drawn = random.Random(seed)

        def prompt(tokens: int) -> list[int]:
            return [drawn.randrange(3, VOCABULARY) for _ in range(tokens)]

        return cls(
            [prompt(CHUNK // 2) for _ in range(2)],
            [prompt(PROMPT_TOKENS) for _ in range(DOCUMENTS)],
            [[prompt(STREAM_TOKENS) for _ in range(STREAMS)] for _ in range(DECODES)],
        )


@dataclass
class Told:
    """One subject in one round. Attributes: cold: nothing where another subject's process was it."""

    cold: Process
    warm: Process


def model(folder: Path) -> Path:
    """The one that is served."""
    return make_tiny_llama(
        folder,
        dtype="float32",
        num_layers=LAYERS,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        vocab_size=VOCABULARY,
    )


def measure(
    seed: int, subjects: Sequence[Subject], path: Path, folder: Path, say: Say
) -> dict[str, Told]:
    """One round, in the order of the subjects; the one without a connector must be among them.

    Args:
        path: of the model.
        folder: for stores and logs, on the disk that is measured.

    Raises:
        WrongAnswer, ProcessFailed.
    """
    load = Load.of(seed)
    told: dict[str, Told] = {}
    for subject in subjects:
        if not subject.cold:
            here = folder / f"{seed}-{subject.name}"
            here.mkdir()
            sharing = [each for each in subjects if each.cold == subject.name]
            try:
                with subject.beside(here) as place:
                    told |= _processes(subject, sharing, load, path, place, here, say)
            finally:
                shutil.rmtree(here / subject.name, ignore_errors=True)
    shutil.rmtree(SHARED, ignore_errors=True)
    _compare(told)
    return _without_tokens(told)


def _processes(
    subject: Subject,
    sharing: Sequence[Subject],
    load: Load,
    path: Path,
    place: Place,
    folder: Path,
    say: Say,
) -> dict[str, Told]:
    cold = _run(subject, load, path, place, folder, is_new=False)
    told = {subject.name: Told(cold, {})}
    say(f"  {subject.name}: cold {_seconds(cold)}")
    for each in (subject, *sharing):
        if each.warm:
            warm = _run(each, load, path, place, folder, is_new=True)
            told[each.name] = Told(cold if each is subject else {}, warm)
            say(f"  {each.name}: warm {_seconds(warm)}")
    return told


def _run(
    subject: Subject, load: Load, path: Path, place: Place, folder: Path, *, is_new: bool
) -> Process:
    transfer = subject.transfer(place, is_new)
    plan = {
        "llm": _arguments(path) | ({"kv_transfer_config": transfer} if transfer else {}),
        "warm_up": load.warm_up,
        "documents": load.documents,
        "new_tokens": NEW_TOKENS,
        "settle": 0.0 if is_new or not transfer else SETTLE_SECONDS,
        "decode": [] if is_new else load.decode,
        "decode_tokens": DECODE_TOKENS,
    }
    stem = f"{subject.name}-{'warm' if is_new else 'cold'}"
    result, log = folder / f"{stem}.json", folder / f"{stem}.log"
    variables = ENVIRONMENT | subject.environment
    variables |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "PYTHONPATH": str(ROOT)}
    variables |= {"OMP_NUM_THREADS": THREADS, "MKL_NUM_THREADS": THREADS}
    words = [f"{name}={value}" for name, value in variables.items()]
    script = [str(subject.python), "-m", "benchmarks.vllm.script", str(result), *subject.flags]
    with log.open("wb") as out:
        try:
            ended = subprocess.run(
                ["env", *words, *script],
                input=json.dumps(plan).encode(),
                stdout=out,
                stderr=out,
                timeout=PROCESS_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ProcessFailed(f"{stem} took longer than {PROCESS_SECONDS:.0f} s") from error
    if ended.returncode or not result.exists():
        lines = log.read_text(errors="replace").splitlines()[-30:]
        raise ProcessFailed("\n".join([f"{stem} ended with {ended.returncode}", *lines]))
    told: Process = json.loads(result.read_text())
    return told


def _without_tokens(told: dict[str, Told]) -> dict[str, Told]:
    """They were compared, and are most of what was told."""
    for each in told.values():
        for process in (each.cold, each.warm):
            for asked in ("first", "again", "decoded"):
                for answer in process.get(asked, ()):
                    answer.pop("tokens", None)
    return told


def _arguments(path: Path) -> dict[str, Any]:
    """Of `vllm.LLM`, the same for all."""
    return {
        "model": str(path),
        "served_model_name": "tiny",
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "block_size": 32,
        "enable_prefix_caching": True,
        "enforce_eager": True,
        "kv_cache_memory_bytes": 512 << 20,
        "max_model_len": 2 * STEP_TOKENS + 4 * CHUNK,
        "max_num_batched_tokens": STEP_TOKENS,
        "seed": 0,
        "disable_log_stats": False,
    }


def _compare(told: dict[str, Told]) -> None:
    """Raises: WrongAnswer."""
    right = told["none"].cold
    for name, each in told.items():
        for process in (each.cold, each.warm):
            for asked in ("first", "again", "decoded"):
                pairs = zip(process.get(asked, ()), right[asked], strict=False)
                for at, (answer, expected) in enumerate(pairs):
                    if answer["tokens"] != expected["tokens"]:
                        raise WrongAnswer(f"{name}: {asked} {at} differs from what was computed")


def _seconds(process: Process) -> str:
    first = ", ".join(
        f"{each['ttft']:.3f} s ({each['cached']} tokens)" for each in process["first"]
    )
    return f"{first}; opened in {process['opened']:.1f} s"
