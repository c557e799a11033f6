"""What is measured: pages, rounds and processes of each mode."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.crew import Size

KIB, MIB = 1 << 10, 1 << 20
BATCH = 128  # pages of one call, as SGLang's controller has them
OPERATIONS = ("put", "get", "exists", "reopen", "growth")


@dataclass(frozen=True)
class Cell:
    """One table: subjects of a medium side by side."""

    medium: str
    page_bytes: int
    pages: int  # of all processes together, in a round
    processes: int = 1

    @property
    def size(self) -> Size:
        """What one process has of it."""
        pages = self.pages // self.processes
        return Size(self.page_bytes, pages, min(BATCH, pages))


@dataclass(frozen=True)
class Plan:
    """One mode."""

    rounds: int  # measured; one more before them warms up
    cells: tuple[Cell, ...]
    reopen_pages: int  # for our store; the peers get one batch
    growth: tuple[tuple[str, int], ...]  # media and entries


def _cells(sizes: tuple[int, ...], round_bytes: int) -> list[Cell]:
    """A round has 128 pages at least, except of 8 MiB, and at most 2,048."""
    cells = []
    for medium in ("dram", "nvme"):
        for size in sizes:
            least = 32 if size > 2 * MIB else BATCH
            cells.append(Cell(medium, size, max(least, min(2048, round_bytes // size))))
    return cells


def _overhead() -> Cell:
    """Pages so small that what is left is the cost of the call."""
    return Cell("dram", 4 * KIB, 16 * BATCH)


def _processes(counts: tuple[int, ...]) -> list[Cell]:
    return [Cell(m, 2 * MIB, BATCH, n) for m in ("dram", "nvme") for n in counts]


QUICK = Plan(
    rounds=3,
    cells=(_overhead(), *_cells((256 * KIB, 2 * MIB), 128 * MIB)),
    reopen_pages=10_000,
    growth=(("dram", 10**4), ("nvme", 10**4), ("index alone", 10**5)),
)
DEFAULT = Plan(
    rounds=7,
    cells=(
        _overhead(),
        *_cells((16 * KIB, 256 * KIB, 2 * MIB, 8 * MIB), 256 * MIB),
        *_processes((2, 4)),
    ),
    reopen_pages=100_000,
    growth=(
        *((medium, 10**n) for medium in ("dram", "nvme") for n in (4, 5)),
        *(("index alone", 10**n) for n in (4, 5, 6, 7)),
    ),
)
FULL = Plan(
    rounds=11,
    cells=(
        _overhead(),
        *_cells((16 * KIB, 256 * KIB, 2 * MIB, 8 * MIB), 512 * MIB),
        *_processes((2, 3, 4)),
    ),
    reopen_pages=100_000,
    growth=(
        *((medium, 10**n) for medium in ("dram", "nvme") for n in (4, 5, 6)),
        *(("index alone", 10**n) for n in (4, 5, 6, 7)),
    ),
)
