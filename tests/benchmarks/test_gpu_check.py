"""The check of a GPU, as far as it can be tried without one: what it asks, what it would find, what it writes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check, gpu_copies
from benchmarks.gpu_copies import Checked, Machine, Place, Timed
from benchmarks.gpu_overlap import Overlap
from benchmarks.gpu_report import Report, Served
from lmcache_sglang.kernels.copy_plan import CopyPlan, copy_pages
from lmcache_sglang.kernels.cuda.choice import Way
from lmcache_sglang.kernels.layout import PageLayout
from lmcache_sglang.testing.torch_pools import PoolShape


@dataclass
class CpuMover:
    """Copies on the CPU, and leaves out the last page where it is told to."""

    careless: bool = False

    def copy(
        self,
        plan: CopyPlan,
        src: PageLayout,
        dst: PageLayout,
        *,
        scales: PageLayout | None = None,
        way: Way | None = None,
        most_blocks: int | None = None,
    ) -> int:
        if self.careless:
            plan = replace(plan, src_slots=plan.src_slots[:-1], dst_slots=plan.dst_slots[:-1])  # type: ignore[index]
        return copy_pages(plan, src, dst, scales=scales)


def seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def machine(careless: bool = False) -> Machine:
    return Machine(CpuMover(careless), Place("host"), Place("GPU"), lambda: None, seconds)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_copies, "SHAPES", {"small": PoolShape(dims=(8, 8))})


def quiet(_: str) -> None:
    """For progress that nobody reads."""


@pytest.mark.usefixtures("few")
def test_it_finds_all_copies_right() -> None:
    done = gpu_copies.check_layouts(machine(), quiet)
    assert [(each.right, each.wrong) for each in done] == [(8 * 8 * 2 * 2, None)] * 3
    done = gpu_copies.check_conversions(machine(), quiet)
    assert all(each.right == 12 and each.wrong is None for each in done)


@pytest.mark.usefixtures("few")
def test_it_finds_what_is_wrong() -> None:
    done = [
        *gpu_copies.check_layouts(machine(careless=True), quiet),
        *gpu_copies.check_conversions(machine(careless=True), quiet),
    ]
    assert all(each.right == 0 and each.wrong for each in done)
    report = Report({}, done)
    assert "small, H2D: device to device by kernel, shifted by 0" in report.complaints()


@pytest.mark.parametrize("careless", [False, True])
def test_what_is_timed_is_compared_too(careless: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_copies, "RUNS", (4096, 65536))
    shape = PoolShape(layers=2, pages=3, heads=2, dims=(64, 64))
    where, said = machine(careless), list[str]()
    timed = gpu_copies.time_layouts(where, shape, said.append)
    assert len(timed) == 6 * 2 * 2 * 3
    timed += gpu_copies.time_blocks(where, shape, said.append)
    timed += gpu_copies.time_runs(where, 1 << 18, said.append)
    assert all(each.right is not careless for each in timed)
    assert all(each.gbps > 0 and each.baseline > 0 for each in timed)
    assert any("WRONG" in line for line in said) is careless


def test_help_says_what_it_does_and_needs() -> None:
    text = gpu_check._parser().format_help()
    for word in ["cudaMemcpy", "--quick", "exit status: 0", "cuda-python", "docs/benchmarks/gpu"]:
        assert word in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_refuses(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--out", str(tmp_path / "out")]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=root)
    assert (done.returncode, done.stdout) == (gpu_check.NO_GPU, "")
    assert done.stderr.startswith("gpu_check: torch finds no GPU here. Nothing was checked")
    assert not (tmp_path / "out").exists()


def test_an_unknown_part_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_check.main(["--only", "copies,cake"])
    assert "'cake' is none of copies, speed, overlap, sglang" in capsys.readouterr().err


def full_report() -> Report:
    return Report(
        {"GPU": "none, this is a test"},
        [Checked("K and V, H2D", 256)],
        [Timed("H2D page_first to device, kernel", 40.0, 50.0, True)],
        [Timed("H2D page_first to device, 4 blocks", 10.0, 50.0, True)],
        [Timed("H2D runs of 4 KiB, copy engine", 5.0, 50.0, True)],
        Overlap(copy=10.0, compute=10.0, both=11.0, whole_first=20.0, asking=1.0),
        Served(0, "6 of 6 outputs identical."),
    )


def test_the_report_has_everything_in_both_forms(tmp_path: Path) -> None:
    page = full_report().write(tmp_path).read_text()
    for line in [
        "Everything that ran was right.",
        "| K and V, H2D | 256 | 0 |",
        "| H2D page_first to device, kernel | 40.0 | 50.0 | 0.80 |",
        "| hidden, of the shorter one | 90% |",
        "6 of 6 outputs identical.",
    ]:
        assert line in page
    whole = json.loads((tmp_path / "gpu_check.json").read_text())
    assert whole["layouts"][0]["gbps"] == 40.0
    assert whole["complaints"] == []


def test_the_report_begins_with_what_is_wrong() -> None:
    report = full_report()
    report.checked[0].add("device to blocks by kernel", is_right=False)
    report.blocks[0] = replace(report.blocks[0], right=False)
    report.served = Served(1, "")
    assert len(report.complaints()) == 3
    assert "**Wrong:**\n\n- K and V, H2D: device to blocks by kernel\n" in report.markdown()
