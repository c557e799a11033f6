# The compiled data plane (kernels/csrc/bindings.cpp). Call it through pages.py, which says more.

import builtins
from collections.abc import Callable, Sequence

from typing_extensions import Buffer

def gather_pages(
    keys: list[bytes],
    records: list[Buffer],
    addresses: Sequence[int],
    sizes: Sequence[int],
    per_page: int,
) -> list[int]: ...
def scatter_pages(
    keys: list[bytes],
    records: list[Buffer],
    checksums: Sequence[int],
    addresses: Sequence[int],
    sizes: Sequence[int],
    per_page: int,
) -> list[bool]: ...
def place_pages(
    records: list[Buffer], addresses: Sequence[int], sizes: Sequence[int], per_page: int
) -> None: ...
def checksum_pages(keys: list[bytes], records: list[Buffer]) -> list[int]: ...
def address_of(buffer: Buffer, writable: bool) -> int: ...

# The rest is called by tests alone.

def scatter_page(
    key: bytes, record: Buffer, addresses: Sequence[int], sizes: Sequence[int]
) -> int: ...
def checksum_page(key: bytes, addresses: Sequence[int], sizes: Sequence[int]) -> int: ...
def xxh3_64(data: bytes, seed: int = 0) -> int: ...
def xxh3_64_of_parts(parts: list[Buffer], seed: int = 0) -> int: ...
def simd_units() -> list[str]: ...
def use_simd(unit: str) -> None: ...

class Workers:
    def __init__(self, threads: int) -> None: ...
    def run(self, count: int, job: Callable[[int], object]) -> None: ...

# Copies between layouts (kernels/csrc/bind_copy.cpp). Call them through layout.py and copy_plan.py.

class Layout:
    def __init__(
        self,
        planes: Sequence[tuple[Sequence[int], int, int, int, int]],
        pages_at: Sequence[int],
        pages: int,
        page_size: int,
        heads: int,
        itemsize: int,
        memory: Sequence[tuple[int, int]],
    ) -> None: ...

def copy(
    src: Layout,
    dst: Layout,
    scales: Layout,
    src_slots: object,  # int64 [n], contiguous, in host memory
    dst_slots: object,
    tokens: int,
    first_layer: int,
    last_layer: int,
    convert: int,
    workers: Workers,
) -> int: ...

# Launches (kernels/csrc/bind_launch.cpp). Call them through cuda/.

THREADS: int  # of a block

class Plan:  # as `copy` takes it, but nothing is copied
    def __init__(
        self,
        src: Layout,
        dst: Layout,
        scales: Layout,
        src_slots: object,
        dst_slots: object,
        tokens: int,
        first_layer: int,
        last_layer: int,
        convert: int,
    ) -> None: ...
    @property
    def bytes(self) -> int: ...
    @property
    def table_bytes(self) -> int: ...
    @property
    def run_count(self) -> int: ...
    def parts(self) -> list[tuple[int, int, int, int]]: ...
    def launches(
        self, host: int, device: int, most_blocks: int
    ) -> list[tuple[str, builtins.bytes, int]]: ...
    def runs(self) -> tuple[list[int], list[int], list[int]]: ...

class LayeredPlan:  # a launch or more of each layer, those of the first layer first
    def __init__(
        self,
        src: Layout,
        dst: Layout,
        scales: Layout,
        src_slots: object,
        dst_slots: object,
        tokens: int,
        first_layer: int,
        last_layer: int,
        convert: int,
    ) -> None: ...
    @property
    def bytes(self) -> int: ...  # of one layer, as run_count
    @property
    def table_bytes(self) -> int: ...
    @property
    def run_count(self) -> int: ...
    @property
    def layers(self) -> int: ...
    def launches(
        self, host: int, device: int, most_blocks: int
    ) -> list[tuple[str, builtins.bytes, int]]: ...

def kernels() -> list[str]: ...  # that a cubin must have

# For tests: a launch on a CPU, thread by thread.
def emulate(
    kernel: str,
    params: bytes,
    blocks: int,
    reads: Sequence[tuple[int, int]],
    writes: Sequence[tuple[int, int]],
    workers: Workers,
) -> tuple[list[bytes], int]: ...
