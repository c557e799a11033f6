"""The tiny models of all families: each is what its name says, and the seed decides its weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from lmcache_sglang.testing.tiny_families import FAMILIES, make_tiny

ARCHITECTURES = {
    "mha": "LlamaForCausalLM",
    "swa": "MellumForCausalLM",
    "mla": "DeepseekV2ForCausalLM",
    "wide-mla": "DeepseekV2ForCausalLM",
    "mamba": "FalconH1ForCausalLM",
    "conv": "Lfm2ForCausalLM",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_made_alike_from_one_seed(family: str, tmp_path: Path) -> None:
    one, two, other = (
        make_tiny(family, tmp_path / name, seed=seed)
        for name, seed in (("one", 1), ("two", 1), ("other", 2))
    )
    config = json.loads((one / "config.json").read_text())
    assert config["architectures"] == [ARCHITECTURES[family]]
    weights = [(path / "model.safetensors").read_bytes() for path in (one, two, other)]
    assert weights[0] == weights[1] != weights[2]
