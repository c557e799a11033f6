"""The picture of the results: `python -m benchmarks.plot RESULTS PNG`. Runs in the plot environment."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

# Not a dependency of this project: it is in its own environment (benchmarks/requirements.txt).
import matplotlib

from benchmarks.report import MEDIA, SMALL_CELL, TITLES, size_name
from benchmarks.results import Results, Spread

matplotlib.use("Agg")

import matplotlib.pyplot as plt

COLUMNS = {"dram": ("put", "get", "exists"), "nvme": ("durable put", "get", "exists")}
OURS, LIMIT = "#c1272d", "#444444"
PEERS = ("#4f81bd", "#93b5d9", "#6aa84f", "#a9cf96", "#b58fc9", "#d9a441", "#8c8c8c")


def draw(results: Results, path: Path) -> None:
    """Medians as bars, ranges as whiskers; one panel an operation."""
    figure, panels = plt.subplots(len(MEDIA), 3, figsize=(16, 9), constrained_layout=True)
    for row, (medium, title) in enumerate(MEDIA.items()):
        for column, operation in enumerate(COLUMNS[medium]):
            panel = panels[row][column]
            _panel(panel, results, medium, operation)
            panel.set_title(f"{title}: {TITLES[operation]}", fontsize=11)
        if panels[row][0].has_data():
            panels[row][0].legend(fontsize=8, frameon=False)
    figure.suptitle(
        f"{results.machine['date']}, {results.machine['cpu']}, {results.machine['cores']} cores, "
        f"{results.machine['disk']}: median and range of {results.rounds} interleaved rounds",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)


def _panel(panel: Any, results: Results, medium: str, operation: str) -> None:
    mine = [s for s in results.series if (s.medium, s.operation) == (medium, operation)]
    mine = [s for s in mine if s.processes == 1 and s.page_bytes != SMALL_CELL]
    sizes = sorted({s.page_bytes for s in mine})
    subjects = list(dict.fromkeys(s.subject for s in mine))
    width = 0.85 / max(1, len(subjects))
    colors = dict(zip((s for s in subjects if _is_peer(s)), PEERS, strict=False))
    for position, subject in enumerate(subjects):
        spreads = [
            (at, Spread.of(values))
            for at, size in enumerate(sizes)
            if (values := results.find(operation, medium, size, subject)) is not None
        ]
        heights = [spread.median for _, spread in spreads]
        whiskers = [
            [spread.median - spread.low for _, spread in spreads],
            [spread.high - spread.median for _, spread in spreads],
        ]
        panel.bar(
            [at + position * width for at, _ in spreads],
            heights,
            width,
            yerr=whiskers,
            label=subject,
            color=colors.get(subject, OURS if subject.startswith("ours") else LIMIT),
            alpha=0.6 if subject.endswith("2 threads") else 1.0,
            error_kw={"elinewidth": 0.8},
        )
    if operation == "exists":
        panel.set_yscale("log")
    middle = width * (len(subjects) - 1) / 2
    panel.set_xticks([at + middle for at in range(len(sizes))], [size_name(size) for size in sizes])
    panel.spines[["top", "right"]].set_visible(False)


def _is_limit(subject: str) -> bool:
    return subject.startswith(("memcpy", "raw"))


def _is_peer(subject: str) -> bool:
    return not _is_limit(subject) and not subject.startswith("ours")


if __name__ == "__main__":
    draw(Results.load(Path(sys.argv[1])), Path(sys.argv[2]))
