"""What vLLM logs and publishes of the connector."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from lmcache_sglang.vllm_connector.statistics import COUNTERS, PrometheusMetrics, Statistics


def counted(faults: dict[str, int] | None = None, **counts: float) -> Statistics:
    made = Statistics()
    made.add(**counts)
    made.add_faults(faults or {})
    return made


def test_those_of_several_workers_add_up() -> None:
    one = counted({"cpu.corrupt": 1}, load_bytes=5, load_seconds=1.0)
    other = counted({"cpu.corrupt": 2, "disk.io": 1}, load_bytes=7)
    whole = one.aggregate(other)
    assert whole.data == {
        "load_bytes": 12,
        "load_seconds": 1.0,
        "faults": {"cpu.corrupt": 3, "disk.io": 1},
    }
    assert other.data["load_bytes"] == 7


def test_nothing_is_empty_and_resets_to_it() -> None:
    assert counted({"cpu.io": 0}, load_bytes=0).is_empty()
    some = counted(load_bytes=1)
    assert not some.is_empty()
    some.reset()
    assert some.is_empty()


@pytest.mark.parametrize("name", list(COUNTERS))
def test_each_counter_alone_can_be_logged(name: str) -> None:
    assert Statistics({name: 2.0}).reduce()[name] == 2.0


def test_bandwidths_are_logged() -> None:
    said = counted({"disk.io": 3}, save_bytes=3e9, save_seconds=2.0).reduce()
    assert said["save GB/s"] == 1.5
    assert said["fault disk.io"] == 3
    assert "load GB/s" not in said


def test_prometheus_has_all_from_the_start_and_what_is_observed() -> None:
    registry = CollectorRegistry()

    def kind(base: Any) -> Any:
        return lambda **keys: base(**keys, registry=registry)

    config: Any = SimpleNamespace(kv_transfer_config=None)
    kinds = {Gauge: kind(Gauge), Counter: kind(Counter), Histogram: kind(Histogram)}
    metrics = PrometheusMetrics(config, kinds, ["engine"], {0: ["zero"], 1: ["one"]})
    for name in COUNTERS:
        assert registry.get_sample_value(f"vllm:lmcache_{name}_total", {"engine": "one"}) == 0
    metrics.observe(counted({"disk.io": 2}, load_tokens=64).data, 1)
    metrics.observe(counted(load_tokens=64).data, 1)
    value = registry.get_sample_value
    assert value("vllm:lmcache_load_tokens_total", {"engine": "one"}) == 128
    assert value("vllm:lmcache_load_tokens_total", {"engine": "zero"}) == 0
    assert value("vllm:lmcache_faults_total", {"engine": "one", "reason": "disk.io"}) == 2
