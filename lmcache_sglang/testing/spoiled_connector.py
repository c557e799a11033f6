"""The connector over a store that is slow, or that loses pages on the way: `spoil` and `delay` beside its settings."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from ..connector import LMCacheSGLangConnector
from ..kernels.pages import PageSegments
from ..storage.base import NO_LIMITS, Limits

NAME = "SpoiledConnector"


class SpoiledConnector(LMCacheSGLangConnector):
    """Settings: spoil: of the pages that are read, each so manieth is lost. delay: seconds of each read. slow: of each write."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        own = {name: extra.pop(name, 0) for name in ("spoil", "delay", "slow")}
        super().__init__(vllm_config, role, kv_cache_config)
        extra.update(own)  # for the connector of the other role
        get, put, read = self._chain.get, self._chain.put, 0

        def spoiled(
            keys: Sequence[bytes],
            into: PageSegments,
            *,
            parent: bytes = b"",
            limits: Limits = NO_LIMITS,
        ) -> list[bool]:
            nonlocal read
            time.sleep(own["delay"])  # the store's own time
            held = get(keys, into, parent=parent, limits=limits)
            first, read = read, read + len(held)
            lost = [own["spoil"] and (first + i + 1) % own["spoil"] == 0 for i in range(len(held))]
            return [here and not gone for here, gone in zip(held, lost, strict=True)]

        def slowly(*args: Any, **kwargs: Any) -> list[bool]:
            time.sleep(own["slow"])
            return put(*args, **kwargs)

        if own["spoil"] or own["delay"]:
            self._chain.get = spoiled  # type: ignore[method-assign]
        if own["slow"]:
            self._chain.put = slowly  # type: ignore[method-assign]
