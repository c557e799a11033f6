"""The report of `gpu_check.py`: what was seen on one machine, as JSON and for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.gpu_copies import Checked, Timed
from benchmarks.gpu_overlap import Overlap


@dataclass(frozen=True, slots=True)
class Served:
    """SGLang on the GPU, and again after a restart.

    Attributes:
        name: what ran.
        status: 0: each text was restored, and every output was the same.
        output: what it printed last.
    """

    name: str
    status: int
    output: str


@dataclass(slots=True)
class Report:
    """Of one run.

    Attributes:
        machine: what it ran on, in words.
        skipped: what was left out, and why.
        failed: parts that ended with an exception, and what it said.
    """

    machine: dict[str, str]
    checked: list[Checked] = field(default_factory=list)
    layouts: list[Timed] = field(default_factory=list)
    blocks: list[Timed] = field(default_factory=list)
    runs: list[Timed] = field(default_factory=list)
    overlap: Overlap | None = None
    served: list[Served] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def complaints(self) -> list[str]:
        """What is wrong; nothing if all is right."""
        timed = [*self.layouts, *self.blocks, *self.runs]
        found = [f"{each.name}: {what}" for each in self.checked for what in each.wrong or []]
        found += [f"{each.what}: wrong bytes" for each in timed if not each.right]
        if self.overlap is not None and not self.overlap.right:
            found.append("a layer at a time, beside other work: wrong bytes")
        found += [f"{each.name} ended with {each.status}" for each in self.served if each.status]
        return [
            *found,
            *(f"{each}, and what was to follow in it did not run" for each in self.failed),
        ]

    def write(self, directory: Path) -> Path:
        """gpu_check.json and gpu_check.md; returns the latter."""
        directory.mkdir(parents=True, exist_ok=True)
        whole = asdict(self) | {"complaints": self.complaints()}
        (directory / "gpu_check.json").write_text(json.dumps(whole, indent=1) + "\n")
        page = directory / "gpu_check.md"
        page.write_text(self.markdown())
        return page

    def markdown(self) -> str:
        """The page."""
        parts = ["# GPU check", "Made by `python -m benchmarks.gpu_check`.", self._verdict()]
        parts.append(_table(["machine", ""], list(self.machine.items())))
        parts += ["## Right bytes", *self._correctness()]
        for title, rows in [
            ("Layouts", self.layouts),
            ("Blocks of a launch", self.blocks),
            ("Length of a run", self.runs),
        ]:
            if rows:
                parts += [f"## {title}", _speeds(rows)]
        if self.overlap is not None:
            parts += ["## A layer at a time", _overlap(self.overlap)]
        for served in self.served:
            parts += [f"## {served.name}", f"```\n{served.output}\n```"]
        if self.skipped:
            parts += ["## Left out", "\n".join(f"- {what}" for what in self.skipped)]
        return "\n\n".join(parts) + "\n"

    def _verdict(self) -> str:
        complaints = self.complaints()
        if not complaints:
            return "Everything that ran was right."
        return "**Wrong:**\n\n" + "\n".join(f"- {each}" for each in complaints)

    def _correctness(self) -> list[str]:
        rows = [(each.name, str(each.right), str(len(each.wrong or []))) for each in self.checked]
        return [_table(["copies", "right", "wrong"], rows)] if rows else ["Nothing was checked."]


def _speeds(rows: Sequence[Timed]) -> str:
    head = ["copy", "GB/s", "plain copy, GB/s", "ratio"]
    cells = [
        (
            each.what + ("" if each.right else " (wrong bytes)"),
            f"{each.gbps:.1f}",
            f"{each.baseline:.1f}",
            f"{each.gbps / each.baseline:.2f}",
        )
        for each in rows
    ]
    return _table(head, cells)


def _overlap(seen: Overlap) -> str:
    rows = [
        ("copy alone", f"{seen.copy:.2f} ms"),
        ("compute alone", f"{seen.compute:.2f} ms"),
        ("all layers copied, then computed", f"{seen.whole_first:.2f} ms"),
        ("each layer computed behind its copy", f"{seen.both:.2f} ms"),
        ("hidden, of the shorter one", f"{seen.hidden:.0%}"),
        ("enqueueing the copies, on the CPU", f"{seen.asking:.2f} ms"),
    ]
    return _table(["", ""], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
