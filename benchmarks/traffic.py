"""What a restore moves, and how long that takes at the rates of links: computed, nothing is measured.

    python -m benchmarks.traffic

The page's bytes cross the link once, whichever layouts are on its sides, as the copy changes the layout on the way. The
kernels read the host's memory and write the device's, so the link is the slower of the two by far (3,350 GB/s of an
H100's memory against 55 of its link), and launches cost microseconds.
"""

from __future__ import annotations

from benchmarks.copies import MODELS, SGLANG_PAGE

TOKENS = 8192
# GB/s in one direction that a large copy reaches, from the links' own rates: 16 lanes of 16 and of 32 GT/s with
# 128b/130b coding are 31.5 and 63; of both some 12 % go to packets' headers at payloads of 256 bytes. NVLink-C2C is
# 450 a direction (Grace Hopper's data sheet), of which the same part is assumed.
LINKS = {"PCIe 4 x16": 27.0, "PCIe 5 x16": 55.0, "NVLink-C2C": 396.0}
LAUNCH_MICROSECONDS = 5.0  # assumed of one launch; one a layer


def table() -> list[str]:
    """Rows of Markdown."""
    head = ["model", "bytes a token", f"{TOKENS} tokens", "launches, layer by layer"]
    lines = [" | ".join(["", *head, *LINKS, ""]).strip(), "| --- " * (len(head) + len(LINKS)) + "|"]
    for name, shape in MODELS.items():
        token = shape.page_bytes // shape.page_size
        whole = token * TOKENS
        times = [f"{1e3 * seconds(whole, rate, shape.layers):.0f} ms" for rate in LINKS.values()]
        cells = [name, f"{token:,}", f"{whole / 1e9:.2f} GB, {TOKENS // SGLANG_PAGE} pages"]
        lines.append(" | ".join(["", *cells, str(shape.layers), *times, ""]).strip())
    return lines


def seconds(size: int, rate: float, launches: int) -> float:
    """Args: rate: GB/s."""
    return size / (rate * 1e9) + launches * LAUNCH_MICROSECONDS * 1e-6


def assumptions() -> str:
    """In words, beneath the table."""
    rates = ", ".join(f"{name} {rate:.0f} GB/s" for name, rate in LINKS.items())
    return f"Assumed: {rates}; {LAUNCH_MICROSECONDS:.0f} µs a launch, one a layer, none of it overlapped."


if __name__ == "__main__":
    print("\n".join(table()), assumptions(), sep="\n\n")
