"""The settings, as one frozen value, and the only reader of files and environment.

Later sources win, key by key:

1. defaults that work with no setting at all
2. the file that ``LMCACHE_SGLANG_CONFIG`` names (YAML, JSON or TOML)
3. what the engine passes: SGLang's ``--hicache-storage-backend-extra-config``, JSON or ``@file``

For example::

    path: /nvme/lmcache        # the store directory; default under $XDG_CACHE_HOME
    cpu:  {size: 64GiB}        # shared memory of this node; 0 turns the tier off
    disk: {size: 1TiB}         # files on this node; 0 turns the tier off
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, ValidationError

from .errors import ConfigError
from .sections import Section, Size, explain, switched
from .storage.slab import files

ENVIRONMENT = "LMCACHE_SGLANG_CONFIG"

# Keys of the extra config that SGLang 0.5.23 reads itself, or adds.
SGLANG_KEYS = frozenset(
    {
        "allocator",
        "file_storage_path",
        "hicache_storage_pass_prefix_keys",
        "prefetch_threshold",
        "prefetch_timeout_base",
        "prefetch_timeout_per_ki_token",
        "tp_lcm_size",
    }
)

GIB = 1 << 30
CPU_MOST = 8 * GIB  # of an automatic size
DISK_MOST = 100 * GIB
LANDING_MOST = 4 * GIB  # of an automatic size
LANDING_SHARE = 0.05  # of the memory this process may use
CGROUPS = Path("/sys/fs/cgroup")
CPU_SHARE = 0.1  # of the memory this process may use
DISK_SHARE = 0.25  # of what the file system has free beside the store
UNUSED_MOST = 128 << 10  # of the bytes that a store was given (OVERHEAD in storage/slab/plan.py)
DISK_MAX = 64 << 40  # of a given size: what a slot's number can name

SHARED_MEMORY = Path("/dev/shm")
CPU_LEAST = 256 << 20  # of an automatic size: a container's default /dev/shm of 64 MB is no tier

Eviction = Annotated[
    Literal["sieve", "s3-fifo", "lru"],
    Field(description="Which page gives way; descendants always before their ancestors."),
]


class CpuConfig(Section):
    """The CPU tier: shared memory of this node, one for all engines that share the store directory."""

    size: Size = Field(
        default="auto",
        description='Memory for pages and all that belongs to them: "64GiB", 0 for none, or "auto": a '
        "tenth of the memory, at most 8 GiB and half of what /dev/shm has free.",
    )
    path: Path | None = Field(
        default=None,
        description="Directory in shared memory (tmpfs); one of its own under /dev/shm by default.",
    )
    eviction: Eviction = "sieve"
    threads: int = Field(default=2, ge=1, le=64, description="Threads that copy at once.")
    huge_pages: bool = Field(default=False, description="Ask the kernel for huge pages.")

    def bytes(self, directory: Path) -> int:
        """The size in bytes; 0 where an automatic one would be too small to be of use.

        Raises:
            ConfigError: the file system cannot be asked what it has free.
        """
        if self.size != "auto":
            return int(self.size)
        own, beside = _room(directory, "cpu.path")
        free = beside + own
        size = max(own, min(CPU_MOST, int(CPU_SHARE * memory_limit()), free // 2))
        return size if size >= CPU_LEAST else 0

    def directory(self, store: Path) -> Path:
        """Where the tier lies. Args: store: the store directory, which tells users of a node apart."""
        if self.path is not None:
            return _with_home(self.path)
        digest = hashlib.sha256(os.fsencode(store)).hexdigest()[:12]
        return SHARED_MEMORY / f"lmcache-sglang-{os.getuid()}" / digest


class DiskConfig(Section):
    """The disk tier."""

    size: Size = Field(
        default="auto",
        description='Bytes on disk, allocated in full: "1TiB", 0 for none, or "auto": a quarter of '
        "what is free, at most 100 GiB.",
    )
    eviction: Eviction = "sieve"
    mode: Literal["write-through", "write-back"] = Field(
        default="write-through",
        description="Written in the background at once, or when a page would go from the CPU tier.",
    )
    admission: Literal["all", "second-touch"] = Field(
        default="all",
        description="Which pages are written: all, or those used again since they came.",
    )
    minimum_prefix: int = Field(
        default=0, ge=0, description="Pages of the shortest chain that is written; 0 for any."
    )
    promotion: Literal["always", "second-hit", "never"] = Field(
        default="always", description="Which pages read from disk go up to the CPU tier again."
    )
    durability: Literal["durable", "relaxed"] = Field(
        default="durable",
        description="durable: flushed before it is listed; relaxed: not, checksums alone decide.",
    )
    queue_depth: int = Field(default=32, ge=1, le=256, description="Requests in flight.")
    engine: Literal["auto", "threads", "io_uring"] = Field(
        default="auto", description="Of direct I/O; auto measures at start."
    )
    direct: bool = Field(default=True, description="Past the page cache, where the disk allows it.")

    def bytes(self, path: Path) -> int:
        """The size in bytes.

        Args:
            path: the store directory, which need not exist yet.

        Raises:
            ConfigError: the file system cannot be asked what it has free.
        """
        if self.size != "auto":
            return int(self.size)
        own, free = _room(path, "path")
        # Not below what is there: what others have put on the disk since must not cost pages.
        return max(own, min(DISK_MOST, int(DISK_SHARE * (free + own))))


class DirectConfig(Section):
    """The way from the device to the store without SGLang's host pool."""

    enabled: bool = Field(
        default=True, description="`direct: true` and `direct: false` say it, too."
    )
    landing: Size = Field(
        default="auto",
        description="Memory of each rank that pages land in before they are loaded; the longest prefix that one "
        'request can restore: "4GiB", or "auto": a twentieth of the memory, at most 4 GiB.',
    )
    cubins: Path | None = Field(
        default=None,
        description="Folder for the compiled kernels of an NVIDIA GPU, or of those that were compiled ahead of time "
        "(`python -m lmcache_sglang.kernels.cuda --help`); else `cubins` in the store's folder.",
    )

    @property
    def bytes(self) -> int:
        if self.landing != "auto":
            return int(self.landing)
        return min(LANDING_MOST, int(LANDING_SHARE * memory_limit()))


def _room(path: Path, setting: str) -> tuple[int, int]:
    """Bytes that a store there was made with, and bytes that are free beside it."""
    try:
        taken = files.allocated(path)
        return taken and taken + UNUSED_MOST, _free(path)
    except OSError as error:
        raise ConfigError(setting, f"cannot look at {path}: {error.strerror}") from error


def _free(path: Path) -> int:
    return shutil.disk_usage(_existing(path)).free


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _default_path() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # to be ignored then, says the XDG specification
        base = _with_home(Path("~/.cache"))
    return base / "lmcache-sglang"


def _with_home(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ConfigError("path", f"{path}: {error} Give an absolute path") from error


class Config(Section):
    """Everything a store needs to know."""

    path: Path = Field(default_factory=_default_path, description="The store directory.")
    cpu: CpuConfig = CpuConfig()
    disk: DiskConfig = DiskConfig()
    restore: Literal["when-faster", "always"] = Field(
        default="when-faster",
        description="Whether a prefix that the engine computes sooner than it is read is computed, by what "
        "was measured of both.",
    )
    peers: Path | None = Field(
        default=None,
        description="The peer-sharing file, with which nodes share pages (docs/peers.md).",
    )
    direct: Annotated[DirectConfig, BeforeValidator(switched)] = DirectConfig(enabled=False)

    @classmethod
    def load(cls, extra: Mapping[str, Any] | None = None) -> Config:
        """The settings in force.

        Args:
            extra: what the engine was given; SGLang's own keys in it are passed over.

        Raises:
            ConfigError: names the key as the user wrote it, and the nearest valid one if it is unknown.
        """
        file = os.environ.get(ENVIRONMENT, "")
        from_file = read_file(Path(file), ENVIRONMENT) if file else {}
        own = {key: value for key, value in (extra or {}).items() if key not in SGLANG_KEYS}
        return cls.of(_merge(from_file, own))

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Config:
        """Raises: ConfigError."""
        try:
            config = cls.model_validate(settings)
        except ValidationError as error:
            raise explain(error, cls) from error
        config._require_usable()
        return config

    def _require_usable(self) -> None:
        if self.cpu.size == 0 and self.disk.size == 0:
            raise ConfigError(
                "cpu.size", "it is 0 and so is disk.size: there is nowhere to keep pages"
            )
        if self.cpu.size != "auto" and self.cpu.size > memory_limit():
            raise ConfigError(
                "cpu.size",
                f"{int(self.cpu.size)} bytes, but this process may use {memory_limit()} (the machine's "
                "memory, or its container's limit, against which shared memory counts); give it less",
            )
        if self.disk.size != "auto" and self.disk.size > DISK_MAX:
            raise ConfigError("disk.size", f"{self.disk.size} bytes; the most is {DISK_MAX}")
        if not self.directory.is_absolute():
            raise ConfigError("path", f"{self.path} is relative; give an absolute path")
        self._require_own_memory()
        if self.direct.landing == 0:
            raise ConfigError(
                "direct.landing", "it is 0: no page could land; give it more, or auto"
            )

    def _require_own_memory(self) -> None:
        memory = self.cpu.directory(self.directory)
        if not memory.is_absolute():
            raise ConfigError("cpu.path", f"{self.cpu.path} is relative; give an absolute path")
        if memory == self.directory:
            raise ConfigError(
                "cpu.path", f"{memory} is the store directory itself; give another one"
            )

    @property
    def directory(self) -> Path:
        """`path` with ``~`` resolved."""
        return _with_home(self.path)


def parse_extra(text: str | None) -> dict[str, Any]:
    """The value of ``--hicache-storage-backend-extra-config`` as SGLang reads it: JSON or ``@file``.

    Raises:
        ConfigError: it does not parse, or is not a mapping.
    """
    setting = "--hicache-storage-backend-extra-config"
    if not text:
        return {}
    if text.startswith("@"):
        return read_file(Path(text[1:]), setting)
    try:
        return _mapping(json.loads(text), setting)
    except json.JSONDecodeError as error:
        raise ConfigError(setting, f"not JSON: {error} (a file is given as @/path.yaml)") from error


def read_file(path: Path, setting: str) -> dict[str, Any]:
    """Read a YAML, JSON or TOML file.

    Args:
        setting: what named the file, for the message.

    Raises:
        ConfigError: it cannot be read or parsed, or is not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
        match path.suffix.lower():
            case ".json":
                return _mapping(json.loads(text), f"{setting} ({path})")
            case ".toml":
                return tomllib.loads(text)
            case ".yaml" | ".yml":
                return _mapping(yaml.safe_load(text), f"{setting} ({path})")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(setting, f"cannot read {path}: {error}") from error
    except (ValueError, yaml.YAMLError) as error:  # ValueError: JSON, TOML, or a date that is none
        raise ConfigError(setting, f"{path} does not parse: {error}") from error
    raise ConfigError(setting, f"{path} is no .yaml, .yml, .json or .toml file")


def _mapping(value: object, setting: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(setting, f"a mapping of keys to values is wanted, not {value!r}")
    return {str(key): item for key, item in value.items()}


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = _merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def memory_limit() -> int:
    """Bytes of memory this process may use: the machine's, or its container's if that is less."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [
        int(text)
        for name in ("memory.max", "memory.limit_in_bytes")
        for group in _control_groups()
        if (text := _first_line(group / name)).isdigit()
    ]
    return min([machine, *limits])


def _control_groups() -> list[Path]:
    """This process's control groups and all above them, of either version (cgroups(7))."""
    groups = []
    for line in _lines(Path("/proc/self/cgroup")):
        _, controllers, name = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = CGROUPS / "memory" if controllers else CGROUPS
        own = root / name.lstrip("/")
        groups += [group for group in (own, *own.parents) if group.is_relative_to(root)]
    return groups


def _first_line(file: Path) -> str:
    """ "" where there is no such control group file; "max" where there is no limit."""
    return next(iter(_lines(file)), "")


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.is_file() else []
