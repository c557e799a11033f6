"""A real SGLang with this package's store, as the engine tests start and ask it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lmdb

from ..config import SHARED_MEMORY, Config
from ..storage.slab.opening import Place
from ..storage.slab.settings import SlabSettings
from ..storage.slab.tier import SlabTier
from .server import ANSWER_SECONDS, Entry, ServerRefused, SGLangServer

PAGE_SIZE = 16
ADMIN_KEY = "an admin's key"
WAIT_SECONDS = 60.0
NEW_TOKENS = 16
LANDING = "32MiB"

MEMORY = (
    SHARED_MEMORY / f"lmcache-engine-tests-{os.getpid()}"
)  # of all CPU tiers of this process's tests

CPU_ENVIRONMENT = {"SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1"}
CPU_ARGS = ("--device", "cpu", "--dtype", "float32")  # bf16 may flip a token with the batch


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for one prompt, and where its prefix came from (in tokens)."""

    tokens: list[int]
    device: int
    host: int
    storage: int
    backend: str | None  # as SGLang names the storage


@dataclass(frozen=True, slots=True)
class Setup:
    """How an engine is started: everything but the model."""

    store: Path
    cpu: str | int = "64MiB"
    disk: str | int = "256MiB"
    flag: bool = True  # with --hicache-storage-backend from the start
    backend: Literal["lmcache", "file"] = "lmcache"
    args: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    entry: Entry = "launch_server"
    page_size: int = PAGE_SIZE
    more: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # settings of each tier
    sglang: Mapping[str, Any] = field(default_factory=dict)  # SGLang's own keys beside them
    direct: bool = False  # without SGLang's host pool
    peers: Path | None = None  # the peer-sharing file

    @property
    def settings(self) -> dict[str, Any]:
        """This package's own."""
        return {
            "path": str(self.store),
            "cpu": {"size": self.cpu, "path": str(self.memory), **self.more.get("cpu", {})},
            "disk": {"size": self.disk, **self.more.get("disk", {})},
            **({"peers": str(self.peers)} if self.peers else {}),
            **(
                {"direct": {"landing": LANDING, **self.more.get("direct", {})}}
                if self.direct
                else {}
            ),
        }

    @property
    def extra_config(self) -> str:
        """All that the backend and SGLang are told."""
        ours = {"file_storage_path": str(self.store)} if self.backend == "file" else self.settings
        return json.dumps({**ours, **self.sglang})

    @property
    def memory(self) -> Path:
        """The directory of the CPU tier, which outlives the engine."""
        return MEMORY / hashlib.sha256(os.fsencode(self.store)).hexdigest()[:12]

    def forget_memory(self) -> None:
        """Remove the CPU tier, as a reboot does; for when no engine has it open."""
        shutil.rmtree(self.memory, ignore_errors=True)


def server(model: Path, setup: Setup, log: Path, *, python: str = sys.executable) -> SGLangServer:
    """A server that is yet to be started."""
    storage = ["--hicache-storage-backend", setup.backend]
    storage += ["--hicache-storage-backend-extra-config", setup.extra_config]
    common = ["--page-size", str(setup.page_size), "--served-model-name", "tiny"]
    common += ["--admin-api-key", ADMIN_KEY, "--enable-cache-report"]
    # The other policies recompute on a busy machine.
    common += ["--hicache-storage-prefetch-policy", "wait_complete"]
    return SGLangServer(
        model,
        args=[*CPU_ARGS, *common, *(storage if setup.flag else []), *setup.args],
        env={**CPU_ENVIRONMENT, **setup.env},
        log_path=log,
        python=python,
        entry=setup.entry,
        api_key=ADMIN_KEY,
    )


def ask(
    server: SGLangServer,
    prompt: Sequence[int],
    *,
    timeout: float = ANSWER_SECONDS,
    **request: Any,
) -> Answer:
    """The greedy continuation of token ids.

    Args:
        timeout: seconds without a byte of the answer; then TimeoutError.
        request: further keys of SGLang's /generate.
    """
    return _answer(server.post("/generate", _body(list(prompt), request), timeout))


def ask_timed(server: SGLangServer, prompt: Sequence[int], **request: Any) -> tuple[Answer, float]:
    """As `ask`, and the seconds until the first token came."""
    begun = time.perf_counter()
    said = server.stream("/generate", _body(list(prompt), request))
    first = next(said)
    seconds = time.perf_counter() - begun
    return _answer([first, *said][-1]), seconds


def _body(input_ids: list[Any], request: Mapping[str, Any]) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    return {"input_ids": input_ids, "sampling_params": sampling, **request}


def _answer(said: Mapping[str, Any]) -> Answer:
    cached = said["meta_info"].get("cached_tokens_details") or {}
    return Answer(
        said["output_ids"],
        cached.get("device", 0),
        cached.get("host", 0),
        cached.get("storage", 0),
        cached.get("storage_backend"),
    )


def flush(server: SGLangServer) -> None:
    """Empty the device and host pools; SGLang refuses while pages are being stored, so again."""
    until(lambda: _flushed(server))


def _flushed(server: SGLangServer) -> bool:
    try:
        server.post("/flush_cache")
    except ServerRefused:
        return False
    return True


def metrics(server: SGLangServer) -> dict[str, float]:
    """By name, the sum over all labels; of a server with --enable-metrics."""
    values: dict[str, float] = {}
    for line in server.get("/metrics").splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            name = name.partition("{")[0]
            values[name] = values.get(name, 0.0) + float(value)
    return values


def prompt(seed: int, tokens: int = 400) -> list[int]:
    """Token ids that no other seed shares a page with."""
    return [3 + (seed * 131 + i * (7 + seed % 5) + i * i) % 500 for i in range(tokens)]


def until(what: Callable[[], bool], timeout: float = WAIT_SECONDS) -> None:
    """Wait for another process to get somewhere; raise when it does not in time."""
    deadline = time.monotonic() + timeout
    while not what():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come true in {timeout:.0f} s")
        time.sleep(0.05)  # the other process offers no event to wait for


def disk_tier(setup: Setup) -> SlabTier:
    """The store's disk tier, beside an engine that may have it open."""
    place, size = (
        Place(setup.store, memory=False),
        Config.of(setup.settings).disk.bytes(setup.store),
    )
    return SlabTier(place, size, SlabSettings(engine="threads"))  # others are measured, for seconds


def memory_tier(setup: Setup) -> SlabTier:
    """The store's CPU tier, beside an engine that may have it open."""
    size = Config.of(setup.settings).cpu.bytes(setup.memory)
    return SlabTier(Place(setup.memory, memory=True), size, name="cpu")


def pages_on_disk(setup: Setup) -> int:
    with closing(disk_tier(setup)) as tier:
        return tier.stats().pages


def pages_in_memory(setup: Setup) -> int:
    with closing(memory_tier(setup)) as tier:
        return tier.stats().pages


def roots_in_memory(setup: Setup) -> int:
    """Pages of which the CPU tier knows no page before them.

    An entry of the index ends with the tag of its parent, flags and a check (storage/csrc/entry.hpp).
    """
    index = lmdb.open(
        str(setup.memory / "index"), subdir=False, readonly=True, lock=False, max_dbs=8
    )
    table = index.open_db(b"index", create=False)
    with index, index.begin(db=table) as txn:
        return sum(entry[-16:-8] == bytes(8) for _, entry in txn.cursor())


def whole_pages(prompt: Sequence[int], page_size: int = PAGE_SIZE) -> int:
    """Tokens of a prompt that a store can give back: whole pages, but for the last token."""
    return (len(prompt) - 1) // page_size * page_size
