"""The subjects: which class, in which environment, with how many threads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache" / "bench"
SGLANG_VENV = ROOT / ".venv-sglang"
PEERS = ("nixl", "mooncake", "lmcache")  # environments made by peers/make_venv.sh


@dataclass(frozen=True)
class Spec:
    """One row of the tables."""

    name: str
    family: str  # what --subjects takes
    medium: str  # dram or nvme
    module: str
    kind: str
    venv: str  # one of PEERS, or sglang
    threads: int = 1  # of the caller; requests in flight of raw direct I/O
    split: bool = False  # whether they share out a batch; else the subject uses them itself
    env: dict[str, str] = field(default_factory=dict)

    @property
    def is_limit(self) -> bool:
        """Of the machine: no store, so it has no index and nothing to reopen."""
        return self.family in ("memcpy", "raw")

    @property
    def is_twin(self) -> bool:
        """Another row has the same subject with one thread."""
        return any(f"{other.name}, 2 threads" == self.name for other in SPECS)

    @property
    def slug(self) -> str:
        """For the names of its files."""
        return re.sub(r"\W+", "-", f"{self.medium} {self.name}")

    @property
    def directory(self) -> Path:
        return SGLANG_VENV if self.venv == "sglang" else CACHE / self.venv

    @property
    def python(self) -> Path:
        return self.directory / "bin" / "python"

    def environment(self) -> dict[str, str]:
        """Variables of its workers, beside those of the harness."""
        libraries = [self.directory / "system" / folder for folder in _DEBIAN_LIBRARIES]
        paths = [str(path) for path in libraries if path.is_dir()]
        return {
            "PYTHONPATH": str(ROOT),
            **({"LD_LIBRARY_PATH": ":".join(paths)} if paths else {}),
            **self.env,
        }


_DEBIAN_LIBRARIES = ("usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu")
_HASH = {"PYTHONHASHSEED": "0"}  # LMCache's keys depend on it
_CPU_ENGINE = {"SGLANG_USE_CPU_ENGINE": "1"}  # SGLang imports without a GPU

SPECS = (
    Spec("memcpy", "memcpy", "dram", "memcpy", "Memcpy", "sglang"),
    Spec("memcpy, 2 threads", "memcpy", "dram", "memcpy", "Memcpy", "sglang", threads=2),
    Spec("ours", "ours", "dram", "ours", "OursDram", "sglang"),
    Spec("ours, 2 threads", "ours", "dram", "ours", "OursDram", "sglang", threads=2),
    Spec("ours, through Store", "ours", "dram", "ours", "OursStore", "sglang"),
    Spec("Mooncake", "mooncake", "dram", "mooncake", "Mooncake", "mooncake"),
    Spec(
        "Mooncake, 2 threads",
        "mooncake",
        "dram",
        "mooncake",
        "Mooncake",
        "mooncake",
        threads=2,
        split=True,
    ),
    Spec("LMCache CPU", "lmcache", "dram", "lmcache", "LMCacheCpu", "lmcache", env=_HASH),
    Spec(
        "LMCache CPU, 2 threads",
        "lmcache",
        "dram",
        "lmcache",
        "LMCacheCpu",
        "lmcache",
        2,
        env=_HASH,
    ),
    Spec(
        "LMCache server, 2 threads",
        "lmcache",
        "dram",
        "lmcache_server",
        "LMCacheServer",
        "lmcache",
        threads=2,
        env=_HASH,
    ),
    Spec("raw direct I/O, depth 8", "raw", "nvme", "raw_io", "RawIo", "sglang", threads=8),
    Spec("raw direct I/O, depth 32", "raw", "nvme", "raw_io", "RawIo", "sglang", threads=32),
    Spec("ours", "ours", "nvme", "ours", "OursNvme", "sglang"),
    Spec(
        "HiCacheFile",
        "hicache",
        "nvme",
        "hicache_file",
        "HiCacheFileStore",
        "sglang",
        env=_CPU_ENGINE,
    ),
    Spec("NIXL io_uring", "nixl", "nvme", "nixl", "NixlUring", "nixl"),
    Spec("NIXL AIO", "nixl", "nvme", "nixl", "NixlAio", "nixl"),
    Spec("LMCache disk", "lmcache", "nvme", "lmcache", "LMCacheDisk", "lmcache", env=_HASH),
)
Places = Mapping[str, Path]  # where each medium keeps its stores
FAMILIES = tuple(dict.fromkeys(spec.family for spec in SPECS))
