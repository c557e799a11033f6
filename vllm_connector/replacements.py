"""Whether a worker's weights are still those that its model's files hold.

vLLM loads others into a running model in several ways: `reload_weights`, the weight transfer of RLHF, or a call of the
model's own `load_weights` by an extension of the worker. All of them end in methods that are wrapped here, in this
process, once the weights of the files are loaded. What writes into parameters by hand is not seen: who does that calls
`weights_replaced` in each worker.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakMethod

_OF_WORKERS = (
    "load_model",
    "reload_weights",
    "start_weight_update",
    "update_weights",
    "finish_weight_update",
)
_OF_MODELS = ("load_weights",)
_SLEEP = ("sleep",)

_listeners: dict[str, list[WeakMethod[Callable[[], None]]]] = {"replaced": [], "sleeps": []}


def watch(replaced: Callable[[], None], sleeps: Callable[[], None]) -> None:
    """Call bound methods for as long as their objects live.

    Args:
        replaced: before and after weights may have been replaced.
        sleeps: before memory is given back, that of blocks perhaps.
    """
    import torch
    from vllm.v1.worker.worker_base import WorkerBase

    _listeners["replaced"].append(WeakMethod(replaced))
    _listeners["sleeps"].append(WeakMethod(sleeps))
    for worker in _kinds_of(WorkerBase):
        _wrap(worker, _OF_WORKERS, "replaced")
        _wrap(worker, _SLEEP, "sleeps")
    for module in _kinds_of(torch.nn.Module):
        _wrap(module, _OF_MODELS, "replaced")


def weights_replaced() -> None:
    """Say that this process's weights are not those of the model's files any more, where they were written by hand.

    `llm.collective_rpc(lambda worker: weights_replaced())`; and then reset vLLM's own cache (`reset_prefix_cache`).
    """
    _tell("replaced")


def _kinds_of(base: type) -> Iterator[type]:
    kinds: list[type] = type.__subclasses__(base)
    for kind in kinds:
        yield kind
        yield from _kinds_of(kind)


def _wrap(kind: type, names: tuple[str, ...], event: str) -> None:
    for name in names:
        method = vars(kind).get(name)
        if callable(method) and not hasattr(method, "_lmcache_event"):
            setattr(kind, name, _telling(method, event))


def _telling(method: Callable[..., Any], event: str) -> Callable[..., Any]:
    @functools.wraps(method)
    def told(*args: Any, **kwargs: Any) -> Any:
        events = (
            [event, "replaced"] if event == "sleeps" and _discards(*args, **kwargs) else [event]
        )
        for each in events:
            _tell(each)
        try:
            return method(*args, **kwargs)
        finally:
            for each in events:
                _tell(each)

    told._lmcache_event = event  # type: ignore[attr-defined]  # by which it is known as wrapped
    return told


def _discards(worker: object, level: int = 1) -> bool:
    """Whether a sleep gives the weights up. Args: as of `WorkerBase.sleep`."""
    return level > 1


def _tell(event: str) -> None:
    for listener in list(_listeners[event]):
        listen = listener()
        if listen is None:
            _listeners[event].remove(listener)
        else:
            listen()
