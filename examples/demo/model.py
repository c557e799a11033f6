"""Which model the demo serves: the caller's, Gemma 3 270M, or one of random weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from examples.demo.errors import DemoFailed
from examples.demo.gemma import TERMS, GemmaUnavailable, prepare_gemma
from examples.demo.progress import Progress
from lmcache_sglang.testing.tiny_model import make_tiny_llama

RANDOM_CONTEXT = 16384


@dataclass(frozen=True, slots=True)
class Model:
    path: Path
    name: str


def local_model(path: Path) -> Model:
    """The caller's own checkpoint."""
    if not (path / "config.json").exists():
        raise DemoFailed(f"{path} is no model folder: it has no config.json")
    return Model(path.absolute(), path.name)


def default_model(cache: Path, progress: Progress) -> Model:
    """Gemma, made in `cache` the first time; without its package, a model that talks noise."""
    progress.say(f"Model: Gemma 3 270M. {TERMS}")
    try:
        return Model(prepare_gemma(cache / "gemma-3-270m", progress), "Gemma 3 270M")
    except GemmaUnavailable as error:
        progress.say(f"Gemma could not be had: {error}")
        progress.say(
            "Instead: a Llama of random weights. The words are noise, the caching is real."
        )
        return Model(_random_llama(cache / "random-llama"), "a Llama of random weights")


def _random_llama(path: Path) -> Path:
    """Of a size at which computing a prompt costs enough for a cache to be worth it."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    return make_tiny_llama(
        path,
        num_layers=8,
        num_heads=16,
        num_kv_heads=4,
        head_dim=64,
        max_tokens=RANDOM_CONTEXT,
    )
