"""The cable between network namespaces: it carries, is slow, loses, is cut and shows what it carries."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmcache_sglang.testing.cable import Cable, why_not
from lmcache_sglang.testing.cable_jobs import echo, say
from lmcache_sglang.testing.store_process import Job, run

HERE, THERE = "10.9.0.1", "10.9.0.2"
WORDS = bytes(range(256)) * 2000
SHORT = 0.5  # seconds that one waits in vain


@pytest.fixture(scope="module", autouse=True)
def allowed() -> None:
    if refused := run(why_not):
        pytest.skip(f"no network of its own for a process here: {refused}")


def test_bytes_come_back_as_they_were_sent(tmp_path: Path) -> None:
    with Cable(tmp_path / "cable") as cable:
        server = Job(echo, HERE, cable.path)
        assert run(say, THERE, cable.path, HERE, WORDS) == WORDS
        assert server.result() == len(WORDS)
        assert cable.carried > 0 and cable.lost == 0


def test_tcp_gets_bytes_through_a_slow_and_lossy_cable(tmp_path: Path) -> None:
    with Cable(tmp_path / "cable", delay=0.01, loss=0.1, seed=1) as cable:
        server = Job(echo, HERE, cable.path)
        assert run(say, THERE, cable.path, HERE, WORDS) == WORDS
        assert server.result() == len(WORDS)
        assert cable.lost > 0


def test_nothing_passes_a_cut_cable(tmp_path: Path) -> None:
    with Cable(tmp_path / "cable") as cable:
        cable.cut(HERE)
        server = Job(echo, HERE, cable.path)
        with pytest.raises(AssertionError, match="TimeoutError"):
            run(say, THERE, cable.path, HERE, WORDS, SHORT)
        cable.mend(HERE)
        assert run(say, THERE, cable.path, HERE, WORDS) == WORDS
        assert server.result() == len(WORDS)


def test_what_is_carried_is_seen(tmp_path: Path) -> None:
    packets: list[bytes] = []
    with Cable(tmp_path / "cable", on_packet=packets.append) as cable:
        server = Job(echo, HERE, cable.path)
        run(say, THERE, cable.path, HERE, b"a word in clear")
        server.result()
    assert any(b"a word in clear" in packet for packet in packets)
