"""Counts of bytes as people write them."""

from __future__ import annotations

import argparse
import math
import re

UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def size(count: int) -> str:
    """Bytes in the largest unit that they are at least one of."""
    unit = min(4, int(math.log(count, 1024))) if count else 0
    return f"{count / 1024**unit:.4g} {UNITS[unit]}"


def count_of(text: str) -> int:
    """Bytes that an option names, as "64MiB". Raises: ArgumentTypeError."""
    parts = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]+)?) ?([KMGT]iB|)", text)
    count = int(float(parts[1]) * 1024 ** UNITS.index(parts[2] or "bytes")) if parts else 0
    if not 0 < count < 1 << 63:
        raise argparse.ArgumentTypeError(f"{text!r} is no size, as 64MiB is one")
    return count
