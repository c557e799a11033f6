"""The checksum is XXH3-64, bit for bit: another value would turn every stored page into a miss."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
import xxhash

from lmcache_sglang.kernels import _native
from lmcache_sglang.kernels.pages import checksums
from lmcache_sglang.testing.tier_suite import EngineMemory

if TYPE_CHECKING:
    from typing_extensions import Buffer

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


@pytest.mark.usefixtures("simd")
@pytest.mark.parametrize("seed", SEEDS)
def test_no_length_hashes_otherwise_than_xxhash(seed: int) -> None:
    data = random.Random(seed).randbytes(max(LENGTHS))
    for length in LENGTHS:
        part = data[:length]
        assert _native.xxh3_64(part, seed) == xxhash.xxh3_64_intdigest(part, seed), length


def parts_of(data: bytes, cuts: list[int]) -> list[Buffer]:
    ends = [0, *sorted(cuts), len(data)]
    return [data[start:end] for start, end in pairwise(ends)]


@pytest.mark.usefixtures("simd")
@pytest.mark.parametrize("seed", SEEDS)
def test_no_split_hashes_otherwise_than_the_whole(seed: int) -> None:
    choose = random.Random(seed)
    data = choose.randbytes(max(LENGTHS))
    for length in LENGTHS:
        part = data[:length]
        cuts = [choose.randint(0, length) for _ in range(choose.randint(0, 9))]
        split = parts_of(part, cuts)
        whole = xxhash.xxh3_64_intdigest(part, seed)
        assert _native.xxh3_64_of_parts(split, seed) == whole, (length, cuts)


@pytest.mark.parametrize("length", [0, 1, 17, 239, 240, 241, 255, 256, 257, 320, 512, 1024, 1025])
def test_no_single_cut_changes_the_hash(length: int) -> None:
    data = random.Random(length).randbytes(length)
    whole = xxhash.xxh3_64_intdigest(data, 7)
    for cut in range(length + 1):
        assert _native.xxh3_64_of_parts([data[:cut], data[cut:]], 7) == whole, cut


@pytest.mark.parametrize("step", [1, 3, 63, 64, 65, 255, 256, 257, 1024])
def test_no_even_split_changes_the_hash(step: int) -> None:
    data = random.Random(step).randbytes(5000)
    parts = parts_of(data, list(range(step, len(data), step)))
    assert _native.xxh3_64_of_parts(parts, 7) == xxhash.xxh3_64_intdigest(data, 7)


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


def test_a_page_in_segments_has_the_checksum_of_its_record() -> None:
    data = random.Random(0).randbytes(3000)
    pages = EngineMemory([data], 7).segments
    assert [_native.checksum_page(b"k", pages.addresses, pages.sizes)] == checksums([b"k"], [data])


@pytest.mark.parametrize("unit", ["", "sse9", "avx"])
def test_a_vector_unit_that_is_not_here_is_refused(unit: str) -> None:
    with pytest.raises(ValueError, match="no such vector unit"):
        _native.use_simd(unit)
