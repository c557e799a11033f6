"""Every way of vLLM's to put other weights into a running model is heard of."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from torch import nn
from vllm.v1.worker import gpu_worker
from vllm.v1.worker.cpu_worker import CPUWorker

from lmcache_sglang.vllm_connector import replacements


class Listener:
    def __init__(self) -> None:
        self.heard: list[str] = []

    def replaced(self) -> None:
        self.heard.append("replaced")

    def sleeps(self) -> None:
        self.heard.append("sleeps")


class Model(nn.Module):
    def load_weights(self, weights: list[str]) -> set[str]:
        return set(weights)


class Finer(Model):
    def load_weights(self, weights: list[str]) -> set[str]:
        return super().load_weights(weights)


def test_loads_are_heard_of_before_and_after_and_no_longer_than_who_listens() -> None:
    listener = Listener()
    replacements.watch(listener.replaced, listener.sleeps)
    replacements.watch(listener.replaced, listener.sleeps)  # of another worker: wrapped once
    assert Model().load_weights(["w"]) == {"w"}
    assert listener.heard == ["replaced"] * 4
    assert Finer().load_weights(["w"]) == {"w"}
    assert len(listener.heard) == 4 + 8
    del listener
    Model().load_weights([])
    assert not replacements._listeners["replaced"]


def test_a_sleep_that_gives_weights_up_is_a_replacement() -> None:
    class Worker:
        def sleep(self, level: int = 1) -> int:
            return level

    replacements._wrap(Worker, ("sleep",), "sleeps")
    listener = Listener()
    replacements.watch(listener.replaced, listener.sleeps)
    assert Worker().sleep() == 1
    assert listener.heard == ["sleeps", "sleeps"]
    assert Worker().sleep(level=2) == 2
    assert listener.heard[2:] == ["sleeps", "replaced", "sleeps", "replaced"]


def test_who_writes_parameters_by_hand_says_so() -> None:
    listener = Listener()
    replacements.watch(listener.replaced, listener.sleeps)
    replacements.weights_replaced()
    assert listener.heard == ["replaced"]


@pytest.mark.parametrize(
    "name",
    ["reload_weights", "start_weight_update", "update_weights", "finish_weight_update", "sleep"],
)
def test_vllms_own_ways_are_among_them(name: str) -> None:
    listener = Listener()
    replacements.watch(listener.replaced, listener.sleeps)
    assert hasattr(vars(gpu_worker.Worker)[name], "_lmcache_event")
    assert issubclass(CPUWorker, gpu_worker.Worker)
