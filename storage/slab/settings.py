"""What a slab store can be told, beyond where it lies and how large it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Eviction = Literal["sieve", "s3-fifo", "lru"]
Engine = Literal["auto", "threads", "io_uring"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SlabSettings:
    """Attributes:
    eviction: which page gives way.
    durable: a page that `put` reported stored survives a loss of power (a file's store only).
    threads: that copy at once (a store in memory).
    queue_depth: requests in flight (a store in a file).
    engine: of direct I/O; "auto" measures at start.
    direct: past the page cache, where the file system allows it.
    huge_pages: asked for from the kernel (a store in memory).
    seconds: longest that a `get` or a `put` begins new work.
    """

    eviction: Eviction = "sieve"
    durable: bool = True
    threads: int = 2
    queue_depth: int = 32
    engine: Engine = "auto"
    direct: bool = True
    huge_pages: bool = False
    seconds: float = 10.0
