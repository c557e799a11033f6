"""What the page of vLLM's connectors says of measurements, and that wrong answers end a run."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.vllm.report import About, Run, page
from benchmarks.vllm.rounds import SETTING, Told, WrongAnswer, _compare

MACHINE = dict.fromkeys(("date", "cpu", "cores", "kernel", "load at start", "load at end"), "?")
SUBJECTS = ("none", "ours", "fs", "lmcache")


def told(*, warm: float, step: float) -> dict[str, Any]:
    """Of a subject in a round. Args: warm: seconds to the first token. step: of decoding."""
    asked = {"ttft": warm, "cpu": warm / 2, "cached": 3968}
    own = {**asked, "ttft": 0.05}
    return {
        "cold": {
            "first": [{**asked, "ttft": 3.0}] * 2,
            "decoded": [{"seconds": step, "cpu": step}, {"seconds": 2 * step, "cpu": step}],
            "counters": {
                "vllm:lmcache_save_bytes_total": 4e9,
                "vllm:lmcache_save_seconds_total": 2.0,
            },
        },
        "warm": {"first": [asked] * 2, "again": [own] * 2, "counters": {}},
    }


def lines(*, ours: float, step: float) -> list[str]:
    run = Run(MACHINE, [About(name, name, "memory", "") for name in SUBJECTS], 16384)
    for _ in range(3):
        run.rounds.append(
            {
                "none": told(warm=3.0, step=0.010) | {"warm": {}},
                "ours": told(warm=ours, step=step),
                "fs": told(warm=0.2, step=0.011),
                "lmcache": told(warm=0.1, step=0.012),
            }
        )
    return page(run, SETTING).splitlines()


@pytest.mark.parametrize(
    ("ours", "step", "verdicts"),
    [
        (0.09, 0.0101, ["met", "met", "met"]),
        (0.15, 0.0101, ["missed", "missed", "met"]),
        (0.1, 0.0103, ["met", "met", "missed"]),
    ],
)
def test_targets_are_judged_by_the_best_peer(ours: float, step: float, verdicts: list[str]) -> None:
    found = lines(ours=ours, step=step)
    judged = [line for line in found[found.index("## Targets") :] if line.startswith("- ")]
    assert all("lmcache" in line for line in judged[:2])
    assert ["missed" if "missed" in line else "met" for line in judged] == verdicts


def test_bandwidth_is_of_bytes_that_were_moved() -> None:
    (row,) = [line for line in lines(ours=0.1, step=0.01) if line.startswith("| ours | memory |")][
        -1:
    ]
    derived, _, store = (column.split("**")[1:2] for column in row.split(" | ")[2:5])
    assert derived == [f"{3968 * 16384 / 0.05 / 1e9:.2f}"]
    assert store == ["2.00"]


def test_an_answer_that_differs_ends_the_run() -> None:
    def process(*tokens: int) -> dict[str, Any]:
        return {"first": [{"tokens": list(tokens)}], "again": [], "decoded": []}

    _compare({"none": Told(process(1, 2), {}), "ours": Told(process(1, 2), process(1, 2))})
    with pytest.raises(WrongAnswer, match="ours"):
        _compare({"none": Told(process(1, 2), {}), "ours": Told(process(1, 2), process(1, 3))})
