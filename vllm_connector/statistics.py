"""What vLLM logs and publishes of the connector, beside its own `vllm:external_prefix_cache_*`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

# Counters, by name: what they say, and of which label, if any.
COUNTERS = {
    "load_bytes": "Bytes that were loaded from the store into blocks.",
    "load_seconds": "Seconds that loads took.",
    "load_tokens": "Tokens that were loaded from the store.",
    "load_missed_tokens": "Tokens that the store had and did not deliver: they were computed.",
    "save_bytes": "Bytes that were saved.",
    "save_seconds": "Seconds that saves took, beside the engine.",
    "save_pages": "Pages that were saved.",
    "save_lost_pages": "Pages that the store did not take.",
    "save_skipped_pages": "Pages that were not saved, as too many blocks waited for that.",
    "lookup_seconds": "Seconds that lookups took, beside the scheduler.",
    "lookups_late": "Lookups that were given up, as the store did not answer.",
}
FAULTS = "faults"  # a labelled one: failures of tiers, which became misses
PREFIX = "vllm:lmcache_"


@dataclass
class Statistics(KVConnectorStats):  # type: ignore[misc]  # vLLM is not typed here
    """`data` is counters by name, and under `FAULTS` counters by "tier.reason"; all since the last time they were told."""

    def reset(self) -> None:
        self.data: dict[str, Any] = {}

    def is_empty(self) -> bool:
        return not self.data

    def add(self, **counts: float) -> None:
        for name, count in counts.items():
            if count:
                self.data[name] = self.data.get(name, 0) + count

    def add_faults(self, counts: dict[str, int]) -> None:
        for reason, count in counts.items():
            if count:
                faults = self.data.setdefault(FAULTS, {})
                faults[reason] = faults.get(reason, 0) + count

    def aggregate(self, other: KVConnectorStats) -> Statistics:
        counts = dict(other.data)
        self.add_faults(counts.pop(FAULTS, {}))
        self.add(**counts)
        return self

    def reduce(self) -> dict[str, int | float]:
        counts = dict(self.data)
        faults = counts.pop(FAULTS, {})
        rates = {
            f"{way} GB/s": round(counts.get(f"{way}_bytes", 0) / counts[f"{way}_seconds"] / 1e9, 3)
            for way in ("load", "save")
            if counts.get(f"{way}_seconds")
        }
        return {**counts, **rates, **{f"fault {reason}": faults[reason] for reason in faults}}


class PrometheusMetrics(KVConnectorPromMetrics):  # type: ignore[misc]  # as above
    """The same counters, as `vllm:lmcache_*_total`."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            name: self._counter_cls(name=PREFIX + name, documentation=said, labelnames=labelnames)
            for name, said in COUNTERS.items()
        }
        self._faults = self._counter_cls(
            name=PREFIX + FAULTS,
            documentation="Failures of tiers, each of which became a miss.",
            labelnames=[*labelnames, "reason"],
        )
        for values in per_engine_labelvalues.values():
            for counter in self._counters.values():
                counter.labels(*values)  # shown from the start, as 0

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        values = self.per_engine_labelvalues[engine_idx]
        counts = dict(transfer_stats_data)
        for reason, count in counts.pop(FAULTS, {}).items():
            self._faults.labels(*values, reason).inc(count)
        for name, count in counts.items():
            self._counters[name].labels(*values).inc(count)
