"""Pages of another process: that they come over a socket, that wrong ones are told, and what the page says of them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks import sharing_report
from benchmarks.catalog import Spec
from benchmarks.crew import CouldNotRun, Crew, Size
from benchmarks.sharing import SPECS
from benchmarks.sharing_report import HASHED, LIMIT, Failed, Measured, Shared, Subject
from benchmarks.subjects import cpu_seconds

SIZE = Size(page_bytes=64 << 10, pages=10, batch_pages=4)
RAW = {spec.name: spec for spec in SPECS if spec.family == "raw"}


@pytest.fixture(params=list(RAW.values()), ids=list(RAW))
def crew(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Crew]:
    spec: Spec = request.param
    crew = Crew(spec, SIZE, Path(os.path.relpath(tmp_path)))
    yield crew
    crew.end()


def test_pages_come_from_the_other_process(crew: Crew) -> None:
    crew.open()
    crew.begin("test")
    crew.time("put")
    for _ in range(2):
        crew.do("blank")
        crew.time("get")
        crew.do("verify")


def test_pages_that_did_not_come_are_told(crew: Crew) -> None:
    crew.open()
    crew.begin("test")
    crew.time("put")
    crew.do("blank")
    with pytest.raises(CouldNotRun, match="WRONG BYTES in 10 pages"):
        crew.do("verify")


def test_both_sides_processor_time_is_counted(crew: Crew) -> None:
    crew.open()
    crew.begin("test")
    crew.time("put")
    before = crew.do("spent")[0]
    crew.time("get")
    after = crew.do("spent")[0]
    assert after["worker"] > before["worker"] > 0
    assert after["servers"] > before["servers"] > 0


def test_a_holder_that_cannot_start_says_why(tmp_path: Path) -> None:
    crew = Crew(RAW[LIMIT], replace(SIZE, pages=0), tmp_path)
    try:
        with pytest.raises(CouldNotRun, match=r"the holder: (OSError|ValueError)"):
            crew.open()
    finally:
        crew.end()


def test_a_process_clock_agrees_with_its_own() -> None:
    begun = cpu_seconds.of_process(os.getpid())
    while time.process_time() < 0.01:
        continue
    assert begun <= cpu_seconds.of_process(os.getpid()) <= time.process_time()
    assert cpu_seconds.of_tree(os.getpid()) >= begun


def _run() -> Shared:
    run = Shared(
        {key: key.upper() for key in ("date", "cpu", "cores", "kernel", "load at start")},
        rounds=3,
        round_bytes=256 << 20,
    )
    run.subjects.append(Subject("other", "1.0", "as it comes"))
    run.cells += [
        Measured(LIMIT, 2 << 20, [4.0, 2.0, 8.0], [0.1, 0.2, 0.3], [0.5, 0.4, 0.6]),
        Measured("other", 2 << 20, [1.0, 1.0, 2.0], [0.7, 0.7, 0.7], [0.8, 0.8, 0.8]),
    ]
    run.failed.append(Failed("third", 0, "no room"))
    return run


def test_ratios_are_of_one_round() -> None:
    text = sharing_report.page(_run())
    other = next(line for line in text.splitlines() if line.startswith("| other | **"))
    columns = [each.strip() for each in other.strip("|").split("|")]
    assert columns[1:] == [
        "**1.00** (1.00 to 2.00)",
        "**0.25** (0.25 to 0.50)",  # not 1.0 / 4.0 of the medians only: 1/4, 1/2, 2/8
        "",
        "0.70",
        "0.80",
    ]
    assert HASHED in text


def test_the_page_names_what_failed_and_how_others_were_set_up() -> None:
    text = sharing_report.page(_run())
    assert "- third: no room" in text
    assert "| other | 1.0 | as it comes |" in text


def test_results_are_kept(tmp_path: Path) -> None:
    run = _run()
    sharing_report.write(run, tmp_path)
    kept = (tmp_path / "sharing.json").read_text()
    assert sharing_report.loaded(kept) == run
    assert asdict(run)["rounds"] == 3
