"""The subjects: what each wants of vLLM, and what runs beside it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.catalog import CACHE, ROOT
from benchmarks.subjects.base import SubjectError
from benchmarks.subjects.ports import free_port, wait_for_port
from lmcache_sglang.testing.vllm import PYTHON

CHUNK = 64  # tokens that each subject stores as one
MEMORY_BYTES = 1 << 30  # of each subject's tier in memory
DISK_SIZE = "1GiB"
SHARED = Path("/dev/shm") / f"lmcache-vllm-bench-{os.getpid()}"
LMCACHE_VENV = CACHE / "lmcache-vllm"
SERVER_SECONDS = 90.0


@dataclass(frozen=True)
class Place:
    """Where a subject is in one round. Attributes: disk, memory: directories of its own. port: of its server, or 0."""

    disk: Path
    memory: Path
    port: int = 0


@dataclass(frozen=True)
class Subject:
    """One row.

    Attributes:
        warm: of which medium a new process loads; nothing where it computes.
        transfer: vLLM's `kv_transfer_config`, given the place and whether it is the new process.
        about: how it is set up.
    """

    name: str
    label: str
    warm: str
    about: str
    transfer: Callable[[Place, bool], dict[str, Any]]
    python: Path = PYTHON
    flags: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    has_server: bool = False
    cold: str = ""  # the name of another subject whose first process this one shares

    @contextmanager
    def beside(self, folder: Path) -> Iterator[Place]:
        """Where it is, with its server."""
        place = Place(folder / self.name, SHARED / self.name)
        for each in (place.disk, place.memory):
            each.mkdir(parents=True)
        try:
            if not self.has_server:
                yield place
            else:
                with _lmcache_server(folder / "server.log") as port:
                    yield Place(place.disk, place.memory, port)
        finally:
            for each in (place.disk, place.memory):
                shutil.rmtree(each, ignore_errors=True)


@contextmanager
def _lmcache_server(log: Path) -> Iterator[int]:
    port = free_port()
    settings = {
        "--host": "127.0.0.1",
        "--port": str(port),
        "--http-port": str(free_port()),
        "--prometheus-port": str(free_port()),
        "--l1-size-gb": str(MEMORY_BYTES / (1 << 30)),
        "--eviction-policy": "LRU",
        "--supported-transfer-mode": "auto",
        "--chunk-size": str(CHUNK),
        "--shm-name": f"lmcache-vllm-bench-{os.getpid()}-{port}",
    }
    words = [word for pair in settings.items() for word in pair]
    command = [str(LMCACHE_VENV / "bin" / "lmcache"), "server", "--no-l1-use-lazy", *words]
    environment = os.environ | LMCACHE_ENVIRONMENT
    with log.open("wb") as told:
        process = subprocess.Popen(command, stdout=told, stderr=told, env=environment)
    try:
        wait_for_port(port, process, SERVER_SECONDS)
        yield port
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def make_lmcache() -> None:
    """Its environment, over vLLM's. Raises: SubjectError."""
    script = ROOT / "benchmarks" / "peers" / "make_venv.sh"
    command = [str(script), "lmcache", str(LMCACHE_VENV), str(PYTHON.parents[1])]
    done = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise SubjectError(done.stderr.strip().splitlines()[-1])


def _store(place: Place, *, cpu: bool) -> dict[str, Any]:
    size = str(MEMORY_BYTES) if cpu else "0"
    return {
        "path": str(place.disk / "store"),
        "cpu": {"size": size, "path": str(place.memory / "store")},
        "disk": {"size": DISK_SIZE},
    }


def _none(place: Place, is_new: bool) -> dict[str, Any]:
    return {}


def _ours(place: Place, is_new: bool) -> dict[str, Any]:
    return _connector(
        "LMCacheSGLangConnector",
        {**_store(place, cpu=True), "page_size": CHUNK},
        kv_connector_module_path="lmcache_sglang.connector",
    )


def _ours_disk(place: Place, is_new: bool) -> dict[str, Any]:
    return _connector(
        "LMCacheSGLangConnector",
        {**_store(place, cpu=not is_new), "page_size": CHUNK},
        kv_connector_module_path="lmcache_sglang.connector",
    )


def _offloading(tier: dict[str, Any]) -> dict[str, Any]:
    return _connector(
        "OffloadingConnector",
        {
            "spec_name": "CpuTieringSpec",
            "spec_module_path": "benchmarks.vllm.cpu_tiering",
            "cpu_bytes_to_use": MEMORY_BYTES,
            "block_size": CHUNK,
            "offload_prompt_only": False,  # all others store what is generated too
            "secondary_tiers": [tier],
        },
    )


def _fs(place: Place, is_new: bool) -> dict[str, Any]:
    return _offloading({"type": "fs", "root_dir": str(place.disk)})


def _tier(place: Place, is_new: bool) -> dict[str, Any]:
    return _offloading(
        {
            "type": "StoreTier",
            "module_path": "benchmarks.vllm.store_tier",
            "settings": _store(place, cpu=True),
        }
    )


def _lmcache(place: Place, is_new: bool) -> dict[str, Any]:
    where = {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": place.port}
    return _connector("LMCacheMPConnector", where)


def _connector(name: str, extra: dict[str, Any], **more: str) -> dict[str, Any]:
    return {
        "kv_connector": name,
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra,
        **more,
    }


LMCACHE_ENVIRONMENT = {
    "LMCACHE_TRACK_USAGE": "false",
    "LMCACHE_DISABLE_BANNER": "1",
    "LMCACHE_LOG_LEVEL": "WARNING",
}
SUBJECTS = (
    Subject("none", "none", "", "no connector: all is computed", _none),
    Subject(
        "ours",
        "ours, memory",
        "memory",
        "LMCacheSGLangConnector, CPU tier over disk, default settings; the new process finds both",
        _ours,
    ),
    Subject(
        "ours-disk",
        "ours, disk",
        "disk",
        "the same store, opened by the new process without its CPU tier (direct I/O)",
        _ours_disk,
        cold="ours",
    ),
    Subject(
        "fs",
        "vLLM's fs tier",
        "disk",
        "OffloadingConnector, primary tier in memory over its `fs` tier with default threads (direct I/O); "
        "the primary tier ends with its process",
        _fs,
    ),
    Subject(
        "lmcache",
        "LMCache server",
        "memory",
        "LMCacheMPConnector, `lmcache server` with --shm-name, L1 allocated at start; it outlives vLLM's process",
        _lmcache,
        python=LMCACHE_VENV / "bin" / "python",
        flags=("--numba",),
        environment=LMCACHE_ENVIRONMENT | {"VLLM_PLUGINS": ""},
        has_server=True,
    ),
    Subject(
        "tier",
        "ours as a tier",
        "memory",
        "OffloadingConnector as above over our store (store_tier.py), CPU tier over disk",
        _tier,
    ),
)
