"""The kernels' source, as it is shipped."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "csrc"
KERNELS = "copy_kernels.cu"
HEADERS = ("copy_body.hpp", "copy_params.hpp", "fp8.hpp", "launch.hpp", "portable.hpp")
STANDARD = "c++17"


@cache
def text(name: str) -> bytes:
    """Of one of the files above."""
    return (FOLDER / name).read_bytes()


@cache
def digest() -> str:
    """16 hexadecimal digits that change with any of the files, or with how they are compiled."""
    state = hashlib.sha256(STANDARD.encode())
    for name in (KERNELS, *HEADERS):
        state.update(f"\0{name}\0{len(text(name))}\0".encode() + text(name))
    return state.hexdigest()[:16]
