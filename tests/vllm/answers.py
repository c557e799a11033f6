"""What a step of `vllm.generate` gave, told by the kind."""

from __future__ import annotations

from typing import Any

HITS = "vllm:external_prefix_cache_hits"
LOADED = "vllm:lmcache_load_tokens"
MISSED = "vllm:lmcache_load_missed_tokens"
SAVED = "vllm:lmcache_save_pages"


def cached(answers: list[dict[str, Any]]) -> list[int]:
    return [answer["cached"] for answer in answers]


def tokens(answers: list[dict[str, Any]]) -> list[list[int]]:
    return [answer["tokens"] for answer in answers]
