"""The tiny checkpoint: the seed decides the weights, and nothing else does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
load_file = pytest.importorskip("safetensors.torch").load_file

from lmcache_sglang.testing.tiny_model import make_tiny_llama


def test_one_seed_gives_the_same_files(tmp_path: Path) -> None:
    one, two = (make_tiny_llama(tmp_path / name, seed=3) for name in ("one", "two"))
    names = sorted(path.name for path in one.iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(names)
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)


def test_another_seed_changes_the_weights_and_keeps_the_tokenizer(tmp_path: Path) -> None:
    one, two = (make_tiny_llama(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    assert (one / "model.safetensors").read_bytes() != (two / "model.safetensors").read_bytes()
    assert (one / "tokenizer.json").read_bytes() == (two / "tokenizer.json").read_bytes()


def test_a_dtype_rounds_the_same_weights(tmp_path: Path) -> None:
    exact = load_file(make_tiny_llama(tmp_path / "a", dtype="float32") / "model.safetensors")
    rounded = load_file(make_tiny_llama(tmp_path / "b") / "model.safetensors")
    assert exact.keys() == rounded.keys()
    assert all(torch.equal(exact[name].bfloat16(), rounded[name]) for name in exact)


def test_the_caller_keeps_its_random_state(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    make_tiny_llama(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)
