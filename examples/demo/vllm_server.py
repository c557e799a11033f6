"""How vLLM is started on this machine, and asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from examples.demo.client import Cached, ChatClient, Message, Reply
from examples.demo.server import PAGE_SIZE, Device, await_stored, counted
from lmcache_sglang.testing.server import SGLangServer

SAVED_PAGES = "vllm:lmcache_save_pages_total"
HITS = "vllm:external_prefix_cache_hits_total"
CONTEXT = 16384
KV_BYTES = 1 << 30  # of vLLM's own cache


@dataclass(frozen=True, slots=True)
class VLLMSetup:
    """As server.py's of SGLang. Attributes: python: the interpreter whose vLLM runs. served_name: of the model."""

    python: Path
    model: Path
    served_name: str
    store: Path
    device: Device
    extra: Sequence[str] = field(default=())

    def args(self) -> list[str]:
        """vLLM's flags; a flag in `extra` overrides the same one here."""
        transfer = {
            "kv_connector": "LMCacheSGLangConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"path": str(self.store), "page_size": PAGE_SIZE},
        }
        flags = [
            *("--served-model-name", self.served_name),
            *("--kv-transfer-config", json.dumps(transfer)),
            # One pool for all layers, as SGLang has for Gemma 3: so the two share its pages.
            "--disable-hybrid-kv-cache-manager",
            *("--max-model-len", str(CONTEXT)),
            "--enable-prompt-tokens-details",
        ]
        if self.device == "cpu":
            flags += ["--dtype", "float32", "--enforce-eager"]  # float32: see server.py
            flags += ["--kv-cache-memory-bytes", str(KV_BYTES)]
        return [*flags, *self.extra]

    def env(self) -> dict[str, str]:
        env = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        return env | ({"VLLM_CPU_OMP_THREADS_BIND": "nobind"} if self.device == "cpu" else {})

    def server(self, log_path: Path) -> SGLangServer:
        return SGLangServer(
            self.model,
            args=self.args(),
            env=self.env(),
            log_path=log_path,
            python=str(self.python),
            entry="vllm",
        )

    def client(self, server: SGLangServer) -> ChatClient:
        def hits() -> int:
            return counted(server.get("/metrics"), HITS)

        return VLLMClient(server.host, server.port, self.served_name, hits)

    def await_stored(self, server: SGLangServer, tokens: int) -> bool:
        return await_stored(server, tokens // PAGE_SIZE, counter=SAVED_PAGES)

    def command(self) -> str:
        """What to type to start such a server by hand."""
        words = ["vllm", "serve", str(self.model), *self.args()]
        return " ".join(f"'{word}'" if "{" in word else word for word in words)


class VLLMClient(ChatClient):
    """vLLM tells how much of a prompt was cached; how much of that was the store's its counter tells, between requests.

    Args:
        hits: reads that counter.
    """

    def __init__(self, host: str, port: int, model: str, hits: Callable[[], int]) -> None:
        super().__init__(host, port)
        self._model = model
        self._hits = hits

    def ask(self, messages: Sequence[Message], max_tokens: int) -> Reply:
        before = self._hits()
        reply = super().ask(messages, max_tokens)
        restored = self._hits() - before
        return replace(
            reply, cached=Cached(device=reply.cached.device - restored, storage=restored)
        )

    def request(self, messages: Sequence[Message], max_tokens: int) -> dict[str, Any]:
        own = super().request(messages, max_tokens) | {"model": self._model}
        del own["return_cached_tokens_details"]
        return own
