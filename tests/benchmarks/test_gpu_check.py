"""The check of a GPU, as far as it can be tried without one: what it asks, what it would find, what it writes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import gpu_check, gpu_copies, gpu_pieces, gpu_serve
from benchmarks.gpu_copies import Checked, Machine, Place, Timed
from benchmarks.gpu_overlap import Overlap
from benchmarks.gpu_report import Report, Served
from lmcache_sglang.kernels.copy_plan import CopyPlan, copy_pages
from lmcache_sglang.kernels.cuda.choice import Way
from lmcache_sglang.kernels.cuda.staging import Passed
from lmcache_sglang.kernels.layout import PageLayout
from lmcache_sglang.testing.torch_pools import KINDS, PoolShape


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

    def copy_by_layer(
        self, plan: CopyPlan, src: PageLayout, dst: PageLayout
    ) -> Sequence[LateLayer]:
        layers = [replace(plan, layers=range(layer, layer + 1)) for layer in range(src.layers)]
        return [LateLayer(self, each, src, dst) for each in layers]


@dataclass
class LateLayer:
    """An event, and the copy of the layer that is to be there behind it."""

    mover: CpuMover
    plan: CopyPlan
    src: PageLayout
    dst: PageLayout
    done: bool = False

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.mover.copy(self.plan, self.src, self.dst)
        self.done = True


def read_behind(event: Passed, tensors: Sequence[Tensor]) -> list[Tensor]:
    event.synchronize()
    return [each.clone() for each in tensors]


def read_too_early(event: Passed, tensors: Sequence[Tensor]) -> list[Tensor]:
    early = [each.clone() for each in tensors]
    event.synchronize()
    return early


def seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def machine(careless: bool = False) -> Machine:
    return Machine(
        CpuMover(careless),
        Place("host"),
        Place("GPU"),
        lambda: None,
        seconds,
        read_behind,
        lambda _: nullcontext(),
    )


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_copies, "SHAPES", {"small": PoolShape(dims=(8, 8))})
    few_layers = {"small": PoolShape(layers=2, pages=3, heads=2, dims=(8, 8))}
    monkeypatch.setattr(gpu_pieces, "BY_LAYER", few_layers)


def quiet(_: str) -> None:
    """For progress that nobody reads."""


@pytest.mark.usefixtures("few")
def test_it_finds_all_copies_right() -> None:
    done = gpu_copies.check_layouts(machine(), quiet)
    assert [(each.right, each.wrong) for each in done] == [(len(KINDS) ** 2 * 2 * 2, None)] * 3
    done = gpu_copies.check_conversions(machine(), quiet)
    assert all(each.right == 12 and each.wrong is None for each in done)
    done = gpu_pieces.check_tokens(machine(), quiet)
    assert [(each.right, each.wrong) for each in done] == [(len(KINDS) ** 2 * 3 * 2, None)] * 3
    done = gpu_pieces.check_by_layer(machine(), quiet)
    assert [(each.right, each.wrong) for each in done] == [(4, None)] * 3
    (registered,) = gpu_pieces.check_registered(machine(), quiet)
    assert (registered.right, registered.wrong) == (6, None)
    (orders,) = gpu_pieces.check_orders(machine(), quiet)
    assert (orders.right, orders.wrong) == (6 * 3 * 2 * 2, None)  # each way and back


@pytest.mark.usefixtures("few")
def test_it_finds_what_is_wrong() -> None:
    done = [
        *gpu_copies.check_layouts(machine(careless=True), quiet),
        *gpu_copies.check_conversions(machine(careless=True), quiet),
        *gpu_pieces.check_tokens(machine(careless=True), quiet),
        *gpu_pieces.check_registered(machine(careless=True), quiet),
        *gpu_pieces.check_by_layer(machine(careless=True), quiet),
        *gpu_pieces.check_orders(machine(careless=True), quiet),
    ]
    assert all(each.right == 0 and each.wrong for each in done)
    report = Report({}, done)
    assert "small, H2D: device to device by kernel, shifted by 0" in report.complaints()


@pytest.mark.usefixtures("few")
def test_it_finds_a_layer_that_comes_after_its_event() -> None:
    done = gpu_pieces.check_by_layer(replace(machine(), read_behind=read_too_early), quiet)
    assert [each.right for each in done] == [0] * 3


def test_numbers_are_compared_bit_by_bit_but_for_nan() -> None:
    nan = torch.tensor([0x7FC0, -0x40], dtype=torch.int16).view(torch.bfloat16)
    assert nan.isnan().all()
    assert gpu_copies.same_numbers(nan, nan.flip(0))
    zeros = torch.tensor([0.0, -0.0])
    assert gpu_copies.same_numbers(zeros, zeros.clone())
    assert not gpu_copies.same_numbers(zeros, zeros.flip(0))
    assert not gpu_copies.same_numbers(torch.tensor([1.0]), torch.tensor([float("nan")]))


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
    assert "'cake' is none of copies, speed, overlap, sglang, direct" in capsys.readouterr().err


def full_report() -> Report:
    return Report(
        {"GPU": "none, this is a test"},
        [Checked("K and V, H2D", 256)],
        [Timed("H2D page_first to device, kernel", 40.0, 50.0, True)],
        [Timed("H2D page_first to device, 4 blocks", 10.0, 50.0, True)],
        [Timed("H2D runs of 4 KiB, copy engine", 5.0, 50.0, True)],
        Overlap(copy=10.0, compute=10.0, both=11.0, whole_first=20.0, asking=1.0, right=True),
        [Served("SGLang", 0, "6 of 6 outputs identical.")],
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
    report.served = [Served("SGLang", 1, "")]
    report.overlap = Overlap(1.0, 1.0, 1.0, 1.0, 1.0, right=False)
    report.failed.append("speed: RuntimeError: an illegal memory access")
    assert len(report.complaints()) == 5
    assert "**Wrong:**\n\n- K and V, H2D: device to blocks by kernel\n" in report.markdown()


def test_a_part_that_fails_is_complained_of_and_the_others_run(tmp_path: Path) -> None:
    report, ran = Report({}), list[str]()

    def fault() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    parts = {"copies": fault, "direct": lambda: ran.append("direct")}
    gpu_check.run_parts(report, parts, tmp_path, quiet)
    assert ran == ["direct"]
    whole = json.loads((tmp_path / "gpu_check.json").read_text())
    assert whole["complaints"][0].startswith("copies: RuntimeError: an illegal memory access")
    assert "**Wrong:**" in (tmp_path / "gpu_check.md").read_text()


def test_what_is_interrupted_is_written(tmp_path: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gpu_check.run_parts(Report({}), {"copies": interrupt}, tmp_path, quiet)
    assert (tmp_path / "gpu_check.md").exists()


def test_what_takes_too_long_leaves_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even one in a session of its own, that ignores being asked to end."""
    monkeypatch.setattr(gpu_serve, "ENDING_SECONDS", 0.2)
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        "print('begun', flush=True)\n"
        "child.wait()\n"
    )
    status, output = gpu_serve.run_to_its_end([sys.executable, "-c", code], 3)
    assert (status, output) == (124, "begun\n\nnot ended after 3 s")
    stat = Path("/proc", (tmp_path / "pid").read_text(), "stat")
    deadline = time.monotonic() + 10
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_what_ends_by_itself_says_what_it_said() -> None:
    code = "import sys; print('said'); sys.exit(3)"
    assert gpu_serve.run_to_its_end([sys.executable, "-c", code], 60) == (3, "said\n")


@pytest.mark.parametrize(
    ("warm", "status"),
    [
        (gpu_serve.Asked([5, 6], 200, 192), 0),
        (gpu_serve.Asked([5, 7], 200, 192), 1),
        (gpu_serve.Asked([5, 6], 200, 128), 1),
    ],
)
def test_a_restart_must_restore_all_and_say_the_same(warm: gpu_serve.Asked, status: int) -> None:
    cold = gpu_serve.Asked([5, 6], 200, 0)
    assert gpu_serve.compare([cold], [warm]).status == status


def test_a_prompt_of_no_whole_page_proves_nothing() -> None:
    short = gpu_serve.Asked([5], 10, 0)
    assert gpu_serve.compare([short], [short]).status == 1
