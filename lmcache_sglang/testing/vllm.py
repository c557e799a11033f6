"""A real vLLM with this package's connector, in an environment of its own, as the tests start and ask it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .engine import MEMORY
from .server import SGLangServer

PYTHON = Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python"
SECONDS = 300.0  # of a whole script
NEW_TOKENS = 16

ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
MODULES = {
    "LMCacheSGLangConnector": "lmcache_sglang.connector",
    "SpoiledConnector": "lmcache_sglang.testing.spoiled_connector",
}


class VLLMFailed(RuntimeError):
    """vLLM ended with an error; the message ends with what it wrote last."""


@dataclass(frozen=True, slots=True)
class Setup:
    """How vLLM is started. Attributes: llm: its own settings. more: the connector's, beside those that are here."""

    model: Path
    store: Path | None
    page_size: int = 32
    block_size: int = 32
    ranks: int = 1
    processes: bool = False  # the engine in processes of its own
    kv_bytes: int = 16 << 20
    max_tokens: int = 1024
    cpu: str = "64MiB"
    disk: str = "256MiB"
    connector: str = "LMCacheSGLangConnector"
    by_name: bool = False  # as registered, and not by its module
    policy: str = "recompute"
    llm: Mapping[str, Any] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def memory(self) -> Path:
        """The directory of the CPU tier; the one that testing/engine.py has for the same store."""
        return MEMORY / hashlib.sha256(os.fsencode(str(self.store))).hexdigest()[:12]

    @property
    def settings(self) -> dict[str, Any]:
        """The store's."""
        return {
            "path": str(self.store),
            "cpu": {"size": self.cpu, "path": str(self.memory)},
            "disk": {"size": self.disk},
            **self.more,
        }

    @property
    def transfer(self) -> dict[str, Any]:
        """vLLM's `kv_transfer_config`; nothing without a store."""
        if self.store is None:
            return {}
        module = {} if self.by_name else {"kv_connector_module_path": MODULES[self.connector]}
        return {
            "kv_connector": self.connector,
            **module,
            "kv_role": "kv_both",
            "kv_load_failure_policy": self.policy,
            "kv_connector_extra_config": {**self.settings, "page_size": self.page_size},
        }

    @property
    def arguments(self) -> dict[str, Any]:
        """Of `vllm.LLM`."""
        transfer = {"kv_transfer_config": self.transfer} if self.store else {}
        return {
            "model": str(self.model),
            "served_model_name": "tiny",
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "block_size": self.block_size,
            "enable_prefix_caching": True,
            "enforce_eager": True,
            "kv_cache_memory_bytes": self.kv_bytes,
            "max_model_len": self.max_tokens,
            "seed": 0,
            "disable_log_stats": False,
            "tensor_parallel_size": self.ranks,
            **transfer,
            **self.llm,
        }


def generate(
    *prompts: Sequence[int],
    new_tokens: int = NEW_TOKENS,
    lora: Mapping[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """A step: greedy continuations of token ids, all at once.

    Args:
        lora: name, id and path of the adapter that they are asked of, if of any.
        more: keys of vLLM's prompts.
    """
    texts = [list(prompt) for prompt in prompts]
    adapter = {} if lora is None else {"lora": dict(lora)}
    return {"do": "generate", "prompts": texts, "new_tokens": new_tokens, "more": more, **adapter}


def abort(*prompts: Sequence[int], after: int) -> dict[str, Any]:
    """A step: ask, and give up after so many steps of the engine."""
    texts = [list(prompt) for prompt in prompts]
    return {"do": "abort", "prompts": texts, "new_tokens": NEW_TOKENS, "after": after}


def step(do: str, **keys: Any) -> dict[str, Any]:
    """Any other one of vllm_script.py."""
    return {"do": do, **keys}


def run(setup: Setup, *steps: Mapping[str, Any], log: Path) -> list[Any]:
    """What the steps gave, one after the other, in one process of vLLM that ends after them.

    Raises:
        VLLMFailed: it ended otherwise, or took too long.
    """
    result = log.with_suffix(".json")
    result.unlink(missing_ok=True)
    script = json.dumps({"llm": setup.arguments, "steps": steps})
    environment = ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(setup.processes))}
    variables = [f"{name}={value}" for name, value in environment.items()]
    command = [str(PYTHON), "-m", "lmcache_sglang.testing.vllm_script", str(result)]
    with log.open("wb") as told:
        try:
            ended = subprocess.run(
                ["env", *variables, *command],
                input=script.encode(),
                stdout=told,
                stderr=subprocess.STDOUT,
                timeout=SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise VLLMFailed(f"vLLM took longer than {SECONDS:.0f} s; {_tail(log)}") from error
    if ended.returncode or not result.exists():
        raise VLLMFailed(f"vLLM ended with {ended.returncode}; {_tail(log)}")
    results: list[Any] = json.loads(result.read_text())
    return results


def server(setup: Setup, log: Path) -> SGLangServer:
    """`vllm serve`, which is yet to be started."""
    flags = ["--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager"]
    flags += ["--block-size", str(setup.block_size), "--max-model-len", str(setup.max_tokens)]
    flags += ["--kv-cache-memory-bytes", str(setup.kv_bytes), "--seed", "0"]
    flags += ["--tensor-parallel-size", str(setup.ranks)]
    flags += ["--enable-prompt-tokens-details"]
    if setup.store is not None:
        flags += ["--kv-transfer-config", json.dumps(setup.transfer)]
    return SGLangServer(
        setup.model, args=flags, env=ENVIRONMENT, log_path=log, python=str(PYTHON), entry="vllm"
    )


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    return "\n".join([f"{log} ends:", *lines[-40:]])
