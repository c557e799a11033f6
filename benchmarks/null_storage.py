"""A storage backend that remembers names and moves nothing: what SGLang itself spends on having one.

SGLang loads it as its backend `dynamic`. It answers as a store that keeps everything, so an engine with
it prefetches, loads to the device, skips the prefill and backs up as with a real one. What comes back is
whatever the host pool held: the tokens are nonsense, the work is the same.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.mem_cache.hicache_storage import HiCacheStorage

CONFIG = {
    "backend_name": "null",
    "module_path": "benchmarks.null_storage",
    "class_name": "NullStorage",
    "interface_v1": 1,
    "hicache_storage_pass_prefix_keys": True,  # as the flag's own backend has it
}


class NullStorage(HiCacheStorage):  # type: ignore[misc]  # SGLang is not typed
    """Its page hashes are all it has."""

    def __init__(self, *_: Any) -> None:
        self._known: set[str] = set()

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        return next((i for i, key in enumerate(keys) if key not in self._known), len(keys))

    def exists(self, key: str) -> bool:
        return key in self._known

    def batch_get_v1(
        self, keys: list[str], host_indices: Any, extra_info: Any = None
    ) -> list[bool]:
        return [key in self._known for key in keys]

    def batch_set_v1(
        self, keys: list[str], host_indices: Any, extra_info: Any = None
    ) -> list[bool]:
        self._known.update(keys)
        return [True] * len(keys)

    def get(self, *_: Any, **__: Any) -> None:
        """Not called, nor are the next three: the zero-copy calls are selected."""

    def batch_get(self, *_: Any, **__: Any) -> None:
        """As `get`."""

    def set(self, *_: Any, **__: Any) -> None:
        """As `get`."""

    def batch_set(self, *_: Any, **__: Any) -> None:
        """As `get`."""
