"""The hashes of a chain of pages, as SGLang makes them, for engines that have others of their own.

A page's hash is the SHA-256 of the hash before it and the page's token ids, 32 bits each, least significant byte first;
before the first page comes a seed, if the request has a LoRA adapter or a cache salt, and nothing otherwise. (SGLang
0.5.23: mem_cache/utils.py `storage_namespace_seed`, mem_cache/cpp_utils/hash_binding.cpp `hash_page`.) So two prompts
have a page's hash in common if all tokens up to its end are equal.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Iterable

TOKEN_BYTES = 4

_SEED = b"sglang-cache-namespace-v1"


def seed(adapter: str | None, salt: str | None) -> bytes:
    """What the first page's hash begins with.

    Args:
        adapter: the id of a LoRA adapter (SGLang's `extra_key`); None without one.
        salt: that the request was sent with. None and "" are none, as in SGLang.
    """
    salt = salt or None
    if adapter is None and salt is None:
        return b""
    digest = hashlib.sha256(_SEED)
    for part in (adapter, salt):
        if part is None:
            digest.update(b"\x00")
        else:
            text = part.encode()
            digest.update(b"\x01" + len(text).to_bytes(8, "little") + text)
    return digest.digest()


def page_hashes(tokens: Iterable[int], page_size: int, before: bytes = b"") -> list[bytes]:
    """The hashes of pages that follow one another; of tokens that fill no page there is none.

    Args:
        before: the hash of the page before them, or the chain's seed.

    Raises:
        OverflowError: a token id is negative, or has more than 32 bits: SGLang hashes pages of those otherwise.
    """
    words = array("I", tokens)
    if words.itemsize != TOKEN_BYTES or sys.byteorder != "little":
        raise RuntimeError("lmcache: page hashes need a little-endian machine with 32-bit ints")
    text, size = memoryview(words).cast("B"), page_size * TOKEN_BYTES
    hashes = []
    for start in range(0, len(text) - size + 1, size):
        digest = hashlib.sha256(before)
        digest.update(text[start : start + size])
        before = digest.digest()
        hashes.append(before)
    return hashes
