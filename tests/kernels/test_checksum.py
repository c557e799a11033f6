"""The checksum is XXH3-64, bit for bit: another value would turn every stored page into a miss."""

from __future__ import annotations

import random

import pytest
import xxhash

from lmcache_sglang.kernels import _native
from lmcache_sglang.kernels.pages import checksums

BLOCK = 1024  # bytes of input that one pass over the secret takes
SEEDS = [0, 1, 0xDEADBEEF, (1 << 63) + 12345, (1 << 64) - 1]
LENGTHS = [
    *range(242),  # the four short classes, each length of them
    *(241 + n for n in range(0, 300, 7)),
    *(BLOCK * blocks + n for blocks in (1, 2, 3, 16) for n in (-64, -1, 0, 1, 63, 64, 65)),
    (1 << 20) - 1,
    1 << 20,
    (1 << 20) + 17,
]


@pytest.mark.parametrize("seed", SEEDS)
def test_no_length_hashes_otherwise_than_xxhash(seed: int) -> None:
    data = random.Random(seed).randbytes(max(LENGTHS))
    for length in LENGTHS:
        part = data[:length]
        assert _native.xxh3_64(part, seed) == xxhash.xxh3_64_intdigest(part, seed), length


@pytest.mark.parametrize("offset", range(1, 17))
def test_alignment_does_not_change_the_hash(offset: int) -> None:
    data = random.Random(0).randbytes(5000)
    shifted = memoryview(bytes(offset) + data)[offset:]
    assert checksums([b"key"], [shifted]) == checksums([b"key"], [data])


def test_a_pages_checksum_is_seeded_by_its_key() -> None:
    data = bytes(range(256)) * 9
    seed = xxhash.xxh3_64_intdigest(b"a key")
    assert checksums([b"a key"], [data]) == [xxhash.xxh3_64_intdigest(data, seed)]
    assert checksums([b"a key"], [data]) != checksums([b"another key"], [data])
