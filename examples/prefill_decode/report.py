"""What both say together: the table and the exit status."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from examples.demo.report import drawn
from examples.demo.server import restorable
from examples.prefill_decode.client import Reply
from examples.prefill_decode.proxy import Outcome
from examples.prefill_decode.workload import Question

TOP = ("", "prompt", "", "restored", "alone", "pair:", "", "", "same")
HEAD = (
    "request",
    "tokens",
    "prefill",
    "from peer",
    "TTFT",
    "prefill",
    "handover",
    "TTFT",
    "output",
)


@dataclass(frozen=True, slots=True)
class Row:
    """One request, and what one engine alone and the pair made of it."""

    question: Question
    alone: Reply
    pair: Reply

    @property
    def same(self) -> bool:
        return self.alone.tokens == self.pair.tokens

    @property
    def restored(self) -> int:
        """Tokens that the decode engine had from its store: for it, from the prefill engine's."""
        return self.pair.cached.storage


@dataclass(frozen=True, slots=True)
class Report:
    """Args: rows: in the order in which they were asked; the last one without a prefill engine."""

    rows: Sequence[Row]

    def complaints(self) -> list[str]:
        """What makes the run a failure; nothing, if it is none."""
        *crossed, last = self.rows
        short = [
            f"{row.question.name}: {row.restored} tokens came from the prefill engine, not "
            f"{restorable(row.pair.prompt_tokens)}"
            for row in crossed
            if row.question.is_first and row.restored < restorable(row.pair.prompt_tokens)
        ]
        differing = [
            f"{row.question.name}: the outputs differ" for row in self.rows if not row.same
        ]
        left = [] if last.pair.outcome == Outcome.FAILED else ["the prefill engine was not missed"]
        return [*short, *differing, *left]

    @property
    def exit_status(self) -> int:
        return 1 if self.complaints() else 0

    def as_json(self) -> dict[str, object]:
        rows = [
            {"name": row.question.name, "alone": asdict(row.alone), "pair": asdict(row.pair)}
            for row in self.rows
        ]
        return {"rows": rows, "complaints": self.complaints(), "exit_status": self.exit_status}


def table(report: Report) -> str:
    """Plain text, at most 100 columns."""
    return drawn([TOP, HEAD, *(_cells(row) for row in report.rows)])


def _cells(row: Row) -> tuple[str, ...]:
    pair = row.pair
    return (
        row.question.name,
        f"{pair.prompt_tokens:,}",
        pair.outcome,
        f"{row.restored:,}",
        *(f"{s * 1e3:,.0f} ms" for s in (row.alone.ttft, pair.prefill, pair.handover, pair.ttft)),
        "yes" if row.same else "NO",
    )
