"""LMCache's multiprocess server with shared memory, driven by the client of `lmcache bench server`.

The engine's memory here is that client's: one layer of paged KV in which a page is one block, so half of
a page lies among the keys and half among the values. The harness's rows are copied there and back outside
the timed calls.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

os.environ.setdefault("LMCACHE_TRACK_USAGE", "false")  # it is read at import
os.environ.setdefault("LMCACHE_DISABLE_BANNER", "1")
os.environ.setdefault("LMCACHE_LOG_LEVEL", "WARNING")

import torch

# Not a dependency of this project: it is in its own environment (benchmarks/peers).
from lmcache.cli.commands.bench.server_bench import helpers  # type: ignore[import-not-found]
from lmcache.cli.commands.bench.server_bench.client import (  # type: ignore[import-not-found]
    RequestContext,
    ServerBenchClient,
)
from lmcache.cli.commands.bench.server_bench.config import (  # type: ignore[import-not-found]
    BenchConfig,
)

from benchmarks.subjects.base import Batch, Options, Service, Subject, SubjectError
from benchmarks.subjects.lmcache import CHUNK, tokens_of
from benchmarks.subjects.ports import free_port, wait_for_port

SPARE = 2.5  # times a round's bytes; the server evicts from 80 %
START_SECONDS = 60.0
POLL_SECONDS = 0.0002  # its own client waits 50 ms between two questions


class LMCacheServer(Subject):
    setup: ClassVar[str] = (
        f"lmcache server with --shm-name, engine_driven transfer, chunks of {CHUNK} tokens, one layer, "
        "L1 allocated at start; get is LOOKUP and RETRIEVE, as a retrieve needs a lookup's locks"
    )
    durable: ClassVar[str] = "in memory"

    @classmethod
    def serve(cls, options: Options) -> Service:
        port = free_port()
        size = max(1.0, options.pages * options.workers * options.page_bytes * SPARE / (1 << 30))
        settings = {
            "--host": "127.0.0.1",
            "--port": str(port),
            "--http-port": str(free_port()),
            "--prometheus-port": str(free_port()),
            "--l1-size-gb": f"{size:.2f}",
            "--eviction-policy": "LRU",
            "--supported-transfer-mode": "auto",
            "--chunk-size": str(CHUNK),
            "--shm-name": f"lmcache-bench-{os.getpid()}",
        }
        lmcache = str(Path(sys.executable).parent / "lmcache")
        words = [word for pair in settings.items() for word in pair]
        process = subprocess.Popen([lmcache, "server", "--no-l1-use-lazy", *words])
        service = Service({"port": str(port)}, [process])
        try:
            wait_for_port(port, process, START_SECONDS)
        except SubjectError:
            service.stop()
            raise
        return service

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        torch.set_num_threads(options.threads)
        # One token holds a K and a V of two bytes an element.
        elements = options.page_bytes // (2 * CHUNK * 2)
        config = BenchConfig(
            rpc_url=f"tcp://127.0.0.1:{options.service['port']}",
            http_url="",
            mode="cpu",
            transfer_mode="engine_driven",
            tp_size=1,
            use_mla=False,
            num_tokens=options.pages * CHUNK,
            kvcache_shape_spec=f"(2,{options.pages},{CHUNK},1,{elements}):bfloat16:1",
            num_blocks=options.pages,
            block_size=CHUNK,
        )
        self._client: Any = ServerBenchClient(config, lambda line: None)
        self._client.start()
        # Bytes of the paged memory: [K and V][page][half a page].
        cache = self._client._workers[0].kv_caches["layer.0"]
        self._memory = cache.view(torch.uint8).reshape(2, options.pages, options.page_bytes // 2)
        self._requests: dict[bytes, Any] = {}
        self._used = 0

    def version(self) -> str:
        return f"lmcache {version('lmcache')} (server)"

    def prepare(self, batch: Batch) -> None:
        name = batch.keys[0]
        self._requests[name] = RequestContext(
            sequence_id=0,
            request_id=name.hex()[:16],
            request_kind="bench",
            token_ids=tuple(tokens_of(batch)),
            num_full_tokens=len(batch) * CHUNK,
            total_chunks=len(batch),
            chunk_size=CHUNK,
            block_offset=self._used,
            num_blocks=len(batch),
        )
        self._used += len(batch)
        self._here(batch).copy_(self._halves(batch.source))

    def put(self, batch: Batch) -> None:
        request = self._requests[batch.keys[0]]
        result = self._client.store(request, 0, request.num_full_tokens)
        if result is None or not result.succeeded:
            raise SubjectError("STORE failed")

    def exists(self, batch: Batch) -> int:
        found = self._lookup(self._requests[batch.keys[0]])
        self._client.end_session(self._requests[batch.keys[0]])
        return found

    def get(self, batch: Batch) -> None:
        request = self._requests[batch.keys[0]]
        if self._lookup(request) < len(batch):
            raise SubjectError("LOOKUP missed a chunk")
        result = self._client.retrieve(request, 0, request.num_full_tokens)
        if result is None or not result.succeeded:
            raise SubjectError("RETRIEVE failed")

    def blank(self, batch: Batch) -> None:
        self._here(batch).zero_()

    def deliver(self, batch: Batch) -> None:
        self._halves(batch.target).copy_(self._here(batch))

    def forget(self, batches: Sequence[Batch]) -> None:
        """Only here: the server evicts what is oldest when it needs the room."""
        for batch in batches:
            self._client.end_session(self._requests.pop(batch.keys[0]))
        self._used = 0

    def close(self) -> None:
        self._client.close()

    def _lookup(self, request: Any) -> int:
        client = self._client._req_client
        key = helpers._make_key(
            request.token_ids, request.request_id, start=0, end=request.num_full_tokens
        )
        if not helpers._send_lookup(client, key):
            raise SubjectError("LOOKUP timed out")
        found = helpers._poll_prefetch_status(
            client, request.request_id, max_polls=50_000, poll_interval=POLL_SECONDS
        )
        return int(found or 0)

    def _here(self, batch: Batch) -> torch.Tensor:
        first = self._requests[batch.keys[0]].block_offset
        here: torch.Tensor = self._memory[:, first : first + len(batch)]
        return here

    def _halves(self, rows: Any) -> torch.Tensor:
        return torch.from_numpy(rows).reshape(len(rows), 2, -1).transpose(0, 1)
