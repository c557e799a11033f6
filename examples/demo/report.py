"""What the two rounds say together: the table, the summary, the exit status."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from examples.demo.client import Reply
from examples.demo.rounds import Round
from examples.demo.workload import Script

HEAD = (
    *("request", "tokens"),
    *("device/host/storage", "TTFT"),
    *("device/host/storage", "TTFT"),
)


@dataclass(frozen=True, slots=True)
class Row:
    """One request and what each server made of it."""

    name: str
    is_first: bool  # of its text: on a cold server nothing of it can be cached
    cold: Reply
    warm: Reply

    @property
    def ratio(self) -> float:
        return self.warm.ttft / self.cold.ttft

    @property
    def same(self) -> bool:
        return self.cold.text == self.warm.text


@dataclass(frozen=True, slots=True)
class Report:
    """Attributes: names: of the two servers, for the table."""

    rows: Sequence[Row]
    names: tuple[str, str] = ("cold server", "warm server")
    occasion: str = "After a restart"

    @property
    def firsts(self) -> list[Row]:
        return [row for row in self.rows if row.is_first]

    @property
    def headline(self) -> Row:
        """The first request on the longest text."""
        return max(self.firsts, key=lambda row: row.cold.prompt_tokens)

    @property
    def restored(self) -> int:
        return sum(row.warm.cached.storage for row in self.rows)

    def complaints(self) -> list[str]:
        """What makes the run a failure; nothing, if it is none."""
        lost = [row.name for row in self.firsts if not row.warm.cached.storage]
        early = [row.name for row in self.rows if row.cold.cached.storage]
        differing = [row for row in self.rows if not row.same]
        return [
            *(f"{name}: nothing was restored from the store" for name in lost),
            *(f"{name}: restored on the cold server already" for name in early),
            *(
                f"{row.name}: the outputs differ\n  cold {row.cold.text!r}\n  warm {row.warm.text!r}"
                for row in differing
            ),
        ]

    @property
    def exit_status(self) -> int:
        return 1 if self.complaints() else 0

    def summary(self, backend: str) -> str:
        row = self.headline
        same = sum(row.same for row in self.rows)
        return (
            f"{self.occasion}: {self.restored:,} tokens restored from {backend}; "
            f"first token of a {row.cold.prompt_tokens:,}-token prompt in {row.warm.ttft:.2f} s "
            f"instead of {row.cold.ttft:.2f} s (ratio {row.ratio:.2f}); "
            f"{same} of {len(self.rows)} outputs identical."
        )

    def as_json(self) -> dict[str, object]:
        """For machines: the rows, and what was concluded from them."""
        return {
            "rows": [asdict(row) | {"ratio": row.ratio, "same": row.same} for row in self.rows],
            "headline_ratio": self.headline.ratio,
            "restored_tokens": self.restored,
            "complaints": self.complaints(),
            "exit_status": self.exit_status,
        }


def compare(
    scripts: Iterable[Script],
    cold: Round,
    warm: Round,
    names: tuple[str, str] = ("cold server", "warm server"),
) -> Report:
    """Each request of the first round next to the same one of the second."""
    rows: list[Row] = []
    for script in scripts:
        pairs = zip(cold.replies[script.name], warm.replies[script.name], strict=True)
        for turn, (before, after) in enumerate(pairs):
            rows.append(Row(f"{script.name} {turn + 1}", turn == 0, before, after))
    return Report(rows, names)


def table(report: Report) -> str:
    """Plain text, at most 100 columns."""
    first, second = report.names
    top = (
        "",
        "prompt",
        f"{first}: cached",
        "",
        f"{second}: cached",
        "",
        f"{_word(second)}/",
        "same",
    )
    head = (*HEAD, _word(first), "output")
    return drawn([top, head, *(_cells(row) for row in report.rows)])


def _word(name: str) -> str:
    """Of a ratio's column: "warm" of the warm server."""
    return name.removesuffix(" server")


def drawn(lines: Sequence[Sequence[str]]) -> str:
    """A table. Args: lines: two of headings, and then the rows."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    top, head, *rows = (_draw(line, widths) for line in lines)
    return "\n".join([top, head, "-" * len(head), *rows])


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        f"{row.cold.prompt_tokens:,}",
        *_measured(row.cold),
        *_measured(row.warm),
        f"{row.ratio:.2f}",
        "yes" if row.same else "NO",
    )


def _measured(reply: Reply) -> tuple[str, str]:
    cached = reply.cached
    return f"{cached.device:,} / {cached.host:,} / {cached.storage:,}", f"{reply.ttft:.2f} s"


def _draw(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
    return "  ".join([first.strip().ljust(widths[0]), *others])
