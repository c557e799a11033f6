"""How SGLang is started on this machine, and when everything it computed is in the store."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from examples.demo.client import ChatClient
from lmcache_sglang.testing.server import SGLangServer

Device = Literal["cpu", "cuda"]

PAGE_SIZE = 64
STORED_COUNTER = "sglang:backuped_tokens_total"
POLL_SECONDS = 0.1


class Serves(Protocol):
    """How an engine is started."""

    def server(self, log_path: Path) -> SGLangServer:
        """One that is yet to be started."""

    def client(self, server: SGLangServer) -> ChatClient:
        """Who asks it."""

    def await_stored(self, server: SGLangServer, tokens: int) -> bool:
        """Whether the server said in time that it has stored so many tokens."""

    def command(self) -> str:
        """What to type to start such a server by hand."""


@dataclass(frozen=True, slots=True)
class Setup:
    """Everything two servers must have in common for the second to profit from the first."""

    model: Path
    store: Path
    backend: str
    device: Device
    extra: Sequence[str] = field(default=())

    def args(self) -> list[str]:
        """SGLang's flags; a flag in `extra` overrides the same one here."""
        flags = [
            *("--enable-hierarchical-cache", "--hicache-storage-backend", self.backend),
            *_location(self.backend, self.store),
            *("--page-size", str(PAGE_SIZE)),
            # Bounds the host tier too, which is a multiple of it: a demo need not pin all memory.
            *("--max-total-tokens", "16384", "--hicache-ratio", "2"),
            "--enable-metrics",  # the counter that `await_stored` reads
        ]
        if self.device == "cpu":
            flags += ["--device", "cpu", "--attention-backend", "torch_native"]
            flags += ["--disable-cuda-graph"]
            # As fast as bfloat16 on most CPUs, and a prompt computed at once and one continued from
            # the cache then agree to the last digit that matters to a greedy choice.
            flags += ["--dtype", "float32"]
        return [*flags, *self.extra]

    def env(self) -> dict[str, str]:
        env = {"HF_HUB_OFFLINE": "1"}  # the model is a folder: nothing is to be fetched
        if self.device == "cpu":
            env["SGLANG_USE_CPU_ENGINE"] = "1"
        if self.backend == "file":
            env["SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR"] = str(self.store)
        return env

    def server(self, log_path: Path) -> SGLangServer:
        return SGLangServer(
            self.model, args=self.args(), env=self.env(), log_path=log_path, entry="serve"
        )

    def client(self, server: SGLangServer) -> ChatClient:
        return ChatClient(server.host, server.port)

    def await_stored(self, server: SGLangServer, tokens: int) -> bool:
        return await_stored(server, tokens)

    def command(self) -> str:
        """What to type to start such a server by hand."""
        words = ["sglang", "serve", "--model-path", str(self.model), *self.args()]
        return " ".join(f"'{word}'" if "{" in word else word for word in words)


def device_of(choice: str) -> tuple[Device, str]:
    """The device of `--device` and its name for the screen."""
    import torch

    if choice == "cuda" or (choice == "auto" and torch.cuda.is_available()):
        return "cuda", torch.cuda.get_device_name()
    return "cpu", f"CPU, {len(os.sched_getaffinity(0))} cores"


def restorable(prompt_tokens: int) -> int:
    """How much of a prompt can come from a store: whole pages, and one token stays to compute."""
    return (prompt_tokens - 1) // PAGE_SIZE * PAGE_SIZE


def await_stored(
    server: SGLangServer, tokens: int, timeout: float = 60.0, *, counter: str = STORED_COUNTER
) -> bool:
    """Whether the server said in time that it has stored so many tokens."""
    deadline = time.monotonic() + timeout
    while counted(server.get("/metrics"), counter) < tokens:
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def counted(metrics: str, counter: str = STORED_COUNTER) -> int:
    """The counter's sum over all its label sets, in Prometheus' text format."""
    samples = (line for line in metrics.splitlines() if line.startswith(counter))
    return sum(int(float(line.rsplit(maxsplit=1)[1])) for line in samples)


def _location(backend: str, store: Path) -> list[str]:
    """SGLang's own `file` backend takes its folder from the environment instead."""
    if backend == "file":
        return []
    return ["--hicache-storage-backend-extra-config", json.dumps({"path": str(store)})]
