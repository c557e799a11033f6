# The compiled data plane (kernels/csrc/bindings.cpp). Call it through pages.py, which says more.

from collections.abc import Sequence

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
def checksum_pages(keys: list[bytes], records: list[Buffer]) -> list[int]: ...
def xxh3_64(data: bytes, seed: int = 0) -> int: ...
def address_of(buffer: Buffer, writable: bool) -> int: ...
