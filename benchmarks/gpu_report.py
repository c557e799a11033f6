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
    """The demo with SGLang on the GPU: `examples/demo`.

    Attributes:
        status: its exit status; 0: each text was restored, and every output was the same.
        output: what it printed last.
    """

    status: int
    output: str


@dataclass(slots=True)
class Report:
    """Of one run.

    Attributes:
        machine: what it ran on, in words.
        skipped: what was left out, and why.
    """

    machine: dict[str, str]
    checked: list[Checked] = field(default_factory=list)
    layouts: list[Timed] = field(default_factory=list)
    blocks: list[Timed] = field(default_factory=list)
    runs: list[Timed] = field(default_factory=list)
    overlap: Overlap | None = None
    served: Served | None = None
    skipped: list[str] = field(default_factory=list)

    def complaints(self) -> list[str]:
        """What is wrong; nothing if all is right."""
        timed = [*self.layouts, *self.blocks, *self.runs]
        found = [f"{each.name}: {what}" for each in self.checked for what in each.wrong or []]
        found += [f"{each.what}: wrong bytes" for each in timed if not each.right]
        if self.served is not None and self.served.status != 0:
            found.append(f"SGLang: the demo ended with {self.served.status}")
        return found

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
        if self.served is not None:
            parts += ["## SGLang", f"```\n{self.served.output}\n```"]
            parts.append("SGLang copies with its own kernels here; the store's are above.")
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
