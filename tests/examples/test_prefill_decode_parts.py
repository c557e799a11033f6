"""The parts of examples/prefill_decode that need no engine: what is asked, written down and concluded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from examples.demo.client import Cached
from examples.demo.server import restorable
from examples.prefill_decode.client import Reply
from examples.prefill_decode.pair import Hardware, Pair
from examples.prefill_decode.report import Report, Row, table
from examples.prefill_decode.workload import Question, workload
from lmcache_sglang.peer_file import PeerFile

FIRST = Question("document 1", "A text.", True)
ALONE = Reply([1, 2], 0.5, 1000, Cached())
CROSSED = replace(
    ALONE, cached=Cached(storage=restorable(1000)), outcome="stored", prefill=0.4, handover=0.01
)
LEFT = replace(ALONE, outcome="failed")
LAST = Row(FIRST, ALONE, LEFT)


def test_a_run_in_which_all_crossed_is_a_success() -> None:
    assert Report([Row(FIRST, ALONE, CROSSED), LAST]).complaints() == []


@pytest.mark.parametrize(
    ("pair", "complaint"),
    [
        (replace(CROSSED, cached=Cached(storage=restorable(1000) - 64)), "came from the prefill"),
        (replace(CROSSED, tokens=[1, 3]), "outputs differ"),
    ],
)
def test_anything_less_is_a_failure(pair: Reply, complaint: str) -> None:
    report = Report([Row(FIRST, ALONE, pair), LAST])
    assert complaint in "".join(report.complaints())
    assert report.exit_status == 1


def test_a_prefill_engine_that_still_answers_was_not_killed() -> None:
    report = Report([Row(FIRST, ALONE, CROSSED), Row(FIRST, ALONE, CROSSED)])
    assert report.complaints() == ["the prefill engine was not missed"]


def test_table_fits_a_terminal() -> None:
    drawn = table(Report([Row(FIRST, ALONE, CROSSED), LAST])).splitlines()
    assert drawn[-2].split()[-2:] == ["ms", "yes"]
    assert len({len(line) for line in drawn}) == 1 and len(drawn[0]) <= 100


def test_each_document_is_asked_about_twice_and_the_last_shares_nothing() -> None:
    work = workload(str)
    assert [question.is_first for question in work.questions] == [True, False, True, False]
    starts = {question.prompt[:100] for question in (*work.questions, work.alone)}
    assert len(starts) == 3


def test_the_nodes_name_each_other_and_keep_their_secrets(tmp_path: Path) -> None:
    Pair(Hardware(Path("model"), "cpu", (), tmp_path), tmp_path)
    prefill, decode = (
        yaml.safe_load((tmp_path / name / "peers.yaml").read_text())
        for name in ("prefill", "decode")
    )
    assert decode["peers"][0]["address"] == prefill["listen"]
    assert prefill["peers"][0]["address"] == decode["listen"]
    for file in (prefill, decode):
        assert Path(file["key"]).stat().st_mode & 0o077 == 0
        assert "secret" not in json.dumps(file["peers"])
        PeerFile(tmp_path / file["name"] / "peers.yaml").load()
