"""The tables of two backends: what a row says, and when it does not hold."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lmcache_sglang.testing import compare_backends
from lmcache_sglang.testing.compare_backends import TABLES, Case, Table, fill, main
from lmcache_sglang.testing.engine import Answer, Setup
from lmcache_sglang.testing.families_workload import SERVICES, Cold, Run, Service
from lmcache_sglang.testing.modes import MODES, Mode
from lmcache_sglang.testing.modes import Run as ModeRun
from lmcache_sglang.testing.tiny_families import FAMILIES


def outcome(restored: int, tokens: int = 1, computed: int = 1) -> Run:
    """Of a warm engine that gave the one token `tokens` where `computed` was right."""
    right = {"a": Answer([computed], 0, 0, 0, None)}
    return Run(Cold({}, right, ""), {"a": Answer([tokens], 0, 0, restored, None)})


def table_of(file: Run, ours: Run) -> Table:
    def run(setup: Setup, folder: Path) -> Run:
        return file if setup.backend == "file" else ours

    return Table(("family",), [Case(["swa"], 1808, run)])


@pytest.mark.parametrize(
    ("file", "ours", "cells"),
    [
        (outcome(384), outcome(384), "384 | 384 | yes"),
        (outcome(384), outcome(1400), "384 | 1,400 | yes"),
    ],
    ids=["as much", "more"],
)
def test_a_row_holds(
    file: Run, ours: Run, cells: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fill(table_of(file, ours), [0], tmp_path) == []
    assert capsys.readouterr().out.splitlines() == [
        "| family | asked | `file` | `lmcache` | same tokens |",
        "|---|---|---|---|---|",
        f"| swa | 1,808 | {cells} |",
    ]


@pytest.mark.parametrize(
    ("file", "ours", "same"),
    [
        (outcome(384), outcome(368), "yes"),
        (outcome(384, tokens=2), outcome(384), "**no**"),
        (outcome(384), outcome(384, tokens=2), "**no**"),
        (outcome(384), outcome(384, tokens=2, computed=2), "**no**"),
    ],
    ids=["less", "file's tokens", "lmcache's tokens", "other tokens when cold"],
)
def test_a_row_does_not_hold(
    file: Run, ours: Run, same: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fill(table_of(file, ours), [0], tmp_path) == [0]
    assert capsys.readouterr().out.endswith(f"| {same} |\n")


def test_tokens_that_were_restored_are_not_held_for_computed_ones() -> None:
    right = {"a": Answer([1], 0, 0, 16, None)}
    assert not Run(Cold({}, right, ""), {"a": Answer([1], 0, 0, 16, None)}).same


def test_a_mode_compares_all_prompts_with_the_cold_engine() -> None:
    cold = {"first": Answer([1], 0, 0, 0, None), "once": Answer([2], 0, 0, 0, None)}
    wrong = cold | {"once": Answer([3], 0, 0, 384, None)}
    assert ModeRun(cold, cold, {}, "").same
    assert not ModeRun(cold, wrong, {}, "").same
    assert not ModeRun(cold, cold, wrong, "").same
    assert ModeRun(cold, wrong, {}, "").restored == 384


def test_every_family_is_compared() -> None:
    of_a_size = {"wide-mla"}  # of the size that vLLM's attention on CPU takes
    assert {service.family for service in SERVICES} == set(FAMILIES) - of_a_size
    assert len({str(service) for service in SERVICES}) == len(SERVICES)


@pytest.mark.parametrize("case", [*MODES, *SERVICES], ids=str)
def test_hicache_is_on_without_the_flag_of_this_store(case: Mode | Service) -> None:
    """SGLang does not turn it on for its own backends, which then restore nothing."""
    assert "--enable-hierarchical-cache" in case.args


@pytest.mark.parametrize("name", TABLES)
def test_all_rows_of_a_table_have_its_columns(name: str) -> None:
    table = TABLES[name]
    assert all(len(case.cells) == len(table.columns) for case in table.cases)


def test_the_command_fails_where_a_row_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    table = table_of(outcome(384), outcome(0))
    monkeypatch.setattr(compare_backends, "TABLES", {"families": table})
    monkeypatch.setattr(sys, "argv", ["compare_backends", "families"])
    with pytest.raises(SystemExit, match=r"families.*\[0\]"):
        main()


def test_a_row_that_does_not_exist_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["compare_backends", "modes", "99"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "rows of modes are 0 to" in capsys.readouterr().err
