"""The picture of a simulation: a panel a figure, a line a policy, by the size of the cache.

Needs matplotlib, which the extra `plot` brings; nothing else does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PictureError

try:
    from matplotlib.figure import Figure as Picture
    from matplotlib.ticker import FuncFormatter, NullFormatter
except ImportError as error:
    raise PictureError(
        "--plot draws with matplotlib, which is not installed: pip install 'lmcache-sglang[plot]'"
    ) from error

if TYPE_CHECKING:
    from ..simulation import Simulated
    from .simulate import Figure

WIDTH, HEIGHT = 6.0, 4.2  # inches of a panel
STYLES: dict[str, dict[str, Any]] = {  # mostly Okabe and Ito's colours
    "default": {"color": "#c1272d", "linewidth": 2.5, "zorder": 3},
    "belady": {"color": "#444444", "linestyle": "--"},
    "lru": {"color": "#0072b2"},
    "sieve": {"color": "#e69f00"},
    "s3-fifo": {"color": "#56b4e9"},
    "second-touch": {"color": "#cc79a7"},
}


def draw(figures: Sequence[Figure], found: Sequence[Simulated], path: Path) -> None:
    """Write the picture; its format is what the name ends with. Raises: PictureError: it cannot be written."""
    picture = Picture(figsize=(WIDTH * len(figures), HEIGHT), layout="constrained")
    for at, figure in enumerate(figures):
        _panel(picture.add_subplot(1, len(figures), at + 1), figure, found)
    try:
        picture.savefig(path, dpi=120)
    except OSError as error:
        raise PictureError(f"{path} cannot be written: {error.strerror}") from error


def _panel(axes: Any, figure: Figure, found: Sequence[Simulated]) -> None:
    for policy in dict.fromkeys(each.policy for each in found):
        points = sorted(
            (each.blocks, value)
            for each, value in zip(found, figure.values, strict=True)
            if each.policy == policy
        )
        axes.plot(*zip(*points, strict=True), marker="o", label=policy, **STYLES[policy])
    sizes = sorted({each.blocks for each in found})
    axes.set_title(figure.title)
    axes.set_xscale("log")
    axes.set_xticks(sizes, [f"{blocks:,}" for blocks in sizes])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("blocks that the cache has room for")
    axes.set_ylim(bottom=min(0, *figure.values))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: figure.said(value)))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
